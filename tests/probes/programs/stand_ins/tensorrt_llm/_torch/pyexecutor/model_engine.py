from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import nn

from tensorrt_llm._torch.modules.fused_moe.interface import CutlassFusedMoE, TRTLLMGenFusedMoE
from tensorrt_llm._torch.modules.fused_moe.routing import RenormalizeMoeRoutingMethod

LAYERS, EXPERTS, TOP_K, PADDED_TO = 2, 6, 2, 8


class Block(nn.Module):
    def __init__(self, layer, kind):
        super().__init__()
        self.gate = nn.Embedding(64, EXPERTS)
        routing = RenormalizeMoeRoutingMethod(TOP_K)
        self.experts = kind(routing_method=routing, num_experts=EXPERTS, layer_idx=layer)

    def forward(self, input_ids):
        return self.experts(input_ids.to(torch.float32), self.gate(input_ids))


class Decoder(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layers = nn.ModuleList(Block(layer, kind) for layer in range(LAYERS))

    def forward(self, input_ids):
        return [block(input_ids) for block in self.layers]


class Model(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(3)
        self.model = Decoder(kind)
        self.model_config = SimpleNamespace(
            pretrained_config=SimpleNamespace(_name_or_path="models/tiny-moe")
        )

    def forward(self, attn_metadata, input_ids):
        return self.model(input_ids)


class PyTorchModelEngine:
    def __init__(self, *, model_path, is_draft_model=False, compiled=False, routes_inside=False):
        self.mapping = SimpleNamespace(
            tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, cp_size=1, moe_ep_size=1, enable_attention_dp=False
        )
        self.is_draft_model = is_draft_model
        self.max_num_tokens = 16
        self.max_beam_width = 1
        self.spec_config = None
        self.is_warmup = False
        self.model = Model(TRTLLMGenFusedMoE if routes_inside else CutlassFusedMoE)
        if compiled:
            self.model.model = torch.compile(self.model.model, backend="eager", fullgraph=True)

    @property
    def is_warmup(self):
        return self._is_warmup

    @is_warmup.setter
    def is_warmup(self, value):
        self._is_warmup = value

    @contextmanager
    def _padded(self, scheduled_requests):
        dummy = SimpleNamespace(py_request_id=99, is_dummy=True, tokens=[0])
        scheduled_requests.generation_requests.append(dummy)
        yield scheduled_requests
        scheduled_requests.generation_requests.pop()

    def _prepare_inputs(self, scheduled_requests, kv_cache_manager, attn_metadata, spec_metadata=None):
        sequences = [*scheduled_requests.context_requests, *scheduled_requests.generation_requests]
        attn_metadata.request_ids = [one.py_request_id for one in sequences]
        attn_metadata.seq_lens = torch.tensor([len(one.tokens) for one in sequences], dtype=torch.int)
        ids = torch.tensor([token for one in sequences for token in one.tokens])
        padded = -(-len(ids) // PADDED_TO) * PADDED_TO
        ids = torch.nn.functional.pad(ids, (0, padded - len(ids)))
        return {"attn_metadata": attn_metadata, "input_ids": ids}, None

    @torch.inference_mode()
    def forward(self, scheduled_requests, resource_manager, new_tensors_device=None):
        with self._padded(scheduled_requests) as padded:
            inputs, _ = self._prepare_inputs(padded, None, attn_metadata=SimpleNamespace())
            return self.model.forward(**inputs)

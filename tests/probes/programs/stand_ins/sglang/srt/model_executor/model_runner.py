from types import SimpleNamespace

import torch
from torch import nn

from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.topk import TopK
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

__all__ = ["ForwardBatch", "ForwardMode", "ModelRunner"]

LAYERS, EXPERTS, TOP_K, SHARED, REDUNDANT, PADDED_TO = 2, 6, 2, 1, 2, 8


class Block(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.gate = nn.Embedding(64, EXPERTS)
        self.topk = TopK(TOP_K, layer_id=layer, num_fused=SHARED)
        self.experts = FusedMoE(EXPERTS + REDUNDANT + SHARED, layer_id=layer, num_fused_shared_experts=SHARED)

    def forward(self, input_ids, real):
        to_physical = torch.tensor([5, 4, 3, 2, 1, 0, 8])
        return self.topk(None, self.gate(input_ids), to_physical, real)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.model = nn.ModuleDict({"layers": nn.ModuleList(map(Block, range(LAYERS)))})

    def forward(self, input_ids, real):
        return [block(input_ids, real) for block in self.model["layers"]]


class ModelRunner:
    def __init__(self, *, is_draft_worker=False):
        self.is_draft_worker = is_draft_worker
        self.server_args = SimpleNamespace(
            model_path="models/tiny-moe", enable_two_batch_overlap=False, enable_pdmux=False
        )
        self.model_config = SimpleNamespace(context_len=64)
        self.load_model()
        self.warm_up()

    def load_model(self):
        self.model = Model()

    def warm_up(self):
        """As the capture of graphs: past ``forward``."""
        self.model(torch.zeros(PADDED_TO, dtype=torch.int64), PADDED_TO)

    def attn_tp_sequence_sharded(self, num_tokens):
        return False

    def forward(self, forward_batch, skip_attn_backend_init=None, pp_proxy_tensors=None):
        ids = forward_batch.input_ids
        padded = -(-len(ids) // PADDED_TO) * PADDED_TO
        with torch.inference_mode():
            return self.model(torch.nn.functional.pad(ids, (0, padded - len(ids))), len(ids))

from typing import final

import torch
from torch import nn

LAYERS = {}


@torch.library.custom_op("stand_in::moe_custom_op", mutates_args=())
def moe_custom_op(layer_idx: int, x: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
    return LAYERS[layer_idx].forward_impl(x, router_logits)


@moe_custom_op.register_fake
def _(layer_idx, x, router_logits):
    return torch.empty_like(x)


class MoE(nn.Module):
    def __init__(self, *, routing_method, num_experts, layer_idx=None):
        super().__init__()
        self.routing_method = routing_method
        self.num_experts = num_experts
        self.layer_idx = layer_idx
        LAYERS.setdefault(layer_idx, self)  # a drafter has a table of its own

    def forward_impl(self, x, router_logits, **kwargs):
        raise NotImplementedError

    @final
    def forward(self, x, router_logits):
        if torch.compiler.is_compiling():
            return moe_custom_op(self.layer_idx, x, router_logits)
        return self.forward_impl(x, router_logits)


class CutlassFusedMoE(MoE):
    """Routes in chunks, as batches above ``moe_max_num_tokens`` are."""

    moe_max_num_tokens = 5

    def forward_impl(self, x, router_logits, **kwargs):
        for part in router_logits.split(self.moe_max_num_tokens):
            slots = self.routing_method.apply(part)[0] + 100  # where EPLB has put them
            assert slots.shape[1] == self.routing_method.experts_per_token
        return x.clone()


class TRTLLMGenFusedMoE(MoE):
    """Routes inside of its kernel."""

    def forward_impl(self, x, router_logits, **kwargs):
        return x.clone()

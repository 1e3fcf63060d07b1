from dataclasses import dataclass
from enum import IntEnum, auto
from typing import NamedTuple

import torch
from torch import nn

#: What the engine itself returns of routes.
CAPTURED = []


class TopKOutputFormat(IntEnum):
    STANDARD = auto()
    TRITON_KERNEL = auto()
    BYPASSED = auto()


@dataclass
class TopKConfig:
    top_k: int
    num_fused: int = 0
    output_format: TopKOutputFormat | None = TopKOutputFormat.STANDARD
    runner_backend: str | None = "triton"
    allow_routed_experts_capture: bool = True

    @property
    def num_shared_topk_slots(self):
        return self.num_fused


class StandardTopKOutput(NamedTuple):
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    router_logits: torch.Tensor


def capture_routed_experts_if_allowed(topk_config, layer_id, topk_ids):
    if topk_config.allow_routed_experts_capture:
        CAPTURED.append((layer_id, topk_ids))


def select_experts(hidden_states, router_logits, topk_config, *, layer_id, to_physical, num_token_non_padded):
    routed = topk_config.top_k - topk_config.num_shared_topk_slots
    weights, ids = router_logits.topk(routed)
    shared = torch.full((len(ids), topk_config.num_shared_topk_slots), router_logits.shape[1])
    ids = torch.cat([ids, shared], dim=1)
    capture_routed_experts_if_allowed(topk_config, layer_id, ids)
    physical = to_physical[ids]
    physical[num_token_non_padded:] = -1
    return StandardTopKOutput(weights, physical, router_logits)


class TopK(nn.Module):
    def __init__(self, top_k, *, layer_id, num_fused=0, is_draft=False):
        super().__init__()
        self.layer_id = layer_id
        self.is_draft = is_draft
        self.topk_config = TopKConfig(top_k=top_k + num_fused, num_fused=num_fused)

    def forward(self, hidden_states, router_logits, to_physical, num_token_non_padded):
        return select_experts(
            hidden_states, router_logits, self.topk_config, layer_id=self.layer_id, to_physical=to_physical,
            num_token_non_padded=num_token_non_padded,
        )  # fmt: skip

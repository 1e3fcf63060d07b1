"""SGLang's MoE layers: where their logical expert ids are, and which are refused.

Shapes: T rows, K assignments per token.

A layer's ``TopK`` gives the ids that it chose to ``capture_routed_experts_if_allowed``, the one place by
which the engine itself returns the routes of requests: before they are mapped to physical experts, with
columns of fused shared experts behind the others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from observatory.errors import ModelError
from observatory.probes.programs.engines.token_phases import TokenPhases
from observatory.probes.routing.adapters import Adapter
from observatory.probes.routing.sites import RoutingDecision

_CHOICES = "capture_routed_experts_if_allowed"
#: Of a layer's ``TopKConfig``: what takes its ids.
_HEARD = "observatory_heard"
#: Outputs of ``TopK`` that hold no ids: kernels behind it route by themselves.
_WITHOUT_IDS = ("BYPASSED", "TRITON_KERNEL")


def show_choices(topk: ModuleType) -> None:
    """Have the engine's function show ids to layers that are watched; doing it twice does nothing."""
    capture = getattr(topk, _CHOICES)
    if hasattr(capture, "__wrapped__"):
        return

    @functools.wraps(capture)
    def show(topk_config: Any, layer_id: int | None, topk_ids: torch.Tensor) -> None:
        heard = getattr(topk_config, _HEARD, None)
        if heard is not None:
            heard(topk_ids)
        capture(topk_config, layer_id, topk_ids)

    setattr(topk, _CHOICES, show)


def sglang_adapter(model: nn.Module, phases: TokenPhases, redundant: int) -> Adapter:
    """How the layers of an SGLang model are counted.

    Args:
        model: the model.
        phases: states the phase of every row.
        redundant: physical experts of a layer beyond the logical ones.
    """
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.moe.hash_topk import HashTopK
    from sglang.srt.layers.moe.topk import TopK

    routed = {
        module.layer_id: int(module._num_global_routed) - redundant
        for module in model.modules()
        if isinstance(module, FusedMoE) and not module.is_shared_fused_moe
    }

    def experts(topk: Any) -> int:
        if isinstance(topk, HashTopK):
            raise ModelError(f"layer {topk.layer_id} chooses experts by token id (HashTopK) and shows no ids")
        output = getattr(topk.topk_config.output_format, "name", None)
        if output in _WITHOUT_IDS:
            raise ModelError(
                f"layer {topk.layer_id} routes inside of its kernel ({topk.topk_config.runner_backend}), "
                "which shows no ids",
                remedy="choose another one (--moe-runner-backend)",
            )
        if topk.layer_id not in routed:
            raise ModelError(f"layer {topk.layer_id} has a TopK, but its experts (FusedMoE) were not found")
        return routed[topk.layer_id]

    def listen(topk: Any, heard: Callable[[RoutingDecision], None]) -> Callable[[], None]:
        config, columns = topk.topk_config, _columns(topk)

        def take(ids_TK: torch.Tensor) -> None:
            ids = ids_TK[:, :columns]
            heard(RoutingDecision(expert_ids=ids, token_slots=phases.slots, tokens=ids_TK.shape[0]))

        setattr(config, _HEARD, take)
        return lambda: delattr(config, _HEARD)

    return Adapter(
        match=lambda _path, module: isinstance(module, TopK | HashTopK),
        listen=listen,
        experts=experts,
        top_k=_columns,
        how="expert ids of SGLang's TopK",
    )


def _columns(topk: Any) -> int:
    """K: those of routed experts, which are the first ones."""
    return int(topk.topk_config.top_k - topk.topk_config.num_shared_topk_slots)

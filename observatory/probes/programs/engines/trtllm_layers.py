"""TensorRT-LLM's MoE layers (PyTorch backend): where their logical expert ids are, and which are refused.

Shapes: T rows, K assignments per token.

A layer (``MoE``) has a ``routing_method``, whose ``apply`` returns the ids of experts: of this rank's rows,
before EPLB turns them into slots, and before they are sent anywhere. Large batches are routed in chunks, one
after the other. Some kernels route by themselves and never call it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from observatory.probes.programs.engines.token_phases import TokenPhases
from observatory.probes.routing.adapters import Adapter
from observatory.probes.routing.sites import RoutingDecision


def trtllm_adapter(phases: TokenPhases, refuse: Callable[[str], None]) -> Adapter:
    """How the layers of a TensorRT-LLM model are counted.

    Args:
        phases: states the phase of every row.
        refuse: called where a layer turns out to show no ids.
    """
    from tensorrt_llm._torch.modules.fused_moe.interface import MoE

    def listen(layer: nn.Module, heard: Callable[[RoutingDecision], None]) -> Callable[[], None]:
        ears = _Ears(layer, phases, heard, refuse)
        ears.put_on()
        return ears.take_off

    return Adapter(
        match=lambda _path, module: isinstance(module, MoE),
        listen=listen,
        experts=lambda layer: int(layer.num_experts),  # type: ignore[arg-type]
        top_k=lambda layer: int(layer.routing_method.experts_per_token),  # type: ignore[union-attr, arg-type]
        how="expert ids of TensorRT-LLM's routing method",
    )


class _Ears:
    """Around the call of one layer and of its routing method."""

    def __init__(
        self,
        layer: Any,
        phases: TokenPhases,
        heard: Callable[[RoutingDecision], None],
        refuse: Callable[[str], None],
    ) -> None:
        self._layer = layer
        self._phases = phases
        self._heard = heard
        self._refuse = refuse
        self._rows = 0
        self._was_asked = False

    def put_on(self) -> None:
        layer, routing = self._layer, self._layer.routing_method
        forward, apply = layer.forward_impl, routing.apply

        @functools.wraps(forward)
        def forward_impl(*args: Any, **kwargs: Any) -> Any:
            self._rows, self._was_asked = 0, False
            result = forward(*args, **kwargs)
            if not self._was_asked:
                kernel = type(getattr(layer, "backend", layer)).__name__
                self._refuse(
                    f"layer {layer.layer_idx} routes inside of its kernel ({kernel}), which shows no ids; "
                    "choose another one (moe_config.backend)"
                )
            return result

        @functools.wraps(apply)
        def apply_heard(*args: Any, **kwargs: Any) -> Any:
            chosen = apply(*args, **kwargs)
            self._take(chosen[0])
            return chosen

        layer.forward_impl, routing.apply = forward_impl, apply_heard

    def _take(self, ids_TK: torch.Tensor) -> None:
        first, rows = self._rows, ids_TK.shape[0]
        self._rows, self._was_asked = first + rows, True
        slots = self._phases.slots[first : first + rows]
        self._heard(RoutingDecision(expert_ids=ids_TK, token_slots=slots, tokens=rows))

    def take_off(self) -> None:
        self._layer.__dict__.pop("forward_impl", None)
        self._layer.routing_method.__dict__.pop("apply", None)

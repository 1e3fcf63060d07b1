"""vLLM's MoE layers: where their logical expert ids are, and which are refused.

Shapes: T rows, K assignments per token.

A layer is a ``MoERunner``; its router calls ``capture_fn`` with the ids that it chose, before they are mapped
to physical experts. The engine uses that one place itself to return the routes of requests: both are called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from observatory.errors import ModelError
from observatory.probes.programs.engines.token_phases import TokenPhases
from observatory.probes.routing.adapters import Adapter
from observatory.probes.routing.sites import RoutingDecision

_Heard = Callable[[RoutingDecision], None]


def vllm_adapter(phases: TokenPhases, config: Any) -> Adapter:
    """How the layers of a vLLM model are counted.

    Args:
        phases: states the phase of every row.
        config: vLLM's ``ParallelConfig``.
    """
    from vllm.model_executor.layers.fused_moe.layer import MoERunner

    own = _OwnRows(config.data_parallel_rank) if config.data_parallel_size > 1 else None

    def listen(runner: nn.Module, heard: _Heard) -> Callable[[], None]:
        def take(ids_TK: torch.Tensor) -> None:
            ids = ids_TK if own is None else own(ids_TK)
            heard(RoutingDecision(expert_ids=ids, token_slots=phases.slots, tokens=ids_TK.shape[0]))

        return _chain(runner.router, take)

    return Adapter(
        match=lambda _path, module: isinstance(module, MoERunner),
        listen=listen,
        experts=lambda module: int(_checked(module).moe_config.num_logical_experts),
        top_k=lambda module: int(module.router.top_k),  # type: ignore[union-attr, arg-type]
        how="expert ids of vLLM's router",
    )


def _checked(runner: Any) -> Any:
    """The layer, if its ids can be seen.

    Raises:
        ModelError: they cannot.
    """
    router, kernel = runner.router, getattr(runner, "_quant_method", None)
    name = type(router).__name__
    if getattr(kernel, "is_monolithic", False):
        raise ModelError(
            f"{runner.layer_name} routes inside of its kernel ({type(kernel).__name__}), which shows no ids",
            remedy="choose another MoE kernel",
        )
    if not hasattr(router, "set_capture_fn"):
        raise ModelError(f"{runner.layer_name} has a router ({name}) that shows no ids")
    if hasattr(router, "zero_expert_type"):
        raise ModelError(
            f"{runner.layer_name}: its router ({name}) shows tokens of experts without weights as tokens of "
            "expert 0"
        )
    if runner.moe_config.is_sequence_parallel:
        raise ModelError(f"{runner.layer_name} splits tokens among ranks (sequence parallelism)")
    return runner


def _chain(router: Any, ours: Callable[[torch.Tensor], None]) -> Callable[[], None]:
    """Call ours before whatever the engine sets, before or after us; returns what ends that."""
    state = [router.capture_fn]
    set_theirs = router.set_capture_fn

    def both(theirs: Callable[[torch.Tensor], None] | None) -> Callable[[torch.Tensor], None]:
        if theirs is None:
            return ours

        def call(ids_TK: torch.Tensor) -> None:
            ours(ids_TK)
            theirs(ids_TK)

        return call

    def set_capture_fn(theirs: Callable[[torch.Tensor], None] | None) -> None:
        state[0] = theirs
        set_theirs(both(theirs))

    def end() -> None:
        router.__dict__.pop("set_capture_fn", None)
        set_theirs(state[0])

    set_theirs(both(state[0]))
    router.set_capture_fn = set_capture_fn
    return end


class _OwnRows:
    """Of the rows that a router is given, those of this data-parallel rank: others' may be among them."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def __call__(self, ids_TK: torch.Tensor) -> torch.Tensor | None:
        """Ids of this rank's tokens; None where it is not known which they are."""
        from vllm.forward_context import get_forward_context

        metadata = get_forward_context().dp_metadata
        if metadata is None:
            return ids_TK
        tokens_R = [int(tokens) for tokens in metadata.num_tokens_across_dp_cpu]
        rows, first = ids_TK.shape[0], sum(tokens_R[: self._rank])
        if rows == sum(tokens_R):
            return ids_TK[first : first + tokens_R[self._rank]]
        return ids_TK if rows == tokens_R[self._rank] else None

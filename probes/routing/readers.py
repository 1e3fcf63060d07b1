"""Readers: pure functions that take one module call apart and return the routing decision.

Shapes: T tokens, K assignments per token, E experts, C capacity slots. Every reader looks at names,
positions, dtypes and shapes only, never at values, so that nothing is copied to the host and
``torch.compile`` can trace it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from observatory.errors import ModelError
from probes.routing.sites import ReadCall, RoutingDecision

__all__ = [
    "read_capacity_gate",
    "read_dense_scores",
    "read_expert_ids",
    "read_expert_lookup",
    "read_gate_matrix",
    "read_router_output",
    "read_routing_map",
]

_NOBODY = -1


def read_expert_ids(
    *, ids: tuple[str, int], weights: tuple[str, int] | None, experts: int, zero_weight_is_null: bool = False
) -> ReadCall:
    """Reader of an experts call that is told which expert each token goes to.

    Args:
        ids: name and position of the parameter that carries the expert ids, (T, K). A 0/1 dispatch mask
            (..., E) with one dimension more than the hidden states is taken as a routing map.
        weights: name and position of the gate weights; None when the call has none.
        experts: E.
        zero_weight_is_null: the router sends skipped tokens to some expert with weight zero; such
            assignments count for nobody.
    """

    def read(
        _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], _output: Any
    ) -> RoutingDecision | None:
        chosen = _argument(args, kwargs, ids)
        gates = None if weights is None else _argument(args, kwargs, weights)
        if not isinstance(chosen, torch.Tensor):
            return None
        if chosen.ndim > 2 and chosen.shape[-1] == experts:
            hidden = _argument(args, kwargs, ("hidden_states", 0))
            if isinstance(hidden, torch.Tensor) and chosen.ndim > hidden.ndim:
                map_TE = chosen.reshape(-1, experts)
                return RoutingDecision(
                    routing_map=map_TE, weights=_expand_gate(gates, map_TE), tokens=map_TE.shape[0]
                )
        gates = gates if isinstance(gates, torch.Tensor) and gates.shape == chosen.shape else None
        if zero_weight_is_null and gates is not None:
            chosen = torch.where(gates == 0, _NOBODY, chosen)
        return RoutingDecision(expert_ids=chosen, weights=gates, tokens=math.prod(chosen.shape[:-1]))

    return read


def read_gate_matrix(*, gates: tuple[str, int], experts: int) -> ReadCall:
    """Reader of an experts call that is given a (T, E) matrix of gates, zero where a token does not go."""

    def read(
        _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], _output: Any
    ) -> RoutingDecision | None:
        matrix = _argument(args, kwargs, gates)
        return _dense(matrix, experts) if isinstance(matrix, torch.Tensor) else None

    return read


def read_expert_lookup(*, ids: tuple[str, int]) -> ReadCall:
    """Reader of an embedding table whose rows are experts: the looked-up indices (T, K) are the decision."""

    def read(
        _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], _output: Any
    ) -> RoutingDecision | None:
        chosen = _argument(args, kwargs, ids)
        if not isinstance(chosen, torch.Tensor):
            return None
        return RoutingDecision(expert_ids=chosen, tokens=math.prod(chosen.shape[:-1]))

    return read


def read_dense_scores(*, experts: int) -> ReadCall:
    """Reader of a router whose first (T, E) output is zero for the experts that a token does not go to."""

    def read(
        module: nn.Module, _args: tuple[Any, ...], _kwargs: Mapping[str, Any], output: Any
    ) -> RoutingDecision:
        return _dense(_first(_tensors(output), experts, module), experts)

    return read


def read_router_output(*, experts: int, top_k: int | None) -> ReadCall:
    """Reader of a router's output when the experts' call does not show the ids.

    Tried in this order: integer ids (..., K), a boolean or 0/1 map (..., E), and the K largest of the logits
    (..., E), which is what a router does that returns nothing but logits.
    """

    def read(
        module: nn.Module, _args: tuple[Any, ...], _kwargs: Mapping[str, Any], output: Any
    ) -> RoutingDecision:
        tensors = _tensors(output)
        integers = [t for t in tensors if not t.is_floating_point() and t.dtype != torch.bool and t.ndim > 1]
        for chosen in (t for t in integers if t.shape[-1] == top_k):
            gates = next((t for t in tensors if t.is_floating_point() and t.shape == chosen.shape), None)
            return RoutingDecision(expert_ids=chosen, weights=gates, tokens=math.prod(chosen.shape[:-1]))
        for marks in (t for t in tensors if not t.is_floating_point() and t.shape[-1:] == (experts,)):
            map_TE = marks.reshape(-1, experts)
            return RoutingDecision(routing_map=map_TE, tokens=map_TE.shape[0])
        logits_TE = _first(tensors, experts, module)
        ids_TK = logits_TE.topk(top_k or 1, dim=-1).indices
        return RoutingDecision(expert_ids=ids_TK, tokens=ids_TK.shape[0])

    return read


def read_routing_map(*, experts: int) -> ReadCall:
    """Reader of Megatron-Core's router output ``(probs, routing_map)``, both (T, E).

    The map is what the dispatcher sends: after capacity dropping, padding tokens included (Megatron-Core's
    ``padding_mask`` keeps them out of its losses, not out of the exchange).
    """

    def read(
        module: nn.Module, _args: tuple[Any, ...], _kwargs: Mapping[str, Any], output: Any
    ) -> RoutingDecision:
        maps = [t for t in _tensors(output) if t.dtype == torch.bool and t.shape[-1:] == (experts,)]
        if not maps:
            raise _unreadable(module, f"a boolean routing map (T, {experts})", output)
        map_TE = maps[0].reshape(-1, experts)
        gates = next(
            (t for t in _tensors(output) if t.is_floating_point() and t.numel() == map_TE.numel()), None
        )
        weights = None if gates is None else gates.reshape(-1, experts)
        return RoutingDecision(routing_map=map_TE, weights=weights, tokens=map_TE.shape[0])

    return read


def read_capacity_gate(*, experts: int) -> ReadCall:
    """Reader of DeepSpeed's gate: what is dispatched, after tokens over capacity were dropped.

    Dense form ``(l_aux, combine_weights (T, E, C), dispatch_mask (T, E, C) bool, exp_counts)``; sparse form
    ``(l_aux, capacity, E, indices (K, T) with -1 for dropped, locations (K, T), gates (K, T), exp_counts)``.
    ``exp_counts`` is not used: it counts before dropping.
    """

    def read(
        module: nn.Module, _args: tuple[Any, ...], _kwargs: Mapping[str, Any], output: Any
    ) -> RoutingDecision:
        tensors = _tensors(output)
        for mask_TEC in (t for t in tensors if t.dtype == torch.bool and t.ndim == 3):
            weights_TEC = next(
                (t for t in tensors if t.is_floating_point() and t.shape == mask_TEC.shape), None
            )
            weights_TE = None if weights_TEC is None else weights_TEC.sum(dim=-1)
            return RoutingDecision(
                routing_map=mask_TEC.any(dim=-1), weights=weights_TE, tokens=mask_TEC.shape[0]
            )
        for ids_KT in (t for t in tensors if t.ndim == 2 and not t.is_floating_point()):
            gates_KT = next((t for t in tensors if t.is_floating_point() and t.shape == ids_KT.shape), None)
            weights_TK = None if gates_KT is None else gates_KT.T
            return RoutingDecision(expert_ids=ids_KT.T, weights=weights_TK, tokens=ids_KT.shape[1])
        raise _unreadable(
            module, f"dispatch_mask (T, {experts}, C) or indices (K, T) of a capacity gate", output
        )

    return read


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], where: tuple[str, int]) -> Any:
    """The argument of that name or, when it was passed by position, at that position; None when absent."""
    name, position = where
    if name in kwargs:
        return kwargs[name]
    return args[position] if position < len(args) else None


def _tensors(output: Any) -> list[torch.Tensor]:
    """Tensors of a module's output, in order; nested containers are not searched."""
    items = output if isinstance(output, (tuple, list)) else (output,)
    return [item for item in items if isinstance(item, torch.Tensor)]


def _first(tensors: list[torch.Tensor], experts: int, module: nn.Module) -> torch.Tensor:
    """The first floating-point tensor (..., E), as (T, E)."""
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.shape[-1:] == (experts,):
            return tensor.reshape(-1, experts)
    raise _unreadable(module, f"a tensor whose last dimension is the number of experts, {experts}", tensors)


def _dense(scores: torch.Tensor, experts: int) -> RoutingDecision:
    """Decision of a (T, E) score matrix: non-zero means "goes there"."""
    scores_TE = scores.reshape(-1, experts)
    return RoutingDecision(routing_map=scores_TE != 0, weights=scores_TE, tokens=scores_TE.shape[0])


def _expand_gate(gates: Any, map_TE: torch.Tensor) -> torch.Tensor | None:
    """Per-token gates (T, 1) spread over the map; None when the gates have another shape."""
    if not isinstance(gates, torch.Tensor) or gates.numel() != map_TE.shape[0]:
        return None
    return gates.reshape(-1, 1) * map_TE


def _unreadable(module: nn.Module, expected: str, output: Any) -> ModelError:
    items = output if isinstance(output, (tuple, list)) else (output,)
    shapes = [tuple(item.shape) if isinstance(item, torch.Tensor) else type(item).__name__ for item in items]
    return ModelError(
        f"{type(module).__name__} returned {shapes}, expected {expected}; "
        "pass an Adapter that reads this module (docs/supported-models.md#adapters)"
    )

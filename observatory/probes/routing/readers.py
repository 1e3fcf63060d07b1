"""Readers: pure functions that take one module call apart and return the routing decision.

Shapes: T tokens, K assignments per token, E experts, C capacity slots. Every reader looks at names,
positions, dtypes and shapes only, never at values, so that nothing is copied to the host and
``torch.compile`` can trace it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from observatory.errors import ModelError
from observatory.probes.routing.sites import ReadCall, RoutingDecision

_NOBODY = -1


def read_expert_ids(
    *,
    ids: tuple[str, int],
    weights: Sequence[tuple[str, int]],
    experts: int,
    token_mask: tuple[str, int] | None = None,
    padding_mask: tuple[str, int] | None = None,
    zero_weight_is_null: bool = False,
) -> ReadCall:
    """Reader of an experts call that is given the expert of each token.

    Args:
        ids: name and position of the parameter that carries the expert ids, (T, K). A 0/1 dispatch mask
            (..., E) with one dimension more than the hidden states is taken as a routing map.
        weights: names and positions of what may be the gate weights: the first of the ids' shape is.
        experts: E.
        token_mask: name and position of a mask (T,) of the tokens that count, when the call has one.
        padding_mask: the same for a mask that is true for padding.
        zero_weight_is_null: the router sends skipped tokens to some expert with weight zero; such
            assignments are not counted.
    """

    def read(
        _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], _output: Any
    ) -> RoutingDecision | None:
        chosen = _argument(args, kwargs, ids)
        if not isinstance(chosen, torch.Tensor):
            return None
        gates = [_argument(args, kwargs, where) for where in weights]
        if chosen.ndim > 2 and chosen.shape[-1] == experts:
            hidden = _argument(args, kwargs, ("hidden_states", 0))
            if isinstance(hidden, torch.Tensor) and chosen.ndim > hidden.ndim:
                map_TE = chosen.reshape(-1, experts)
                return RoutingDecision(
                    routing_map=map_TE,
                    weights=_expand_gate(next(iter(gates), None), map_TE),
                    tokens=map_TE.shape[0],
                )
        gate = next((g for g in gates if isinstance(g, torch.Tensor) and g.shape == chosen.shape), None)
        if zero_weight_is_null and gate is not None:
            chosen = torch.where(gate == 0, _NOBODY, chosen)
        tokens = math.prod(chosen.shape[:-1])
        if chosen.ndim == 1:  # (T * K,): only the call's own tokens say how many there are
            tokens = _call_tokens(args, kwargs) or chosen.numel()
        mask = _mask(args, kwargs, token_mask, tokens)
        padding = _mask(args, kwargs, padding_mask, tokens)
        if mask is None and padding is not None:
            mask = padding.logical_not()
        return RoutingDecision(expert_ids=chosen, weights=gate, token_mask=mask, tokens=tokens)

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

    Tried in this order: integer ids (..., K), a mask (..., E), a dispatch mask over capacity slots
    (..., E, C), and the K largest of the logits (..., E), which is what a router does that returns nothing
    but logits. A tensor is taken for one of these only if it has as many entries as the tokens of the
    router's input make of it: where sizes coincide (T * K = E, C = E) the last dimension says nothing.
    """

    def read(
        module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> RoutingDecision:
        tensors = _tensors(output)
        tokens = _call_tokens(args, kwargs)

        def fits(tensor: torch.Tensor, *last: int) -> bool:
            wanted = tokens or math.prod(tensor.shape[: -len(last)])
            return (
                tensor.ndim > 1
                and tensor.shape[-len(last) :] == last
                and tensor.numel() == wanted * math.prod(last)
            )

        marks = [t for t in tensors if not t.is_floating_point()]
        for chosen in (t for t in marks if top_k and t.dtype != torch.bool and fits(t, top_k)):
            gates = next((t for t in tensors if t.is_floating_point() and t.shape == chosen.shape), None)
            return RoutingDecision(expert_ids=chosen, weights=gates, tokens=math.prod(chosen.shape[:-1]))
        if top_k == 1 and tokens:
            for chosen in (t for t in marks if t.dtype != torch.bool and t.shape == (tokens,)):
                gates = next((t for t in tensors if t.is_floating_point() and t.shape == chosen.shape), None)
                return RoutingDecision(expert_ids=chosen, weights=gates, tokens=tokens)
        for mask in (t for t in marks if fits(t, experts)):
            map_TE = mask.reshape(-1, experts)
            return RoutingDecision(routing_map=map_TE, tokens=map_TE.shape[0])
        slots = [t for t in tensors if t.ndim > 2 and fits(t, experts, t.shape[-1])]
        if slots:
            map_TE = _dispatched(slots).reshape(-1, experts)
            return RoutingDecision(routing_map=map_TE, tokens=map_TE.shape[0], is_dispatch=True)
        for logits in (t for t in tensors if t.is_floating_point() and fits(t, experts)):
            if top_k is None:  # how many of them is not known
                break
            ids_TK = logits.reshape(-1, experts).topk(top_k, dim=-1).indices
            return RoutingDecision(expert_ids=ids_TK, tokens=ids_TK.shape[0], is_inferred=True)
        raise _unreadable(
            module, f"ids, a mask or logits whose last dimension is the number of experts, {experts}", output
        )

    return read


def read_two_levels(*, outer: int, inner: int) -> ReadCall:
    """Reader of the inner router of two, whose dispatch mask has the outer experts first: (O, ..., I, C).

    Its rows are the slots of the outer experts; how many tokens of the model they hold, shapes do not show.
    """

    def read(
        module: nn.Module, _args: tuple[Any, ...], _kwargs: Mapping[str, Any], output: Any
    ) -> RoutingDecision:
        slots = [t for t in _tensors(output) if t.ndim > 3 and (t.shape[0], t.shape[-2]) == (outer, inner)]
        if not slots:
            raise _unreadable(module, f"a dispatch mask ({outer}, ..., {inner}, slots)", output)
        map_OSI = _dispatched(slots).reshape(outer, -1, inner)
        ids_OI = torch.arange(outer * inner, device=map_OSI.device).reshape(outer, 1, inner)
        ids = torch.where(map_OSI, ids_OI, _NOBODY).reshape(-1, inner)
        return RoutingDecision(expert_ids=ids, is_dispatch=True)

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
        return _local(kwargs[name])
    return _local(args[position]) if position < len(args) else None


def _local(value: Any) -> Any:
    """A tensor of this process; of a tensor spread over ranks (DTensor), this rank's part."""
    to_local = getattr(value, "to_local", None) if isinstance(value, torch.Tensor) else None
    return value if to_local is None else to_local()


def _call_tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """T of a call: rows of its first floating-point argument of two dimensions or more; None without one."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1:
            return int(math.prod(_local(value).shape[:-1]))
    return None


def _mask(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], where: tuple[str, int] | None, tokens: int
) -> torch.Tensor | None:
    """The mask of tokens in a call, (T,) bool; None when there is none of that size."""
    mask = None if where is None else _argument(args, kwargs, where)
    if not isinstance(mask, torch.Tensor) or mask.numel() != tokens:
        return None
    return mask.reshape(-1).ne(0)


def _tensors(output: Any) -> list[torch.Tensor]:
    """Tensors of a module's output, in order; nested containers are not searched."""
    items = output if isinstance(output, (tuple, list)) else (output,)
    return [_local(item) for item in items if isinstance(item, torch.Tensor)]


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


def _dispatched(slots: list[torch.Tensor]) -> torch.Tensor:
    """(..., E) true where a token takes a slot, of tensors (..., E, C): a mask, else all that weigh slots.

    Combine weights may be zero where the dispatch mask of their shape is not, never the other way round.
    """
    masks = [t for t in slots if not t.is_floating_point()][:1] or [
        t for t in slots if t.shape == slots[0].shape
    ]
    return torch.stack([t.ne(0).any(dim=-1) for t in masks]).any(dim=0)


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

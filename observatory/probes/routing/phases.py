"""Which phase a call of a model is, from its mode and its arguments alone.

Known are: training mode with gradients on (``train_forward``); a call that is given a cache with something in
it (``decode``); one that is given an empty cache, or makes one (``prefill``). The virtual tokens that prefix
tuning puts into a cache are not something: a cache of only those is empty. Nothing is ever concluded from the
number of tokens, so a prompt that is fed in chunks counts as ``decode`` after its first chunk unless the
caller says ``watch.phase("prefill")``. Every other call is ``unknown`` for a reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from observatory.probes.routing.carriers import CACHE_NAMES, Carrier
from observatory.probes.routing.counters import SLOTS

#: Endings of the names under which serving code hands caches on that are not transformers' own.
_OTHER_CACHES = (
    *CACHE_NAMES,
    "cache",
    "caches",
    "block_table",
    "block_tables",
    "page_table",
    "page_tables",
    "slot_mapping",
    "attn_metadata",
    "inference_params",
    "inference_context",
    "past",
    "mems",
)
_UNKNOWN, _PREFILL, _DECODE, _TRAIN = range(len(SLOTS))


class Reason(NamedTuple):
    """Why the phase of a call is not known.

    Attributes:
        code: ``length_not_read``: its cache keeps its length on a device. ``foreign_cache``: it was given a
            cache that does not say how full it is. ``no_cache``: it was given none and makes none.
            ``takes_no_cache``: likewise, and it could not take one. ``outside``: a watched layer was called
            outside of any call of the model.
        argument: name of the argument that holds the cache; empty without one.
    """

    code: Literal["length_not_read", "foreign_cache", "no_cache", "takes_no_cache", "outside"]
    argument: str = ""


class CallPhase(NamedTuple):
    """Phase of one call.

    Attributes:
        slot: index into ``SLOTS``.
        reason: why the phase is unknown; None when it is known.
        cache: the cache that the call was given, if it was understood.
    """

    slot: int
    reason: Reason | None = None
    cache: object = None


def phase_of_call(
    carrier: Carrier, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> CallPhase:
    """Phase of a call by itself; ``module`` is the carrier's, or a replica of it."""
    if module.training and torch.is_grad_enabled():
        return CallPhase(_TRAIN)
    given = {**dict(zip(carrier.names, args, strict=False)), **kwargs} if args else kwargs
    known = _known_cache(given)
    name = known or _other_cache(given)
    if name is None:
        return _phase_without_cache(carrier, module, given)
    cache = given[name]
    length = _legacy_length(cache) if known and isinstance(cache, (tuple, list)) else _length(cache)
    if not isinstance(length, int):
        return CallPhase(_UNKNOWN, Reason(length, name))
    if length > 0 and length > carrier.virtual_tokens():
        return CallPhase(_DECODE, None, cache)
    beside = _other_cache(given) if known else None
    if beside is not None:
        return CallPhase(_UNKNOWN, Reason("foreign_cache", beside))
    return CallPhase(_PREFILL, None, cache)


def phase_within(outer: CallPhase, own: CallPhase, carrier: Carrier) -> CallPhase:
    """Phase of a call inside another call of the model.

    It is the outer call's, unless that does not know it for want of a cache, or this call is given or makes a
    cache of its own (a draft model, a depth decoder).
    """
    if outer.slot == _TRAIN:
        return outer
    has_own_cache = bool(own.slot) and own.cache is not outer.cache
    asks_inside = outer.reason is not None and (
        outer.reason.code == "takes_no_cache" or (outer.reason.code == "no_cache" and not carrier.is_encoder)
    )
    return own if has_own_cache or asks_inside else outer


def _known_cache(given: Mapping[str, Any]) -> str | None:
    for name in CACHE_NAMES:
        if given.get(name) is not None:
            return name
    return None


def _other_cache(given: Mapping[str, Any]) -> str | None:
    """Name of the first argument that holds a cache under a name that is not transformers'."""
    for name, value in given.items():
        if value is None or not name.endswith(_OTHER_CACHES) or name in CACHE_NAMES:
            continue
        if not isinstance(value, (bool, int, float, str)):  # a switch or the name of a kind
            return name
    return None


def _phase_without_cache(carrier: Carrier, module: nn.Module, given: Mapping[str, Any]) -> CallPhase:
    if carrier.is_encoder:
        return CallPhase(_PREFILL)
    if not carrier.takes_cache:
        return CallPhase(_UNKNOWN, Reason("takes_no_cache"))
    use_cache = given.get("use_cache")
    if use_cache is None:
        use_cache = getattr(getattr(module, "config", None), "use_cache", None)
    return CallPhase(_PREFILL) if use_cache is True else CallPhase(_UNKNOWN, Reason("no_cache"))


_Length = int | Literal["length_not_read", "foreign_cache"]


def _legacy_length(cache: tuple[Any, ...] | list[Any]) -> _Length:
    """Tokens in a cache of (keys, values) per layer."""
    first = cache[0] if cache else None
    keys = first[0] if isinstance(first, tuple | list) and first else None
    return keys.shape[-2] if isinstance(keys, torch.Tensor) and keys.ndim > 1 else "foreign_cache"


def _length(cache: Any) -> _Length:
    """Tokens in a cache; 1 for a recurrent state that holds something, or why that is not known."""
    if hasattr(cache, "get_seq_length"):
        try:
            length = cache.get_seq_length()
        except (
            Exception
        ):  # one of linear-attention layers only has no length; a foreign one may raise anything
            length = None
        if isinstance(length, torch.Tensor):
            if length.device.type != "cpu" or torch.compiler.is_compiling():
                return "length_not_read"
            return int(length.max())
        if isinstance(length, int):
            return length
    state = getattr(cache, "has_previous_state", None)
    if callable(state):
        try:
            state = state()
        except Exception:  # likewise
            return "foreign_cache"
    return int(state) if isinstance(state, bool) else "foreign_cache"

"""Which phase a call of a model is, from its mode and its arguments alone.

Known are: training mode with gradients on (``train_forward``); a call that is given a cache with something in
it (``decode``); one that is given an empty cache, or makes one (``prefill``). The virtual tokens that prefix
tuning puts into a cache are not something: a cache of only those is empty. Nothing is ever concluded from the
number of tokens, so a prompt that is fed in chunks counts as ``decode`` after its first chunk unless the
caller says ``watch.phase("prefill")``. Every other call is ``unknown`` for a reason.

The modules whose calls show the phase, the *carriers*, are those that are given the cache of a whole forward
pass. Layers take caches as well, but theirs has been written by the layers before them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from observatory.probes.routing.counters import SLOTS
from observatory.probes.routing.words import UnknownPhase

#: Parameters under which models take their cache.
CACHE_NAMES = ("past_key_values", "cache_params", "past_key_value")
#: Parameters of a module that is given the tokens of a forward pass, not the hidden states of a layer.
_TOKEN_NAMES = frozenset(
    ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "tokens")
)
#: Kinds of PEFT adapters whose virtual tokens are in the cache before the first call.
_PREFIXES = ("PREFIX_TUNING", "CARTRIDGE")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Carrier:
    """A module whose calls show the phase.

    Attributes:
        module: the module.
        names: parameters of its ``forward``, in order.
        takes_cache: one of them is a cache.
        is_encoder: it is the encoder of an encoder-decoder model, which has no cache and runs before the
            decoder.
        is_inner: another carrier is around it.
        adapted: the PEFT model around it; None without one.
    """

    module: nn.Module
    names: tuple[str, ...]
    takes_cache: bool
    is_encoder: bool
    is_inner: bool
    adapted: Any

    def virtual_tokens(self) -> int:
        """Tokens that the adapter active now has put into an otherwise empty cache."""
        adapted = self.adapted
        if adapted is None or getattr(adapted, "_adapters_disabled", False):
            return 0
        config = adapted.active_peft_config
        return int(config.num_virtual_tokens) if config.peft_type in _PREFIXES else 0


@dataclass(frozen=True, slots=True)
class _Visited:
    module: nn.Module
    names: tuple[str, ...]
    takes_cache: bool
    is_outermost: bool
    adapted: Any


def find_carriers(model: nn.Module) -> tuple[Carrier, ...]:
    """The model itself, and in it every module that takes a cache and tokens; outer ones first.

    Encoders of encoder-decoder models are carriers too. So is a module that takes a cache and something
    else, if it is the only one that is not inside of another: several of those are layers.
    """
    visited = list(_walk(model, set(), is_outermost=True, adapted=None))
    outermost = [entry.module for entry in visited if entry.takes_cache and entry.is_outermost]
    encoders = {id(encoder) for entry in visited for encoder in _encoder(entry.module)}
    carriers = list[Carrier]()
    for entry in visited:
        is_encoder = id(entry.module) in encoders
        takes_pass = entry.takes_cache and not _TOKEN_NAMES.isdisjoint(entry.names)
        if entry.module is model or is_encoder or takes_pass or outermost == [entry.module]:
            carriers.append(
                Carrier(
                    module=entry.module,
                    names=entry.names,
                    takes_cache=entry.takes_cache,
                    is_encoder=is_encoder,
                    is_inner=entry.module is not model,
                    adapted=entry.adapted,
                )
            )
    return tuple(carriers)


def _walk(module: nn.Module, visited: set[int], *, is_outermost: bool, adapted: Any) -> Iterator[_Visited]:
    if id(module) in visited:
        return
    visited.add(id(module))
    names = _parameters(module)
    takes_cache = any(name in names for name in CACHE_NAMES)
    if hasattr(type(module), "active_peft_config"):
        adapted = module
    yield _Visited(module, names, takes_cache, is_outermost, adapted)
    for child in module.children():
        yield from _walk(child, visited, is_outermost=is_outermost and not takes_cache, adapted=adapted)


def _parameters(module: nn.Module) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):  # compiled to something that has no signature
        return ()


def _encoder(module: nn.Module) -> tuple[nn.Module, ...]:
    """The encoder of an encoder-decoder model, by transformers' interface."""
    if not getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        return ()
    try:
        encoder = module.get_encoder()  # type: ignore[operator]
    except Exception:  # code published with a checkpoint may have none, or one that needs arguments
        return ()
    return (encoder,) if isinstance(encoder, nn.Module) and encoder is not module else ()


class PhaseReason(NamedTuple):
    """Why the phase of a call is not known; a tuple, which compilers follow.

    Attributes:
        code: the reason.
        argument: name of the argument that holds the cache; empty without one.
    """

    code: UnknownPhase
    argument: str = ""


class CallPhase(NamedTuple):
    """Phase of one call.

    Attributes:
        slot: index into ``SLOTS``.
        reason: why the phase is unknown; None when it is known.
        cache: the cache that the call was given, if it was understood.
    """

    slot: int
    reason: PhaseReason | None = None
    cache: object = None


def phase_of_call(
    carrier: Carrier, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> CallPhase:
    """Phase of a call by itself; ``module`` is the carrier's, or a replica of it."""
    if module.training and torch.is_grad_enabled():
        return CallPhase(_TRAIN)
    given = {**dict(zip(carrier.names, args, strict=False)), **kwargs} if args else kwargs
    standard = _standard_cache(given)
    name = standard or _other_cache(given)
    if name is None:
        return _phase_without_cache(carrier, module, given)
    cache = given[name]
    length = _legacy_length(cache) if standard and isinstance(cache, (tuple, list)) else _length(cache)
    if not isinstance(length, int):
        return CallPhase(_UNKNOWN, PhaseReason(length, name))
    if length > 0 and length > carrier.virtual_tokens():
        return CallPhase(_DECODE, None, cache)
    second = _other_cache(given) if standard else None
    if second is not None:
        return CallPhase(_UNKNOWN, PhaseReason(UnknownPhase.FOREIGN_CACHE, second))
    return CallPhase(_PREFILL, None, cache)


def phase_within(outer: CallPhase, inner: CallPhase, carrier: Carrier) -> CallPhase:
    """Phase of a call inside another call of the model.

    It is the outer call's, unless that does not know it for want of a cache, or this call is given or makes a
    cache of its own (a draft model, a depth decoder).
    """
    if outer.slot == _TRAIN:
        return outer
    has_own_cache = bool(inner.slot) and inner.cache is not outer.cache
    asks_inside = outer.reason is not None and (
        outer.reason.code is UnknownPhase.TAKES_NO_CACHE
        or (outer.reason.code is UnknownPhase.NO_CACHE and not carrier.is_encoder)
    )
    return inner if has_own_cache or asks_inside else outer


def _standard_cache(given: Mapping[str, Any]) -> str | None:
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
        return CallPhase(_UNKNOWN, PhaseReason(UnknownPhase.TAKES_NO_CACHE))
    use_cache = given.get("use_cache")
    if use_cache is None:
        use_cache = getattr(getattr(module, "config", None), "use_cache", None)
    return (
        CallPhase(_PREFILL) if use_cache is True else CallPhase(_UNKNOWN, PhaseReason(UnknownPhase.NO_CACHE))
    )


_Length = int | UnknownPhase


def _legacy_length(cache: tuple[Any, ...] | list[Any]) -> _Length:
    """Tokens in a cache of (keys, values) per layer."""
    first = cache[0] if cache else None
    keys = first[0] if isinstance(first, tuple | list) and first else None
    return keys.shape[-2] if isinstance(keys, torch.Tensor) and keys.ndim > 1 else UnknownPhase.FOREIGN_CACHE


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
                return UnknownPhase.LENGTH_NOT_READ
            return int(length.max())
        if isinstance(length, int):
            return length
    state = getattr(cache, "has_previous_state", None)
    if callable(state):
        try:
            state = state()
        except Exception:  # likewise
            return UnknownPhase.FOREIGN_CACHE
    return int(state) if isinstance(state, bool) else UnknownPhase.FOREIGN_CACHE

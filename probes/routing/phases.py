"""Which phase a forward pass is, as far as it is known without being told.

Known are: training mode with gradients on (``train_forward``); a call that is given a cache with something in
it (``decode``); one that is given an empty cache, or makes one (``prefill``). Nothing is ever concluded from
the number of tokens, so a prompt that is fed in chunks counts as ``decode`` after its first chunk unless the
caller says ``watch.phase("prefill")``. The length of a static cache lives on its device and is not read
unless that is the CPU; such calls stay ``unknown`` unless told.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from probes.routing.counters import SLOTS

__all__ = ["CACHE_NAMES", "cache_carrier", "known_slot"]

#: Parameters under which models take their cache.
CACHE_NAMES = ("past_key_values", "cache_params", "past_key_value")
_UNKNOWN, _PREFILL, _DECODE, _TRAIN = range(len(SLOTS))


def cache_carrier(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """The outermost module whose ``forward`` takes a cache, and the names of its parameters in order.

    Wrappers (data parallel, compiled) hand on any arguments, so the model inside them is found. Without such
    a module it is the model itself.
    """
    for module in model.modules():
        names = tuple(inspect.signature(module.forward).parameters)
        if any(name in names for name in CACHE_NAMES):
            return module, names
    return model, ()


def known_slot(
    module: nn.Module, names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> int | None:
    """Slot (index into ``SLOTS``) of a call of the carrier; None when its cache keeps that on a device."""
    if module.training and torch.is_grad_enabled():
        return _TRAIN
    given = {**dict(zip(names, args, strict=False)), **kwargs} if args else kwargs
    cache = next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)
    if cache is not None:
        filled = _is_filled(cache)
        return None if filled is None else (_DECODE if filled else _PREFILL)
    use_cache = given.get("use_cache")
    if use_cache is None:
        use_cache = getattr(getattr(module, "config", None), "use_cache", None)
    takes_cache = any(name in names for name in CACHE_NAMES)
    return _PREFILL if use_cache is True and takes_cache else _UNKNOWN


def _is_filled(cache: Any) -> bool | None:
    """Whether a cache holds anything; None when that cannot be told without asking a device."""
    if isinstance(cache, tuple | list):
        first = cache[0] if cache else None
        keys = first[0] if isinstance(first, tuple | list) and first else None
        return None if not isinstance(keys, torch.Tensor) else keys.ndim > 1 and keys.shape[-2] > 0
    if hasattr(cache, "get_seq_length"):
        try:
            length = cache.get_seq_length()
        except (
            Exception
        ):  # one of linear-attention layers only has no length; a foreign one may raise anything
            length = None
        if isinstance(length, torch.Tensor):
            return bool(length.max() > 0) if length.device.type == "cpu" else None
        if length is not None:
            return bool(length > 0)
    state = getattr(cache, "has_previous_state", None)
    if callable(state):
        try:
            state = state()
        except Exception:  # likewise
            return None
    return state if isinstance(state, bool) else None

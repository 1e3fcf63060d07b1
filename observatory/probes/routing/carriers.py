"""The modules of a model whose calls show the phase: those that are given the cache of a whole forward pass.

Layers take caches as well, but theirs has been written by the layers before them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

#: Parameters under which models take their cache.
CACHE_NAMES = ("past_key_values", "cache_params", "past_key_value")
#: Parameters of a module that is given the tokens of a forward pass, not the hidden states of a layer.
_TOKEN_NAMES = frozenset(
    ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "tokens")
)
#: Kinds of PEFT adapters whose virtual tokens are in the cache before the first call.
_PREFIXES = ("PREFIX_TUNING", "CARTRIDGE")


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
class _Found:
    module: nn.Module
    names: tuple[str, ...]
    takes_cache: bool
    is_outermost: bool
    adapted: Any


def find_carriers(model: nn.Module) -> tuple[Carrier, ...]:
    """The model itself, and in it every module that takes a cache beside tokens; outer ones first.

    Encoders of encoder-decoder models are carriers too. So is a module that takes a cache beside something
    else, if it is the only one that is not inside of another: several of those are layers.
    """
    found = list(_walk(model, set(), is_outermost=True, adapted=None))
    outermost = [entry.module for entry in found if entry.takes_cache and entry.is_outermost]
    encoders = {id(encoder) for entry in found for encoder in _encoder(entry.module)}
    carriers = list[Carrier]()
    for entry in found:
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


def _walk(module: nn.Module, seen: set[int], *, is_outermost: bool, adapted: Any) -> Iterator[_Found]:
    if id(module) in seen:
        return
    seen.add(id(module))
    names = _parameters(module)
    takes_cache = any(name in names for name in CACHE_NAMES)
    if hasattr(type(module), "active_peft_config"):
        adapted = module
    yield _Found(module, names, takes_cache, is_outermost, adapted)
    for child in module.children():
        yield from _walk(child, seen, is_outermost=is_outermost and not takes_cache, adapted=adapted)


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

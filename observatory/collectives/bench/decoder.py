"""Decoder layers that prefill a cache and edit it: what having the data here costs.

Shapes: N new tokens, L layers, C cached tokens, W values of a cache entry, X hidden size, H heads, D values
of a key, V of a result.

    prefill   x -> norm -> queries, entry; entry turned to its position and cached; attention over all that
              is cached so far, causally -> x + projection -> x + gated layer(norm)
    splice    [prefix | span | suffix] -> [prefix | new span | suffix]: the new span's entries, cached
              elsewhere, are turned to their positions, and the suffix to its new ones
    trim      the same text by keeping the prefix and prefilling new span and suffix

A spliced suffix keeps what it took from the old span in deeper layers, as in arXiv 2606.01065: its entries
equal those of the same hidden values at the new positions, which is what is checked. Whether an answer
changes with it is a property of the model, not of these times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from observatory.collectives.bench.cached_attention import attend, turn_entries, turn_queries
from observatory.run.documents.route_fetch import PREFIX_TOKENS, Point, Shape, new_span

#: Values of a size, the same on every rank.
Draw = Callable[..., Tensor]


class Decoder:
    """Layers with random weights."""

    def __init__(self, shape: Shape, layers: int, draw: Draw) -> None:
        assert shape.hidden is not None
        assert shape.inner is not None
        hidden, inner = shape.hidden, shape.inner
        self.shape = shape
        self._query_LXO = draw(layers, hidden, shape.heads * shape.key) * hidden**-0.5
        self._entry_LXW = draw(layers, hidden, shape.entry) * hidden**-0.5
        self._result_LOX = (
            draw(layers, shape.heads * shape.value, hidden) * (shape.heads * shape.value) ** -0.5
        )
        self._gate_LXF, self._up_LXF = (draw(layers, hidden, inner) * hidden**-0.5 for _ in range(2))
        self._down_LFX = draw(layers, inner, hidden) * inner**-0.5

    def prefill(
        self,
        hidden_NX: Tensor,
        cache_LCW: Tensor,
        *,
        start: int,
        shift: int = 0,
        plain_LCW: Tensor | None = None,
    ) -> None:
        """Write the entries of new tokens behind those that are cached.

        Args:
            hidden_NX: the new tokens.
            cache_LCW: the cache; entries before ``start`` are those of the tokens before.
            start: index of the first new token.
            shift: position of the first entry of the cache.
            plain_LCW: takes the same entries before they are turned.
        """
        shape, stop = self.shape, start + len(hidden_NX)
        position_N = torch.arange(start, stop, device=hidden_NX.device) + shift
        for layer, cache_CW in enumerate(cache_LCW):
            normed_NX = _normed(hidden_NX)
            query_NHD = (normed_NX @ self._query_LXO[layer]).view(-1, shape.heads, shape.key)
            entries_NW = normed_NX @ self._entry_LXW[layer]
            if plain_LCW is not None:
                plain_LCW[layer, start:stop] = entries_NW
            turn_entries(entries_NW, position_N, shape)
            cache_CW[start:stop] = entries_NW
            query_NHD = turn_queries(query_NHD, position_N[:, None], shape)
            output_GNV = attend(query_NHD, cache_CW[:stop], shape, causal=True).output
            output_NO = output_GNV.view(shape.kv_heads, len(hidden_NX), -1).transpose(0, 1).flatten(1)
            hidden_NX = hidden_NX + output_NO @ self._result_LOX[layer]
            normed_NX = _normed(hidden_NX)
            gated_NF = functional.silu(normed_NX @ self._gate_LXF[layer]) * (normed_NX @ self._up_LXF[layer])
            hidden_NX = hidden_NX + gated_NF @ self._down_LFX[layer]


def _normed(hidden_NX: Tensor) -> Tensor:
    return functional.rms_norm(hidden_NX, hidden_NX.shape[-1:])


class Edit:
    """One edit: both ways, on caches that are prepared before each."""

    def __init__(self, decoder: Decoder, point: Point, text_NX: Tensor) -> None:
        self.decoder, self.point = decoder, point
        self.new = new_span(point.size)
        before = PREFIX_TOKENS + point.size + point.suffix
        prefix_NX = text_NX[:PREFIX_TOKENS]
        suffix_NX = text_NX[len(text_NX) - point.suffix :]
        span_NX = text_NX[PREFIX_TOKENS : PREFIX_TOKENS + point.size]
        self.fresh_NX = text_NX[PREFIX_TOKENS + point.size :][: self.new]
        self.rest_NX = torch.cat([self.fresh_NX, suffix_NX])
        self.cache_LCW = self._empty(before)
        plain_LCW = self._empty(before)
        decoder.prefill(
            torch.cat([prefix_NX, span_NX, suffix_NX]), self.cache_LCW, start=0, plain_LCW=plain_LCW
        )
        self.elsewhere_LNW, plain_span_LNW = self._empty(self.new), self._empty(self.new)
        decoder.prefill(self.fresh_NX, self.elsewhere_LNW, start=0, plain_LCW=plain_span_LNW)
        kept_LNW = plain_LCW[:, PREFIX_TOKENS + point.size :]
        self.spliced_LCW = torch.cat([plain_LCW[:, :PREFIX_TOKENS], plain_span_LNW, kept_LNW], dim=1)
        self.trimmed_LCW = torch.empty_like(self.spliced_LCW)
        decoder.prefill(torch.cat([prefix_NX, self.rest_NX]), self.trimmed_LCW, start=0)
        for entries_CW in self.spliced_LCW:
            turn_entries(entries_CW, torch.arange(len(entries_CW), device=entries_CW.device), decoder.shape)

    def _empty(self, tokens: int) -> Tensor:
        return torch.empty(
            (self.point.layers, tokens, self.decoder.shape.entry),
            dtype=self.fresh_NX.dtype,
            device=self.fresh_NX.device,
        )

    def splice(self, cache_LCW: Tensor) -> Tensor:
        """Edit a cache in place; the part of it that is now the text."""
        shape = self.decoder.shape
        start, stop = PREFIX_TOKENS, PREFIX_TOKENS + self.point.size
        moved_LNW = torch.cat([self.elsewhere_LNW, cache_LCW[:, stop:]], dim=1)
        for entries, shift in (
            (moved_LNW[:, : self.new], start),
            (moved_LNW[:, self.new :], self.new - self.point.size),
        ):
            for entries_NW in entries:
                turn_entries(entries_NW, torch.tensor(shift, device=entries_NW.device), shape)
        cache_LCW[:, start : start + moved_LNW.shape[1]] = moved_LNW
        return cache_LCW[:, : start + moved_LNW.shape[1]]

    def trim(self, cache_LCW: Tensor) -> Tensor:
        """Keep the prefix and prefill the rest; the part of the cache that is now the text."""
        stop = PREFIX_TOKENS + len(self.rest_NX)
        self.decoder.prefill(self.rest_NX, cache_LCW[:, :stop], start=PREFIX_TOKENS)
        return cache_LCW[:, :stop]


def longest_text(points: Sequence[Point]) -> int:
    """Tokens of hidden values that all edits of a plan need."""
    return max(PREFIX_TOKENS + point.size + new_span(point.size) + point.suffix for point in points)

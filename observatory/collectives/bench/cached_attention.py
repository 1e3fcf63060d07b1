"""Attention over a cached chunk: partial results that merge, and keys that change their position.

Shapes: T query tokens, H heads, G heads of keys and values, C cached tokens, D values of a key, V of a
result, W values of one cache entry.

A partial result over a part of the cache is the output, the largest score and the normaliser (the sum of
exponentials relative to the largest score). Partial results merge in any order to what attention over all
parts gives (online softmax: arXiv 1805.02867; for parts on several devices arXiv 2606.01502).

A rotary embedding turns pairs of values by an angle proportional to the position (arXiv 2104.09864), so that
a score depends on the distance only: an entry cached at position p serves at position p + s after one more
turn by s, and a query at position q scores against unturned entries after a turn by -s. An entry is the keys
of all heads, then their values; a latent entry is its value and a decoupled rotary key, which alone is
turned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from observatory.run.documents.route_fetch import Shape

_BASE = 10_000.0


class Partial(NamedTuple):
    """Attention of rows over a part of the cache: output (G, N, V), largest score and normaliser (G, N)."""

    output: Tensor
    peak: Tensor
    normaliser: Tensor


def turn(values: Tensor, position: Tensor) -> Tensor:
    """Turn pairs (first and second half of the last axis) by their angle at a position.

    Angles are float64: of a position of 4096, float32 would be off by 2e-4 radians.

    Args:
        values: (..., R), R even.
        position: one position, or one for each index of the axes before the last.
    """
    pairs = values.shape[-1] // 2
    exponent = torch.arange(pairs, dtype=torch.float64, device=values.device) / pairs
    angle = position.to(torch.float64)[..., None] * _BASE**-exponent
    cosine, sine = angle.cos().float(), angle.sin().float()
    first, second = torch.split(values.float(), pairs, dim=-1)
    turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    return turned.to(values.dtype)


def keys(entries_CW: Tensor, shape: Shape) -> Tensor:
    """Keys of all heads, a view: (C, G, D)."""
    return entries_CW[:, : shape.kv_heads * shape.key].view(-1, shape.kv_heads, shape.key)


def values(entries_CW: Tensor, shape: Shape) -> Tensor:
    """Values of all heads, a view: (C, G, V)."""
    if shape.is_latent:
        return entries_CW[:, None, : shape.value]
    return entries_CW[:, shape.kv_heads * shape.key :].view(-1, shape.kv_heads, shape.value)


def turn_entries(entries_CW: Tensor, position: Tensor, shape: Shape) -> None:
    """Turn the rotary part of all keys in place: by one shift, or each token by its own, (C,)."""
    rotary_CGR = keys(entries_CW, shape)[..., shape.key - shape.rotary :]
    rotary_CGR.copy_(turn(rotary_CGR, position[:, None] if position.ndim else position))


def turn_queries(query_THD: Tensor, shift: Tensor, shape: Shape) -> Tensor:
    """Queries turned by a shift, or each token by its own, (T, 1).

    Turned by -s they score as if all entries were s positions further on.
    """
    content, rotary = torch.split(query_THD, [shape.key - shape.rotary, shape.rotary], dim=-1)
    return torch.cat([content, turn(rotary, shift)], dim=-1)


def attend(query_THD: Tensor, entries_CW: Tensor, shape: Shape, *, causal: bool = False) -> Partial:
    """Attention of all rows over the given entries; scores and statistics are float32.

    Args:
        query_THD: queries.
        entries_CW: entries.
        shape: of both.
        causal: the queries are of the last T entries, and none attends to entries behind its own.
    """
    tokens, group = query_THD.shape[0], shape.heads // shape.kv_heads
    query_GND = query_THD.view(tokens, shape.kv_heads, group, shape.key).transpose(0, 1).flatten(1, 2)
    score_GNC = torch.matmul(query_GND, keys(entries_CW, shape).permute(1, 2, 0)).float()
    score_GNC *= shape.key**-0.5
    if causal:
        index_N = torch.arange(tokens, device=query_THD.device).repeat_interleave(group)
        entry_C = torch.arange(len(entries_CW), device=query_THD.device)
        is_behind_NC = entry_C > index_N[:, None] + (len(entries_CW) - tokens)
        score_GNC.masked_fill_(is_behind_NC, -torch.inf)
    peak_GN = score_GNC.amax(dim=-1)
    weight_GNC = score_GNC.sub_(peak_GN[..., None]).exp_()
    normaliser_GN = weight_GNC.sum(dim=-1)
    value_GCV = values(entries_CW, shape).transpose(0, 1)
    output_GNV = torch.matmul(weight_GNC.to(value_GCV.dtype), value_GCV)
    return Partial(output_GNV.div_(normaliser_GN[..., None]), peak_GN, normaliser_GN)


def merge(parts: Sequence[Partial]) -> Tensor:
    """Attention over all parts together, (G, N, V)."""
    peak_KGN = torch.stack([part.peak for part in parts])
    weight_KGN = torch.stack([part.normaliser for part in parts])
    weight_KGN = weight_KGN * (peak_KGN - peak_KGN.amax(dim=0)).exp()
    weight_KGN = weight_KGN / weight_KGN.sum(dim=0)
    output = parts[0].output * weight_KGN[0, ..., None]
    for part, weight_GN in zip(parts[1:], weight_KGN[1:], strict=True):
        output += part.output * weight_GN[..., None]
    return output.to(parts[0].output.dtype)


def full_attention(query_THD: Tensor, entries_CW: Tensor, shape: Shape) -> Tensor:
    """The same by the textbook, in float64: what partial results are checked against, (G, N, V)."""
    tokens, group = query_THD.shape[0], shape.heads // shape.kv_heads
    query_GND = query_THD.double().view(tokens, shape.kv_heads, group, -1).transpose(0, 1).flatten(1, 2)
    key_CGD, value_CGV = keys(entries_CW, shape).double(), values(entries_CW, shape).double()
    score_GNC = torch.einsum("gnd,cgd->gnc", query_GND, key_CGD) * shape.key**-0.5
    return torch.einsum("gnc,cgv->gnv", score_GNC.softmax(dim=-1), value_CGV)

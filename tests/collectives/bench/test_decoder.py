from __future__ import annotations

import pytest
import torch

from observatory.cli.parsing import parse_shape
from observatory.collectives.bench.cached_attention import turn_entries
from observatory.collectives.bench.decoder import Decoder, Edit, longest_text
from observatory.run.documents.route_fetch import PREFIX_TOKENS, Point, Shape

SHAPES = [parse_shape(text, decoder=(24, 40)) for text in ("mha:4,16", "gqa:6,2,8", "mla:3,24,8")]


def a_decoder(shape: Shape, layers: int = 2) -> tuple[Decoder, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    return Decoder(shape, layers, draw), draw(200, 24)


def empty(shape: Shape, tokens: int, layers: int = 2) -> torch.Tensor:
    return torch.zeros(layers, tokens, shape.entry)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_a_prefill_in_parts_is_that_of_the_whole(shape: Shape) -> None:
    decoder, text_NX = a_decoder(shape)
    whole, parts = empty(shape, 30), empty(shape, 30)
    decoder.prefill(text_NX[:30], whole, start=0)
    for start, stop in ((0, 7), (7, 8), (8, 30)):
        decoder.prefill(text_NX[start:stop], parts, start=start)
    torch.testing.assert_close(parts, whole)


def test_tokens_behind_change_nothing() -> None:
    decoder, text_NX = a_decoder(SHAPES[0])
    short, long = empty(SHAPES[0], 10), empty(SHAPES[0], 30)
    decoder.prefill(text_NX[:10], short, start=0)
    decoder.prefill(text_NX[:30], long, start=0)
    torch.testing.assert_close(long[:, :10], short)
    other = empty(SHAPES[0], 30)
    decoder.prefill(torch.cat([text_NX[100:101], text_NX[1:30]]), other, start=0)
    assert (other[1, 29] - long[1, 29]).abs().max() > 1e-3, "tokens in front do"


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_only_keys_depend_on_the_position_of_the_whole(shape: Shape) -> None:
    decoder, text_NX = a_decoder(shape)
    here, far = empty(shape, 20), empty(shape, 20)
    decoder.prefill(text_NX[:20], here, start=0)
    decoder.prefill(text_NX[:20], far, start=0, shift=3000)
    for entries_CW in here:
        turn_entries(entries_CW, torch.tensor(3000), shape)
    torch.testing.assert_close(here, far, rtol=1e-3, atol=1e-4)


def test_the_first_layer_by_hand() -> None:
    shape = SHAPES[0]
    decoder, text_NX = a_decoder(shape, layers=1)
    cache, plain = empty(shape, 3, 1), empty(shape, 3, 1)
    decoder.prefill(text_NX[:3], cache, start=0, plain_LCW=plain)
    normed_NX = text_NX[:3] / (text_NX[:3] ** 2).mean(dim=1, keepdim=True).sqrt()
    torch.testing.assert_close(plain[0], normed_NX @ decoder._entry_LXW[0])
    turned = plain[0].clone()
    turn_entries(turned, torch.arange(3), shape)
    torch.testing.assert_close(cache[0], turned)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize(("span", "suffix"), [(1, 1), (6, 20), (40, 3)])
def test_a_splice_moves_entries_and_a_trim_prefills_them(shape: Shape, span: int, suffix: int) -> None:
    point = Point(rows=0, size=span, suffix=suffix, layers=2)
    decoder, text_NX = a_decoder(shape)
    edit = Edit(decoder, point, text_NX[: longest_text([point])])
    spliced = edit.splice(edit.cache_LCW.clone())
    trimmed = edit.trim(edit.cache_LCW.clone())
    new = (span + 1) // 2
    assert spliced.shape[1] == trimmed.shape[1] == PREFIX_TOKENS + new + suffix
    torch.testing.assert_close(spliced, edit.spliced_LCW, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trimmed, edit.trimmed_LCW)
    # In the first layer an entry is made of its own token and position alone: both ways agree.
    torch.testing.assert_close(spliced[0], trimmed[0], rtol=1e-4, atol=1e-5)
    assert (spliced[1, -1] - trimmed[1, -1]).abs().max() > 1e-4, "deeper, the suffix keeps the old span"

from __future__ import annotations

import pytest
import torch

from observatory.cli.parsing import parse_shape
from observatory.collectives.bench.cached_attention import (
    attend,
    full_attention,
    keys,
    merge,
    turn,
    turn_entries,
    turn_queries,
)
from observatory.run.documents.route_fetch import Shape

SHAPES = [parse_shape(text) for text in ("mha:4,16", "gqa:6,2,8", "mla:3,24,8", "sparse:3,24,8,5")]


def drawn(shape: Shape, tokens: int, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    query_THD = torch.randn(tokens, shape.heads, shape.key, generator=generator)
    return query_THD, torch.randn(chunk, shape.entry, generator=generator)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("cuts", [(30,), (1, 30), (7, 8, 20, 30)])
def test_partial_results_merge_to_full_attention_in_any_order(shape: Shape, cuts: tuple[int, ...]) -> None:
    query_THD, entries_CW = drawn(shape, 5, 30)
    parts = [
        attend(query_THD, entries_CW[start:stop], shape)
        for start, stop in zip((0, *cuts[:-1]), cuts, strict=True)
    ]
    expected = full_attention(query_THD, entries_CW, shape).float()
    torch.testing.assert_close(merge(parts), expected)
    torch.testing.assert_close(merge(parts[::-1]), expected)


def test_a_score_that_overflows_alone_does_not_overflow_in_a_partial_result() -> None:
    shape = parse_shape("mha:1,2")
    query_THD = torch.full((1, 1, 2), 200.0)
    entries_CW = torch.tensor([[200.0, 200.0, 1.0, 2.0], [-200.0, -200.0, 3.0, 4.0]])
    parts = [attend(query_THD, entries_CW[:1], shape), attend(query_THD, entries_CW[1:], shape)]
    torch.testing.assert_close(merge(parts), torch.tensor([[[1.0, 2.0]]]))


def test_a_quarter_turn_by_hand() -> None:
    # One pair turns by one radian for each position: (1, 0) at position 1 is (cos 1, sin 1).
    turned = turn(torch.tensor([1.0, 0.0]), torch.tensor(1))
    torch.testing.assert_close(turned, torch.tensor([0.5403023, 0.8414710]))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_turned_entries_are_those_of_the_new_positions(shape: Shape) -> None:
    _, entries_CW = drawn(shape, 1, 30)
    cached_CW, wanted_CW = entries_CW.clone(), entries_CW.clone()
    turn_entries(cached_CW, torch.arange(30), shape)
    turn_entries(wanted_CW, torch.arange(30) + 5000, shape)
    turn_entries(cached_CW, torch.tensor(5000), shape)
    torch.testing.assert_close(cached_CW, wanted_CW, rtol=1e-4, atol=1e-5)
    untouched = shape.key - shape.rotary
    assert torch.equal(keys(cached_CW, shape)[..., :untouched], keys(entries_CW, shape)[..., :untouched])


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_a_turned_query_scores_like_a_turned_cache(shape: Shape) -> None:
    query_THD, entries_CW = drawn(shape, 4, 30)
    moved_CW = entries_CW.clone()
    turn_entries(moved_CW, torch.tensor(70), shape)
    fetched = attend(query_THD, moved_CW, shape).output
    routed = attend(turn_queries(query_THD, torch.tensor(-70), shape), entries_CW, shape).output
    torch.testing.assert_close(routed, fetched, rtol=1e-4, atol=1e-5)
    unmoved = attend(query_THD, entries_CW, shape).output
    assert (unmoved - fetched).abs().max() > 0.01, "the position matters"

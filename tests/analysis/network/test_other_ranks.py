"""Predictions for numbers of ranks that were not measured: what tells how good they are, and what cannot."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from observatory.analysis.network import NetworkModel, fit_network, predict_us
from observatory.analysis.network.checking import check_predictions
from observatory.analysis.network.words import NetworkCode, sentence
from tests.analysis.network.synthetic import made_result

Truth = Callable[[NDArray[np.int64], tuple[int, ...]], float]


def own_hosts(ranks: int) -> tuple[int, ...]:
    return tuple(range(ranks))


def busiest(bytes_PP: NDArray[np.int64]) -> float:
    moved = bytes_PP - np.diag(np.diagonal(bytes_PP))
    return float(max(moved.sum(axis=0).max(), moved.sum(axis=1).max()))


def per_peer(bytes_PP: NDArray[np.int64], _: tuple[int, ...]) -> float:
    """50 us, 200 us for every other rank, 1 GB/s."""
    return 50.0 + 200.0 * (len(bytes_PP) - 1) + busiest(bytes_PP) / 1e3


def gloo_like(bytes_PP: NDArray[np.int64], _: tuple[int, ...]) -> float:
    """The longer of 300 us per peer, and bytes at 1 GB/s of which two-way ones pass at half of it."""
    moved = bytes_PP - np.diag(np.diagonal(bytes_PP))
    link = np.maximum(moved.sum(axis=0), moved.sum(axis=1)) + np.minimum(moved, moved.T).sum(axis=1)
    return float(max(300.0 * (len(bytes_PP) - 1), link.max() / 1e3))


def squared(bytes_PP: NDArray[np.int64], _: tuple[int, ...]) -> float:
    """Latency that grows with the square of the ranks, which no form knows across hosts."""
    return 100.0 * len(bytes_PP) ** 2 + busiest(bytes_PP) / 1e3


def fitted(truth: Truth, numbers: Sequence[int], noise: float = 0.02) -> NetworkModel:
    return fit_network([made_result(truth, own_hosts(ranks), noise=noise) for ranks in numbers], bootstrap=20)


@pytest.mark.parametrize("truth", [per_peer, gloo_like])
@pytest.mark.parametrize("ranks", [4, 8])
def test_three_numbers_of_ranks_tell_what_grows_with_them(truth: Truth, ranks: int) -> None:
    model = fitted(truth, [3, 5, 6])
    held_out = model.of("flat").held_out_ranks
    assert [item.ranks for item in held_out] == [3, 5, 6]
    assert max(item.median_error for item in held_out) < 0.05
    other = made_result(truth, own_hosts(ranks), seeds=1)
    checked = check_predictions(model, other)
    assert checked["error"].median() < 0.02
    assert checked["error"].quantile(0.9) < 0.07


def test_one_number_of_ranks_cannot_tell_and_says_so() -> None:
    model = fitted(per_peer, [2])
    fit = model.of("flat")
    assert fit.held_out_ranks == ()
    assert fit.other_ranks_ratio_Q is None
    assert all(score.other_ranks_error is None for score in fit.scores)
    empty = predict_us(model, np.zeros((4, 4)), own_hosts(4))
    assert empty.us == pytest.approx(per_peer(np.zeros((2, 2)), (0, 1)), rel=0.1), (
        "EP 2's latency, not EP 4's"
    )
    assert "4 ranks (measured 2)" in map(sentence, empty.extrapolated)


def test_between_two_numbers_of_ranks_nothing_tells_how_good_a_prediction_is() -> None:
    two, three = fitted(per_peer, [3, 6]), fitted(per_peer, [3, 5, 6])
    bytes_PP = np.full((4, 4), 1000)
    (reason,) = predict_us(two, bytes_PP, own_hosts(4)).extrapolated[:1]
    assert sentence(reason) == "4 ranks (measured 3 and 6; a third number would show how well others fit)"
    codes = {item.code for item in predict_us(three, bytes_PP, own_hosts(4)).extrapolated}
    assert not codes & {NetworkCode.RANKS_OUTSIDE, NetworkCode.RANKS_BETWEEN}


def test_the_interval_for_another_number_of_ranks_holds_what_the_form_gets_wrong_there() -> None:
    model = fitted(squared, [3, 5, 6], noise=0.05)
    for ranks in (4, 6):
        inside = []
        for case in made_result(squared, own_hosts(ranks), seeds=1, noise=0.05).cases:
            found = predict_us(model, case.bytes_PP, own_hosts(ranks))
            inside.append(found.low_us <= case.median_us <= found.high_us)
        assert np.mean(inside) > 0.8
    small = np.full((6, 6), 16)

    def width(numbers: int) -> float:
        found = predict_us(model, small[:numbers, :numbers], own_hosts(numbers))
        return (found.high_us - found.low_us) / found.us

    assert width(4) > 1.2 * width(5), "5 was measured, 4 was not"

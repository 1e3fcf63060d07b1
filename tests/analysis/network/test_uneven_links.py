"""Real links that are not alike: what does not fit is said, never predicted in silence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from observatory.analysis.network import NetworkModel, fit_network
from observatory.analysis.network.checking import check_predictions
from observatory.collectives.bench.measure import alltoall_plan
from observatory.run.documents.bench import BenchResult
from tests.analysis.network.shaped import Link, run_on_nodes, shaped_nodes, why_not

USUAL_MBIT = 40.0
SLOW = Link(up_mbit=8.0, down_mbit=8.0)
UNEVEN = Link(up_mbit=40.0, down_mbit=8.0)

pytestmark = [pytest.mark.slow, pytest.mark.timing]


@pytest.fixture(autouse=True)
def namespaces() -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)


def measure(ranks: int, others: Mapping[int, Link], folder: Path) -> BenchResult:
    """One rank on each node; sizes are beyond what a token bucket lets pass at once."""
    plan = alltoall_plan(
        ranks=ranks,
        sizes_bytes=[32 << 10, 128 << 10],
        patterns=["uniform", "routed", "skewed", "random", "sparse", "empty"],
        algorithms=["flat"],
        seeds=range(3),
        warmup=1,
        repeats=3,
    )
    with shaped_nodes(ranks, rate_mbit=USUAL_MBIT, others=others) as names:
        return run_on_nodes(plan, names, ranks_on_node=1, folder=folder, timeout_s=280.0)


def fitted(results: list[BenchResult]) -> NetworkModel:
    return fit_network(results, bootstrap=0)


def test_a_rank_on_a_slow_link_is_named(tmp_path: Path) -> None:
    fit = fitted([measure(ranks, {1: SLOW}, tmp_path) for ranks in (4, 5)]).of("flat")
    assert fit.misfits
    assert {misfit.who for misfit in fit.misfits} == {(1,)}, fit.misfits
    assert all(misfit.code.startswith("rank") for misfit in fit.misfits)
    assert all(misfit.factor > 2.0 for misfit in fit.misfits)


def test_links_that_all_receive_slower_name_no_rank_and_are_not_mispredicted_in_silence(
    tmp_path: Path,
) -> None:
    model = fitted([measure(ranks, dict.fromkeys(range(ranks), UNEVEN), tmp_path) for ranks in (3, 5)])
    fit = model.of("flat")
    assert fit.misfits == ()
    assert fit.verdict is not None
    checked = check_predictions(model, measure(4, dict.fromkeys(range(4), UNEVEN), tmp_path))
    assert fit.verdict.code != "valid" or checked["error"].quantile(0.9) < 0.5

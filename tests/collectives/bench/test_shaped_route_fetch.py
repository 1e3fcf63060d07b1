"""Route and fetch between two hosts whose link has a known rate."""

from __future__ import annotations

import pytest

from observatory.analysis.route_fetch.fitting import fit_shape, hold_out_points
from observatory.cli.parsing import parse_shape
from observatory.collectives.bench.route_fetch_plan import route_fetch_plan
from observatory.run.documents.route_fetch import RouteFetchResult, load_route_fetch
from tests.analysis.network.shaped import run_ranks, shaped_nodes, why_not

pytestmark = [pytest.mark.slow, pytest.mark.timing]

RATE_MBIT = 100.0


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> RouteFetchResult:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    plan = route_fetch_plan(
        [parse_shape("mla:4,128,32"), parse_shape("expert:256")],
        points=32,
        rows=(8, 500),
        sizes=(8, 500),
        layers=(1, 2),
        warmup=1,
        repeats=5,
    )
    with shaped_nodes(2, rate_mbit=RATE_MBIT, mtu_bytes=1500, burst_s=0.0) as names:
        folder = tmp_path_factory.mktemp("shaped")
        return load_route_fetch(run_ranks(plan, names, ranks_on_node=1, folder=folder, timeout_s=200.0))


@pytest.mark.parametrize("shape", [0, 1], ids=["mla", "expert"])
def test_a_byte_takes_what_the_link_gives_it_or_what_a_late_timer_of_its_bucket_leaves(
    measured: RouteFetchResult, shape: int
) -> None:
    assert all(case.correct for case in measured.cases)
    _, out_us, back_us = fit_shape(measured, shape, bootstrap=0).stages["transfer"].us_F
    for byte_us in (out_us, back_us):
        assert 0.95 * 8 / RATE_MBIT < byte_us < 1.6 * 8 / RATE_MBIT


@pytest.mark.parametrize("shape", [0, 1], ids=["mla", "expert"])
def test_the_faster_option_is_picked_at_points_that_were_held_out(
    measured: RouteFetchResult, shape: int
) -> None:
    held_out = hold_out_points(measured, shape)
    predicted, fastest, apart, _ = held_out.winners(("route", "fetch"))
    assert set(fastest[apart].tolist()) == {0, 1}
    assert (predicted == fastest)[apart].mean() >= 0.9
    above = held_out.mape(("route", "fetch"), above=True)
    assert above is not None
    assert above < 0.15

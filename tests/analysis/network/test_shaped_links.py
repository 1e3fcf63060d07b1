"""The fit against links whose rate is known: namespaces joined by veth pairs behind token buckets."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest

from observatory.analysis.network import fit_network, predict_us
from observatory.run.documents.bench import BenchPlan, BenchResult, Traffic
from tests.analysis.network.shaped import run_on_nodes, shaped_nodes, why_not

pytestmark = [pytest.mark.slow, pytest.mark.timing]

RATES_MBIT = (30.0, 120.0)
#: A result and the microseconds that one byte takes on its links.
Measured = tuple[BenchResult, float]


def one_way_plan(us_per_byte: float, seed: int = 0) -> BenchPlan:
    """Matrices of 2 + 2 ranks: node 0 sends to node 1, from one rank or both, and all send inside their
    nodes.

    What crosses takes the link 16 to 64 ms, which is long beside scheduling; what crosses and what stays is
    drawn separately, so that the two can be distinguished. Nothing goes back: gloo announces receive buffers
    against the stream, which puts them at the end of the queue.
    """
    generator = np.random.default_rng(seed)
    traffic = []
    for index in range(12):
        crossing_us, staying_us = np.exp(generator.uniform(np.log([16e3, 2e3]), np.log([64e3, 32e3])))
        share_PP = generator.exponential(size=(4, 4))
        share_PP[2:, :2] = 0.0
        if index % 4 == 0:
            share_PP[generator.integers(2), 2:] = 0.0
        across = np.zeros((4, 4), dtype=bool)
        across[:2, 2:] = True
        share_PP[across] *= crossing_us / us_per_byte / share_PP[across].sum()
        share_PP[~across] *= staying_us / us_per_byte / share_PP[~across].sum()
        matrix = tuple(map(tuple, share_PP.astype(int).tolist()))
        traffic.append(Traffic(pattern="one-way", seed=index, send_bytes_PP=matrix))
    return BenchPlan(
        kind="alltoall", algorithms=("flat",), warmup=1, repeats=9, iterations=1, traffic=tuple(traffic)
    )


@pytest.fixture(scope="module", params=RATES_MBIT, ids="{:g}-mbit".format)
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """Two ranks on each of two nodes behind links of a known rate."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with shaped_nodes(2, rate_mbit=request.param) as names:
        result = run_on_nodes(
            one_way_plan(8.0 / request.param),
            names,
            ranks_on_node=2,
            folder=tmp_path_factory.mktemp("shaped"),
            timeout_s=120.0,
        )
    return result, 8.0 / request.param


def test_the_fit_recovers_the_rate_of_the_link_within_5_percent(measured: Measured) -> None:
    result, us_per_byte = measured
    assert all(case.correct for case in result.cases)
    model = fit_network([result], bootstrap=0)
    # What 32 ms more of traffic cost, whichever terms of the chosen form say so.
    bytes_PP = np.zeros((4, 4), dtype=np.int64)
    bytes_PP[:2, 2:] = round(32e3 / us_per_byte / 4)
    more_us = predict_us(model, 2 * bytes_PP, (0, 0, 1, 1)).us - predict_us(model, bytes_PP, (0, 0, 1, 1)).us
    assert more_us / int(bytes_PP.sum()) == pytest.approx(us_per_byte, rel=0.05), model.of("flat").scores


def test_ranks_of_a_node_share_its_link_in_the_chosen_form(measured: Measured) -> None:
    result, us_per_byte = measured
    model = fit_network([result], bootstrap=0)
    # Both ranks of node 0 send 500 kB: together the link needs twice as long as for one.
    bytes_PP = np.zeros((4, 4), dtype=np.int64)
    bytes_PP[0, 2] = bytes_PP[1, 3] = 500_000
    both = predict_us(model, bytes_PP, (0, 0, 1, 1)).us
    bytes_PP[1, 3] = 0
    one = predict_us(model, bytes_PP, (0, 0, 1, 1)).us
    assert both - one == pytest.approx(500_000 * us_per_byte, rel=0.1)


def test_nothing_of_the_namespaces_is_left() -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with shaped_nodes(1, rate_mbit=100) as (name,):
        assert name in _namespaces()
    assert name not in _namespaces()
    assert name.removesuffix("-n0") not in _namespaces()


def _namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout

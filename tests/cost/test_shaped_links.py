"""The fit against links whose rate is known: namespaces joined by veth pairs behind token buckets."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest

from observatory.cost import fit_network, predict_us
from observatory.records_bench import BenchPlan, Traffic
from tests.cost.shaped import run_on_nodes, shaped_nodes, why_not

RATE_MBIT = 200.0
US_PER_BYTE = 8.0 / RATE_MBIT


def one_way_plan(seed: int = 0) -> BenchPlan:
    """Matrices of 2 + 2 ranks: node 0 sends to node 1, from one rank or both, and all send inside their
    nodes.

    What crosses and what stays is drawn separately, so that the two can be told apart. Nothing goes back:
    gloo announces receive buffers against the stream, which a plain token bucket puts at the end of the
    queue.
    """
    generator = np.random.default_rng(seed)
    traffic = []
    for index in range(16):
        crossing, staying = np.exp(generator.uniform(np.log([200_000, 1_000]), np.log([800_000, 300_000])))
        share_PP = generator.exponential(size=(4, 4))
        share_PP[2:, :2] = 0.0
        if index % 4 == 0:
            share_PP[generator.integers(2), 2:] = 0.0
        across = np.zeros((4, 4), dtype=bool)
        across[:2, 2:] = True
        share_PP[across] *= crossing / share_PP[across].sum()
        share_PP[~across] *= staying / share_PP[~across].sum()
        matrix = tuple(map(tuple, share_PP.astype(int).tolist()))
        traffic.append(Traffic(pattern="one-way", seed=index, send_bytes_PP=matrix))
    return BenchPlan(
        kind="alltoall", algorithms=("flat",), warmup=1, repeats=3, iterations=6, traffic=tuple(traffic)
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory):
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with shaped_nodes(2, rate_mbit=RATE_MBIT) as names:
        return run_on_nodes(one_way_plan(), names, ranks_on_node=2, folder=tmp_path_factory.mktemp("shaped"))


def test_the_fit_recovers_the_rate_of_the_link_within_5_percent(measured) -> None:
    fit = fit_network([measured], bootstrap=50).of("flat")
    assert all(case.correct for case in measured.cases)
    per_byte = {item.term: item.us_per_unit or 0.0 for item in fit.coefficients}
    link = sum(per_byte.get(term, 0.0) for term in ("link_bytes", "link_both"))
    assert link == pytest.approx(US_PER_BYTE, rel=0.05), fit.model_dump(exclude={"samples_BF"})
    assert fit.domain.nodes == (2,)


def test_ranks_of_a_node_share_its_link_in_the_chosen_form(measured) -> None:
    model = fit_network([measured], bootstrap=0)
    # Both ranks of node 0 send 500 kB: alone that takes 20 ms, together the link needs 40.
    bytes_PP = np.zeros((4, 4), dtype=np.int64)
    bytes_PP[0, 2] = bytes_PP[1, 3] = 500_000
    both = predict_us(model, bytes_PP, (0, 0, 1, 1)).us
    bytes_PP[1, 3] = 0
    one = predict_us(model, bytes_PP, (0, 0, 1, 1)).us
    assert both - one == pytest.approx(500_000 * US_PER_BYTE, rel=0.1)


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

"""Experts that do not fit: what caches and fetches ahead cost, on traces with known hit rates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from observatory.advice.mitigations.lab import Lab
from observatory.advice.mitigations.memory_changes import expert_cache
from observatory.advice.mitigations.setup import Setup
from observatory.advice.mitigations.timed import Models, Trace
from observatory.advice.mitigations.verdict import Mitigation, MitigationCode, Verdict, VerdictCode
from observatory.analysis.parallel.balancing import linear_layout
from observatory.analysis.parallel.step_loads import StepLoads
from observatory.analysis.parallel.token_samples import LayerTokens
from tests.advice.mitigations.test_changes import EXPERTS, expert_cost

STEPS, RANKS, LAYERS = 160, 4, 2
#: An expert of a layer takes a thousandth of a second from the host.
HOST = {"host_bytes_per_s": 1e6}


def lab_of_experts(chosen_SLK: np.ndarray, *, samples: bool = False, row_s: float = 0.0, **setup: Any) -> Lab:
    """Steps of as many equal tokens, whose experts are given for each layer, (S, L, K)."""
    load_SLE = np.zeros((STEPS, LAYERS, EXPERTS), dtype=np.int64)
    np.put_along_axis(load_SLE, chosen_SLK, 8, axis=2)
    step_T, position_T = np.divmod(np.arange(8 * STEPS), 8)
    tokens = [
        LayerTokens(
            experts_TK=chosen_SLK[step_T, layer],
            step_T=step_T,
            source_T=np.zeros_like(step_T),
            position_T=position_T,
        )
        for layer in range(LAYERS)
    ]
    trace = Trace(
        phase="decode",
        loads=StepLoads(
            layers=(0, 1),
            top_k=chosen_SLK.shape[2],
            phase_S=("decode",) * STEPS,
            load_SLE=load_SLE,
            load_SLRE=load_SLE[:, :, None, :],
        ),
        train_steps=STEPS // 2,
        judged_S=np.arange(STEPS // 2, STEPS),
        today_LPK=linear_layout(LAYERS, EXPERTS, RANKS),
        named_today="linear",
        tokens=tokens if samples else None,
        shared_experts=0,
        sequence_tokens=None,
    )
    models = Models(experts=expert_cost(row_s=row_s), network=None, horizon_steps=10_000)
    return Lab(trace, Setup(ranks=RANKS, gpus_per_node=4, **setup), models)


def on_each_rank(at_S: np.ndarray) -> np.ndarray:
    """One expert of each rank, the same place on all, in both layers."""
    chosen_SK = at_S[:, None] + np.arange(RANKS) * (EXPERTS // RANKS)
    return np.repeat(chosen_SK[:, None], LAYERS, axis=1)


def premise_of(verdict: Verdict, code: MitigationCode) -> tuple[bool | None, dict[str, Any]]:
    assert verdict.premise is not None
    assert verdict.premise.reason.code is code
    return verdict.premise.holds, dict(verdict.premise.reason.values)


def test_an_expert_that_serves_four_steps_is_fetched_once_in_four() -> None:
    # Four experts of 1000 bytes in two layers; two of each layer fit.
    lab = lab_of_experts(on_each_rank(np.arange(STEPS) // 4 % 4), memory_bytes=4000.0, **HOST)
    most, last, ahead = expert_cache(lab)
    assert (most.setting, last.setting) == ("2 of 4, most used", "2 of 4, last used")
    assert most.code is VerdictCode.NEEDED
    # All are used alike: half of the steps miss in both layers. By recency one step of four does.
    assert most.parts_us["extra"] == pytest.approx(1000.0)
    assert last.parts_us["extra"] == pytest.approx(500.0)
    assert last.code is VerdictCode.CHANGE
    assert last.beyond is not None
    assert last.beyond.value == pytest.approx(0.5)
    holds, shown = premise_of(last, MitigationCode.USED_AGAIN)
    assert holds
    assert shown["hit"] == pytest.approx(0.75)
    # The last two of four that come in random order.
    assert shown["shuffled"] == pytest.approx(0.5, abs=0.06)
    assert ahead.code is VerdictCode.NOT_KNOWN
    assert ahead.reason is not None
    assert ahead.reason.code is MitigationCode.NO_TOKENS


def test_experts_in_random_order_are_not_used_again_and_turns_are_worse() -> None:
    random = lab_of_experts(
        on_each_rank(np.random.default_rng(1).integers(0, 4, STEPS)), memory_bytes=4000.0, **HOST
    )
    holds, _ = premise_of(list(expert_cache(random))[1], MitigationCode.USED_AGAIN)
    assert holds is False
    turns = lab_of_experts(on_each_rank(np.arange(STEPS) % 4), memory_bytes=4000.0, **HOST)
    assert list(expert_cache(turns))[1].code is VerdictCode.WORSE


@pytest.mark.parametrize("follows", [True, False])
def test_experts_are_fetched_ahead_where_a_layer_predicts_the_next(*, follows: bool) -> None:
    generator = np.random.default_rng(0)
    first_S = generator.integers(0, 4, STEPS)
    second_S = (first_S + 1) % 4 if follows else generator.integers(0, 4, STEPS)
    chosen_SLK = np.stack([on_each_rank(first_S)[:, 0], on_each_rank(second_S)[:, 0]], axis=1)
    # A layer computes for 1.6 ms: one expert arrives meanwhile.
    lab = lab_of_experts(chosen_SLK, samples=True, row_s=2e-4, memory_bytes=3000.0, **HOST)
    most, _, ahead = expert_cache(lab)
    assert ahead.mitigation is Mitigation.EXPERT_PREFETCH
    assert ahead.setting == "1 of 4, 1 ahead"
    holds, shown = premise_of(ahead, MitigationCode.NEXT_PREDICTED)
    assert holds is follows
    if follows:
        assert shown["recall"] == 1.0
        # Only the first layer waits, in the steps whose expert is not the one that is kept.
        assert ahead.parts_us["extra"] < 0.6 * most.parts_us["extra"]
        assert ahead.code is VerdictCode.CHANGE


def test_what_arrives_late_is_waited_for() -> None:
    first_S = np.arange(STEPS) % 4
    chosen_SLK = on_each_rank(first_S)
    lab = lab_of_experts(chosen_SLK, samples=True, row_s=1e-5, memory_bytes=3000.0, **HOST)
    ahead = list(expert_cache(lab))[2]
    # A layer of 80 us, an expert of 1000: 920 late; the first layer misses three of four.
    assert ahead.parts_us["extra"] == pytest.approx(920 + 750)


def test_what_fits_needs_no_cache_and_what_is_not_stated_is_named() -> None:
    chosen_SLK = on_each_rank(np.arange(STEPS) % 4)
    for setup, code in (
        ({}, MitigationCode.NO_MEMORY),
        ({"memory_bytes": 8000.0, **HOST}, MitigationCode.EXPERTS_DO_NOT_FIT),
        ({"memory_bytes": 7000.0}, MitigationCode.NO_HOST_RATE),
    ):
        (only,) = expert_cache(lab_of_experts(chosen_SLK, **setup))
        assert only.reason is not None
        assert only.reason.code is code

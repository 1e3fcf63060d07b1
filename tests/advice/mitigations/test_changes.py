"""Verdicts on traces whose best answers are known before anything is computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from observatory.advice.mitigations.advise import CHANGES, held_to
from observatory.advice.mitigations.balance_changes import placement
from observatory.advice.mitigations.lab import Lab
from observatory.advice.mitigations.setup import Setup
from observatory.advice.mitigations.timed import Models, Trace
from observatory.advice.mitigations.verdict import Mitigation, MitigationCode, Verdict, VerdictCode
from observatory.analysis.experts.cost import ExpertCost
from observatory.analysis.network.network import NetworkModel
from observatory.analysis.parallel.balancing import linear_layout
from observatory.analysis.parallel.step_loads import StepLoads
from observatory.analysis.parallel.token_samples import LayerTokens
from observatory.run.documents.expert_bench import ExpertShape
from tests.analysis.experts.models import cost, network

EXPERTS, STEPS, SOURCES = 16, 40, 4
SHAPE = ExpertShape(hidden=8, intermediate=16, experts=EXPERTS, top_k=2, dtype="float32", expert_bytes=1000)


def expert_cost(**coefficients: Any) -> ExpertCost:
    return cost(**coefficients, shape=SHAPE, most_assignments=10**6, most_activated=EXPERTS, most_rows=10**6)


def lab_of(
    share_E: Any,
    *,
    experts: ExpertCost | None = None,
    exchanges: NetworkModel | None = None,
    tokens: int = 4000,
    horizon_steps: int = 10_000,
    samples: list[LayerTokens] | None = None,
    phase: str = "prefill",
    **setup: Any,
) -> Lab:
    """A trace of two layers whose experts have these shares in every step, apart from chance."""
    generator = np.random.default_rng(0)
    share = np.asarray(share_E, dtype=float) / np.sum(share_E)
    load_SLRE = generator.multinomial(2 * tokens // SOURCES, share, size=(STEPS, 2, SOURCES))
    loads = StepLoads(
        layers=(0, 1),
        top_k=2,
        phase_S=(phase,) * STEPS,
        load_SLE=load_SLRE.sum(axis=2),
        load_SLRE=load_SLRE,
    )
    trace = Trace(
        phase=phase,
        loads=loads,
        train_steps=STEPS // 2,
        judged_S=np.arange(STEPS // 2, STEPS),
        today_LPK=linear_layout(2, EXPERTS, 4),
        named_today="linear",
        tokens=samples,
        shared_experts=0,
        sequence_tokens=None,
    )
    models = Models(
        experts=experts or expert_cost(row_s=1e-6), network=exchanges, horizon_steps=horizon_steps
    )
    given = {"ranks": 4, "gpus_per_node": 2, "move_bytes_per_s": 1e9, **setup}
    return Lab(trace, Setup(**given), models)


def verdicts(lab: Lab) -> dict[Mitigation, Verdict]:
    """The first verdict on each change."""
    found: dict[Mitigation, Verdict] = {}
    for change in CHANGES:
        for verdict in change(lab):
            found.setdefault(verdict.mitigation, verdict)
    return found


#: The first rank has half of all load, in four equal experts.
SKEWED = [4] * 4 + [4 / 3] * 12


def test_experts_that_crowd_on_one_rank_are_spread_and_the_gain_is_that_of_the_arithmetic() -> None:
    found = verdicts(lab_of(SKEWED))
    placed = found[Mitigation.PLACEMENT]
    assert placed.code is VerdictCode.CHANGE
    # The busiest rank has 1/2 of the load today and 1/4 afterwards: half of the time.
    assert placed.gain is not None
    assert placed.gain.value == pytest.approx(0.5, abs=0.02)
    assert placed.premise is not None
    assert placed.premise.holds
    balanced = found[Mitigation.PERFECT_BALANCE]
    assert balanced.gain is not None
    assert balanced.gain.value == pytest.approx(0.5, abs=0.01)
    # Nothing is left for replicas, and a plan of each step costs more than it wins.
    assert found[Mitigation.REPLICAS].code in (VerdictCode.NO_GAIN, VerdictCode.WORSE)


def test_nothing_is_worth_changing_where_all_experts_are_alike() -> None:
    found = verdicts(lab_of(np.ones(EXPERTS), exchanges=network(latency_us=10.0, us_per_byte=1e-3)))
    for mitigation in (Mitigation.PLACEMENT, Mitigation.REPLICAS, Mitigation.PER_STEP_DISPATCH):
        assert found[mitigation].code in (VerdictCode.NO_GAIN, VerdictCode.WORSE), mitigation
    assert found[Mitigation.SPILL].code is VerdictCode.NOT_APPLICABLE


def test_where_one_expert_outweighs_a_rank_only_replicas_help() -> None:
    found = verdicts(lab_of([30, *[2] * 15]))
    # The largest expert has half of the load: no layout without copies is below 2 times the mean.
    assert found[Mitigation.REPLICAS].code is VerdictCode.CHANGE
    premise = found[Mitigation.REPLICAS].premise
    assert premise is not None
    assert premise.holds
    assert premise.reason.code is MitigationCode.ONE_EXPERT_DECIDES
    placed, copied = found[Mitigation.PLACEMENT].gain, found[Mitigation.REPLICAS].gain
    assert placed is not None
    assert copied is not None
    assert placed.value < 0.2 < copied.value


def test_a_change_that_does_not_pay_within_the_horizon_is_not_advised() -> None:
    slow = {"move_bytes_per_s": 100.0, "stall_s": 60.0}
    paid = verdicts(lab_of(SKEWED, **slow))[Mitigation.PLACEMENT]
    assert paid.code is VerdictCode.DOES_NOT_PAY or (paid.break_even_steps or 0) <= 10_000
    short = verdicts(lab_of(SKEWED, horizon_steps=10, **slow))[Mitigation.PLACEMENT]
    assert short.code is VerdictCode.DOES_NOT_PAY
    assert short.break_even_steps is not None
    assert short.break_even_steps > 10
    assert short.change_us is not None
    assert short.change_us > 60e6


def test_replicas_that_exceed_the_memory_do_not_fit_and_cost_tokens_of_cache() -> None:
    # Four experts of 1000 bytes in two layers are 8000 bytes; one copy more on each rank is 2000.
    found = verdicts(lab_of([30, *[2] * 15], memory_bytes=9000.0, kv_bytes_per_token=10.0))
    copied = found[Mitigation.REPLICAS]
    assert copied.code is VerdictCode.DOES_NOT_FIT
    assert copied.memory_bytes == 2000
    assert copied.kv_tokens == 200
    assert copied.reason is not None
    assert copied.reason.values == {"needed_bytes": 10_000, "memory_bytes": 9000}


@pytest.mark.parametrize(("times", "code"), [(1.9, "change"), (2.1, "far off"), (0.4, "far off")])
def test_no_change_is_plain_where_todays_step_took_far_from_what_was_predicted(
    times: float, code: str
) -> None:
    exchanges = network(latency_us=10.0, us_per_byte=1e-6)
    lab = lab_of(SKEWED, exchanges=exchanges)
    measured_us = times * float(lab.today.total_S.mean())
    held = {verdict.mitigation: verdict for verdict in held_to(measured_us, lab, [*placement(lab)])}
    assert held[Mitigation.PLACEMENT].code.value == code
    alone = lab_of(SKEWED)
    (verdict,) = held_to(measured_us, alone, [*placement(alone)])
    # Without exchanges today's step is not all predicted.
    assert verdict.code is VerdictCode.CHANGE


def test_at_small_batches_activated_experts_are_balanced_instead_of_tokens() -> None:
    found = verdicts(lab_of([8, 8, *[1] * 14], tokens=16, experts=expert_cost(expert_s=1e-3), phase="decode"))
    equal, once = found[Mitigation.REPLICAS], found[Mitigation.ACTIVATED_DISPATCH]
    assert equal.step_us is not None
    assert once.step_us is not None
    # Copies that share equally read the weights of an expert twice; one copy for each reads them once.
    assert once.step_us < equal.step_us
    assert once.premise is not None
    assert once.premise.holds


def test_how_far_predictions_lie_outside_what_was_measured_is_stated() -> None:
    short = cost(row_s=1e-6, shape=SHAPE, most_assignments=1000, most_activated=EXPERTS, most_rows=10**6)
    today = verdicts(lab_of(np.ones(EXPERTS), experts=short))[Mitigation.TODAY]
    # 8000 assignments on 4 ranks, of which 1000 were measured.
    assert today.extrapolated == 1.0
    (reason,) = today.farthest
    assert reason.code is MitigationCode.EXPERTS_BEYOND
    assert reason.values["times"] == pytest.approx(2.0, abs=0.2)
    inside = verdicts(lab_of(np.ones(EXPERTS)))[Mitigation.TODAY]
    assert (inside.extrapolated, inside.farthest) == (0.0, ())


def test_exchanges_without_a_network_model_are_not_guessed() -> None:
    found = verdicts(lab_of(SKEWED))
    for mitigation in (
        Mitigation.HIERARCHICAL,
        Mitigation.GATHER,
        Mitigation.DEDUPLICATION,
        Mitigation.SHARDING,
    ):
        assert found[mitigation].code is VerdictCode.NOT_KNOWN
        assert found[mitigation].step_us is None
    assert "dispatch" not in found[Mitigation.TODAY].parts_us


def samples(pairs: list[tuple[int, int]]) -> list[LayerTokens]:
    """The same sampled tokens in both layers."""
    tokens = np.array(pairs * 50)
    zeros = np.zeros(len(tokens), dtype=np.int64)
    return [
        LayerTokens(experts_TK=tokens, step_T=zeros, source_T=zeros, position_T=np.arange(len(tokens)))
    ] * 2


def test_a_token_is_sent_once_where_its_experts_share_a_rank() -> None:
    bytes_alone = network(latency_us=0.0, us_per_byte=1e-3)
    together = samples([(0, 1), (4, 5), (8, 9), (12, 13)])
    apart = samples([(0, 4), (5, 9), (8, 12), (13, 1)])
    shared = verdicts(lab_of(np.ones(EXPERTS), exchanges=bytes_alone, samples=together))
    split = verdicts(lab_of(np.ones(EXPERTS), exchanges=bytes_alone, samples=apart))
    assert shared[Mitigation.DEDUPLICATION].premise is not None
    assert shared[Mitigation.DEDUPLICATION].premise.holds
    assert split[Mitigation.DEDUPLICATION].premise is not None
    assert not split[Mitigation.DEDUPLICATION].premise.holds
    half = shared[Mitigation.DEDUPLICATION].parts_us["dispatch"]
    today = shared[Mitigation.TODAY].parts_us["dispatch"]
    # Both experts of every token are on one rank: one row instead of two.
    assert half == pytest.approx(today / 2, rel=0.03)
    assert split[Mitigation.DEDUPLICATION].parts_us["dispatch"] == pytest.approx(today, rel=0.03)


@pytest.mark.parametrize("seed", range(12))
def test_nothing_on_these_ranks_is_faster_than_the_ceiling(seed: int) -> None:
    generator = np.random.default_rng(seed)
    lab = lab_of(
        generator.lognormal(0, 1.5, EXPERTS),
        tokens=int(generator.choice([8, 64, 4000])),
        experts=expert_cost(
            call_s=1e-5,
            expert_s=float(generator.choice([0, 1e-4])),
            row_s=float(generator.choice([1e-8, 1e-6])),
        ),
        exchanges=network(latency_us=float(generator.choice([0, 50])), us_per_byte=1e-3),
        phase=str(generator.choice(["prefill", "decode"])),
    )
    rows = [verdict for change in CHANGES for verdict in change(lab)]
    ceiling = next(row.step_us for row in rows if row.mitigation is Mitigation.CEILING)
    assert ceiling is not None
    timed = [row for row in rows if row.step_us is not None]
    assert len(timed) > 8
    for row in timed:
        assert row.step_us is not None
        assert row.step_us >= ceiling * (1 - 1e-9), row.mitigation

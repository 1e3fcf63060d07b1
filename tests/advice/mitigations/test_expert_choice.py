"""Route, fetch or keep as a change of the set-up, on traces whose best choice follows by hand."""

from __future__ import annotations

import numpy as np
import pytest

from observatory.advice.mitigations.expert_choice import route_or_fetch
from observatory.advice.mitigations.verdict import Mitigation, MitigationCode, VerdictCode
from tests.advice.mitigations.test_changes import EXPERTS, expert_cost, lab_of, verdicts
from tests.analysis.experts.models import network

#: A byte of rows and of weights takes a nanosecond; rows have 32 bytes, experts 1000.
BYTES_ALONE = network(latency_us=0.0, us_per_byte=1e-3)
FAST = expert_cost(row_s=1e-12)


def test_experts_with_many_tokens_are_fetched_and_the_gain_is_that_of_the_arithmetic() -> None:
    lab = lab_of(np.ones(EXPERTS), exchanges=BYTES_ALONE, experts=FAST)
    fetched = next(route_or_fetch(lab))
    assert fetched.setting == "32 fetched"
    assert {(choice.layer, choice.expert) for choice in fetched.experts} == {
        (layer, expert) for layer in (0, 1) for expert in range(EXPERTS)
    }
    today = lab.today.total_S.mean()
    # In two layers three quarters of 2000 rows leave each rank and come back; then twelve experts come.
    assert today == pytest.approx(2 * 2 * 0.75 * 2000 * 32e-3, rel=0.05)
    assert fetched.step_us == pytest.approx(2 * 12 * 1000e-3, rel=0.01)
    assert fetched.code is VerdictCode.CHANGE
    assert fetched.change_us == 0.0
    # All experts of a layer have to have room at once.
    assert fetched.memory_bytes == EXPERTS * 1000
    assert fetched.premise is not None
    assert fetched.premise.holds
    # Three transfers of an expert, against three quarters of a row there and back.
    assert fetched.premise.reason.values["break_even"] == pytest.approx(3000 / (0.75 * 64))


def test_experts_with_few_tokens_are_sent_to() -> None:
    routed, kept = route_or_fetch(lab_of(np.ones(EXPERTS), exchanges=BYTES_ALONE, experts=FAST, tokens=64))
    assert routed.code is VerdictCode.NOT_APPLICABLE
    assert routed.reason is not None
    assert routed.reason.code is MitigationCode.ALL_ROUTED
    assert routed.reason.values["busiest"] < routed.reason.values["break_even"]
    # One of sixteen kept in each layer takes a sixteenth of the load: nothing that few experts decide.
    assert kept.premise is not None
    assert kept.premise.holds is False
    assert kept.premise.reason.values["share"] == pytest.approx(1 / 16, rel=0.2)


def test_an_expert_that_outweighs_a_rank_is_fetched_or_kept() -> None:
    lab = lab_of([30, *[2] * 15], exchanges=BYTES_ALONE, tokens=80)
    fetched, kept = route_or_fetch(lab)
    heavy = {(0, 0), (1, 0)}
    assert {(one.layer, one.expert) for one in kept.experts if one.choice == "keep"} == heavy
    assert kept.setting == "2 kept"
    assert heavy <= {(one.layer, one.expert) for one in fetched.experts if one.choice == "fetch"}
    assert (fetched.code, kept.code) == (VerdictCode.CHANGE, VerdictCode.CHANGE)
    assert kept.memory_bytes == 2000
    # A microsecond a row: ranks compute their own tokens of the first expert, all of the others they hold.
    load_SLP = lab.test_SLE.copy()
    load_SLP[..., 0] = 0
    load_SLP = load_SLP.reshape(*load_SLP.shape[:2], 4, 4).sum(axis=3) + lab.sources_SLPE[..., 0]
    assert kept.parts_us["experts"] + kept.parts_us["waiting"] == pytest.approx(
        load_SLP.max(axis=2).sum(axis=1).mean()
    )
    assert kept.change_us == pytest.approx(2 * 1000 / 1e9 * 1e6)
    assert kept.premise is not None
    assert kept.premise.holds
    # Its holder sends it to three ranks in every layer; others may come at the same time.
    assert fetched.parts_us["extra"] == pytest.approx(6.0)


def test_a_copy_that_does_not_fit_and_a_missing_model_are_named() -> None:
    rows = list(
        route_or_fetch(lab_of([30, *[2] * 15], exchanges=BYTES_ALONE, tokens=80, memory_bytes=8500.0))
    )
    assert {row.code for row in rows} == {VerdictCode.DOES_NOT_FIT}
    (unknown,) = route_or_fetch(lab_of(np.ones(EXPERTS)))
    assert unknown.reason is not None
    assert unknown.reason.code is MitigationCode.NO_NETWORK


def test_it_is_one_of_the_changes_and_not_faster_than_the_ceiling() -> None:
    found = verdicts(lab_of(np.ones(EXPERTS), exchanges=BYTES_ALONE, experts=FAST))
    fetched, ceiling = found[Mitigation.ROUTE_OR_FETCH], found[Mitigation.CEILING]
    assert fetched.step_us is not None
    assert ceiling.step_us is not None
    assert fetched.step_us >= ceiling.step_us

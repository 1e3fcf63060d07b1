"""Phases of a rank from its spans."""

from __future__ import annotations

import pandas as pd
import pytest

from observatory.analysis.energy.codes import EnergyCode
from observatory.analysis.energy.phases import REST, RankPhases, rank_phases
from observatory.reasons import Reason

MS = 1_000_000


def spans(*rows: tuple[int, str, str, float, float | None]) -> pd.DataFrame:
    """Spans from (step, phase, name, start in ms, end in ms)."""
    frame = pd.DataFrame(rows, columns=["step", "phase", "name", "start_ns", "end_ns"])
    frame["start_ns"] = (frame["start_ns"] * MS).astype("int64")
    frame["end_ns"] = (pd.to_numeric(frame["end_ns"]) * MS).astype("Int64")
    return frame.assign(layer=0, source_rank=0)


def phases(*rows: tuple[int, str, str, float, float | None]) -> RankPhases:
    found = rank_phases(spans(*rows))
    assert not isinstance(found, Reason), found
    return found


def test_short_gaps_between_steps_of_a_phase_belong_to_it_and_long_ones_to_nobody() -> None:
    found = phases(
        (0, "decode", "phase", 0, 20),
        (1, "decode", "phase", 25, 45),
        (2, "decode", "phase", 145, 165),
    )
    assert found.phases.seconds() == pytest.approx({"decode": 0.065})
    assert found.phases.end_ns_M.tolist() == [45 * MS, 165 * MS]
    assert found.steps == {"decode": frozenset({0, 1, 2})}
    assert found.step_starts_ns["decode"].tolist() == [0, 25 * MS, 145 * MS]


def test_a_short_phase_between_is_not_swallowed_by_the_phase_around_it() -> None:
    found = phases(
        (0, "decode", "phase", 0, 20), (1, "prefill", "phase", 20, 26), (2, "decode", "phase", 26, 46)
    )
    assert found.phases.seconds() == pytest.approx({"decode": 0.040, "prefill": 0.006})


def test_what_is_inside_a_phase_fills_it_with_the_rest() -> None:
    found = phases(
        (0, "prefill", "phase", 0, 100),
        (0, "prefill", "dispatch", 10, 20),
        (0, "prefill", "experts", 20, 60),
        (0, "prefill", "moe_layer", 5, 80),
        (1, "prefill", "phase", 200, 300),
        (1, "prefill", "experts", 290, 320),  # its end lies behind the phase's
    )
    assert found.inside["prefill"].seconds() == pytest.approx({"dispatch": 0.01, "experts": 0.05, REST: 0.14})


def test_spans_of_another_phase_do_not_count_inside() -> None:
    found = phases((0, "prefill", "phase", 0, 100), (0, "decode", "experts", 10, 20))
    assert found.inside == {}


def test_spans_without_a_possible_time_are_left_out_and_stated() -> None:
    found = phases(
        (0, "decode", "phase", 0, 20),
        (1, "decode", "phase", 30, None),
        (2, "decode", "phase", 60, 50),
        (3, "decode", "phase", -5, 10),
    )
    assert found.phases.seconds() == pytest.approx({"decode": 0.02})
    assert found.problems == (Reason(EnergyCode.UNUSABLE_SPANS, {"spans": 3}),)


def test_too_many_names_inside_a_phase_cost_that_phases_inside_only() -> None:
    many = [(0, "decode", f"n{k}", k, k + 1.0) for k in range(40)]
    found = phases((0, "decode", "phase", 0, 100), *many)
    assert found.inside == {}
    assert "40 different names" in str(found.problems[0].values["detail"])


def test_a_rank_without_phases_says_so() -> None:
    found = rank_phases(spans((0, "decode", "experts", 0, 20)))
    assert found == Reason(EnergyCode.NO_PHASE_SPANS)

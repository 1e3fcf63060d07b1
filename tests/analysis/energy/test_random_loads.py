"""Random loads through whole runs: a few of those of benchmarks/energy_periodic.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.energy_periodic import MOST_OFF, cases, measured


@pytest.mark.slow
def test_intervals_of_random_loads_hold_and_nothing_is_far_off_unseen(tmp_path: Path) -> None:
    rows = [row for case in cases(6, 6) for row in measured(case, tmp_path)]
    answered = [row for row in rows if row["answered"]]
    assert len(answered) >= 0.75 * len(rows)
    assert sum(row["held"] for row in answered) >= 0.85 * len(answered)
    assert not [row for row in answered if abs(row["error"]) > MOST_OFF and not row["flagged"]]

"""A rank that is lost is named by the others, and what was captured stays readable."""

from __future__ import annotations

import pytest

import observatory
from tests.collectives.conftest import Outcome


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("dies", "no answer from rank 2"),
        ("hangs", "no answer from rank 2"),
        ("never joins", "rank 2 of 3 did not join"),
        ("ends early", "rank 2 had left (it had finished)"),
        ("fails", "rank 2 had left (ObservatoryError: disk full on rank 2)"),
    ],
)
def test_a_lost_rank_is_named_by_the_others(outcome: Outcome, how: str, words: str) -> None:
    for rank in outcome["lost"][how][:2]:
        assert words in rank["error"]


@pytest.mark.parametrize(
    ("how", "words"),
    [("dies", "no answer from rank 1"), ("finds its disk full", "rank 1 had left (")],
)
def test_the_run_of_a_lost_rank_stays_readable_and_states_the_gap(
    outcome: Outcome, how: str, words: str
) -> None:
    first, second = outcome["lost runs"][how]
    assert words in first["error"]
    run = observatory.open_run(outcome["folder"] / how)
    statuses = {status.rank: status for status in run.manifest.ranks}
    assert statuses[0].state == "failed"
    assert "rank 1" in (statuses[0].error or "")
    assert any("rank 1" in problem for problem in run.problems) or statuses[1].state == "failed"
    loads = run.expert_load()
    for rank in (0, 1):
        steps = set(loads[loads.source_rank == rank].step)
        assert {0, 1, 2} <= steps
    if how == "dies":
        assert second["ended"] == "-9"
    else:
        assert "rank 1 cannot write" in second["error"]
        assert "File too large" in second["error"]

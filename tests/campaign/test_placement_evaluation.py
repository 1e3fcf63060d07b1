"""Solvers that are right, wrong, slow or broken, on trials whose best answers are known."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from observatory.analysis.parallel.balancing import holders
from observatory.analysis.parallel.balancing.problem import Objective, Problem
from observatory.analysis.parallel.balancing.trials import Trial, captured_trials, generated_trials, shares_of
from observatory.campaign import placement_evaluation
from observatory.campaign.placement_evaluation import Judged, evaluate, evaluation_document
from observatory.cli import main
from tests.advice.test_conclusions import run_of_loads

#: A solver that deals experts to ranks from both ends, so that {0, 3} and {1, 2} meet.
FOLDED = """
import json, sys, numpy as np
problem = np.load(sys.argv[1])
ranks, experts = int(problem["ranks"]), problem["loads"].shape[2]
place = [min(e % (2 * ranks), 2 * ranks - 1 - e % (2 * ranks)) for e in range(experts)]
layers = {str(l): place for l in range(problem["loads"].shape[1])}
json.dump({"ranks": ranks, "layers": layers}, open(sys.argv[2], "w"))
"""


def trial(objective: Objective = Objective.MEAN, **rules: object) -> Trial:
    """Loads 4, 3, 2, 1 on two ranks: folded they are 5 and 5, in blocks 7 and 3."""
    load_SLE = np.tile(np.array([4.0, 3.0, 2.0, 1.0]), (8, 1, 1))
    problem = Problem(load_SLE=load_SLE, ranks=2, objective=objective, **rules)  # type: ignore[arg-type]
    return Trial(name="one", problem=problem, test_SLE=load_SLE)


def solver(folder: Path, code: str) -> str:
    path = folder / "solver.py"
    path.write_text(code)
    return f"{sys.executable} -S {path}" if "numpy" not in code else f"{sys.executable} {path}"


def judged(folder: Path, code: str, one: Trial | None = None, timeout_s: float = 60.0) -> Judged:
    return next(evaluate(solver(folder, code), [one or trial()], timeout_s=timeout_s))


def test_a_solver_gets_two_paths_and_its_placement_is_judged(tmp_path: Path) -> None:
    item = judged(tmp_path, FOLDED)
    assert item.fault is None
    assert item.scores["command"] == 1.0
    assert item.scores["observatory"] == 1.0
    assert item.cpu_s > 0
    document = evaluation_document("solver", [item], seed=0)
    assert (document["valid"], document["trials"], document["worse"]) == (1, 1, 0)


@pytest.mark.parametrize(
    ("written", "fault"),
    [
        ('{"ranks": 2, "layers": {"0": [0, 0, 0, 1]}}', "too_many_copies"),
        ('{"ranks": 2, "layers": {"0": [[0, 1], 0, 1, 1]}}', "too_many_copies"),
        ('{"ranks": 2, "layers": {"1": [0, 0, 1, 1]}}', "no_placement"),
        ('{"ranks": 3, "layers": {"0": [0, 1, 2, 2]}}', "no_placement"),
        ("[" * 5000, "no_placement"),
    ],
)
def test_a_placement_that_is_no_solution_gets_no_score(written: str, fault: str, tmp_path: Path) -> None:
    item = judged(tmp_path, f"import sys; open(sys.argv[2], 'w').write({written!r})")
    assert item.fault == fault
    assert "command" not in item.scores


@pytest.mark.parametrize(
    ("code", "fault"),
    [("raise SystemExit(3)", "failed"), ("", "no_placement"), ("import time; time.sleep(60)", "timed_out")],
)
def test_a_solver_that_fails_or_hangs_gets_no_score(code: str, fault: str, tmp_path: Path) -> None:
    assert judged(tmp_path, code, timeout_s=1.0 if fault == "timed_out" else 60.0).fault == fault


def test_rules_of_groups_and_moves_are_checked() -> None:
    blocks, folded = np.array([[[0, 1], [2, 3]]]), np.array([[[0, 3], [1, 2]]])
    grouped = trial(nodes=2, groups=2)
    assert grouped.fault(shares_of(blocks, 4)) is None
    assert grouped.fault(shares_of(folded, 4)) == "group_split"
    limited = trial(Objective.MOVES, current_LPE=holders(blocks, 4).astype(np.int8), max_moves=1)
    assert limited.fault(shares_of(blocks, 4)) is None
    assert limited.fault(shares_of(folded, 4)) == "too_many_moves"
    assert limited.fault(np.zeros((1, 2, 4))) == "expert_missing"


def test_a_change_is_charged_and_speeds_count() -> None:
    blocks, folded = np.array([[[0, 1], [2, 3]]]), np.array([[[0, 3], [1, 2]]])
    held = holders(blocks, 4).astype(np.int8)
    charged = trial(Objective.STEP, current_LPE=held, move_cost=0.3)
    assert charged.score(shares_of(blocks, 4)) == pytest.approx(1.4)
    assert charged.score(shares_of(folded, 4)) == pytest.approx(1.3)
    fast = trial(speed_P=np.array([7.0, 3.0]))
    assert fast.score(shares_of(blocks, 4)) == pytest.approx(1.0)
    assert trial(Objective.ACTIVE).score(shares_of(blocks, 4)) == 2.0


@pytest.mark.slow
def test_the_generated_set_is_the_same_every_time_and_shows_only_the_first_steps() -> None:
    trials = list(generated_trials())
    assert len({one.name for one in trials}) == 17
    for one in trials:
        assert one.test_SLE.shape == one.problem.load_SLE.shape
        assert (one.test_SLE != one.problem.load_SLE).any()
    assert {one.problem.objective for one in trials} == set(Objective)
    for one, two in zip(trials, itertools.islice(generated_trials(), 9), strict=False):
        assert (one.problem.load_SLE == two.problem.load_SLE).all()
        assert (one.test_SLE == two.test_SLE).all()


def test_captured_steps_are_tried_on_ranks_that_divide_the_experts() -> None:
    load_SLE = np.arange(16 * 2 * 12).reshape(16, 2, 12)
    plain, copied = captured_trials("run", load_SLE)
    assert (plain.problem.ranks, copied.problem.ranks) == (4, 4)
    assert (plain.problem.replicas, copied.problem.replicas) == (0, 4)
    assert (plain.test_SLE == load_SLE[8:]).all()


def test_the_command_prints_what_a_solver_reaches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def few(_seed: int) -> Iterator[Trial]:
        yield trial()

    monkeypatch.setattr(placement_evaluation, "generated_trials", few)
    run = run_of_loads(tmp_path / "run", np.random.default_rng(0).poisson(50.0, (16, 1, 8)))
    command = solver(tmp_path, FOLDED)
    arguments = ["place", "--evaluate", command, "--on", str(run), "--out", str(tmp_path / "out.json")]
    assert main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["kind"] == "placement_evaluation"
    assert [row["trial"] for row in document["rows"]] == [
        "one",
        "run, prefill, 4 + 0",
        "run, prefill, 4 + 4",
    ]
    assert document["rows"][0]["command"] == 1.0
    assert document == json.loads((tmp_path / "out.json").read_text())
    assert main([*arguments, "--force"]) == 0
    assert "3 of 3 trials" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "said"),
    [("", "is empty"), ("'", "cannot be split"), ("no-such-solver", "cannot be started")],
)
def test_a_command_that_is_none_is_refused_in_one_sentence(
    command: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["place", "--evaluate", command, "--generated-only"]) == 1
    err = capsys.readouterr().err.splitlines()
    assert said in err[-1]

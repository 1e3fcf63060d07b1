"""Run a placement solver on a fixed set of trials, and compare it with baselines on steps it did not see.

Protocol of a trial:

1. The problem is written (.npz, docs/placement.md) into a folder of its own.
2. The solver's command runs with the paths of the problem and of the placement to write; no shell, no input,
   its output is discarded, and it is ended with all its processes after a time limit.
3. Its placement is checked against the rules of the problem and judged on the held-out steps, as are the
   baselines.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from observatory.analysis.columns import Column, Table
from observatory.analysis.parallel.balancing.layouts import Float64
from observatory.analysis.parallel.balancing.problem import Problem, write_problem
from observatory.analysis.parallel.balancing.trials import (
    VERSION,
    Trial,
    baselines,
    captured_trials,
    generated_trials,
)
from observatory.analysis.parallel.placement import load_placement
from observatory.analysis.parallel.step_loads import step_loads
from observatory.campaign.job import ProfileJob
from observatory.campaign.profile import run_profile
from observatory.errors import PlacementError
from observatory.run import open_run
from observatory.run.documents.printed import printed_document

#: Sequences of a step that bundled models are captured with, and steps of each phase.
BATCH_SIZES, CAPTURED_STEPS = (2, 8), 32
#: A score this much lower is better.
_BETTER = 1e-3
_FEWEST_STEPS = 16


class Outcome(StrEnum):
    """How the solver's command ended, where it gave no placement to judge."""

    FAILED = "failed"
    TIMED_OUT = "timed_out"
    NO_PLACEMENT = "no_placement"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Judged:
    """One trial.

    Attributes:
        trial: what was to be solved.
        scores: of the baselines, and of ``command`` where it gave a placement.
        fault: why there is none, or why it is no solution; None where it is one.
        cpu_s: processor time of the command.
    """

    trial: Trial
    scores: Mapping[str, float]
    fault: str | None
    cpu_s: float


def evaluate(
    command: str,
    trials: Iterable[Trial],
    *,
    timeout_s: float,
    progress: Callable[[str], None] | None = None,
) -> Iterator[Judged]:
    """Judge the solver on each trial.

    Args:
        command: its command line; ``{problem}`` and ``{out}`` stand for the two paths, which otherwise follow
            as its last arguments.
        trials: what to solve.
        timeout_s: after which a command is ended.
        progress: called with the name of each trial before it runs.

    Raises:
        PlacementError: the command cannot be split into words or started.
    """
    words = _split(command)
    with tempfile.TemporaryDirectory(prefix="placement-") as folder:
        for number, trial in enumerate(trials):
            if progress is not None:
                progress(trial.name)
            problem, out = Path(folder) / f"{number}.npz", Path(folder) / f"{number}.json"
            write_problem(trial.problem, problem)
            fault, cpu_s = _run([_filled(word, problem, out) for word in words], timeout_s)
            scores = {name: trial.score(share_LPE) for name, share_LPE in baselines(trial).items()}
            if fault is None:
                share_LPE = _shares(out, trial.problem)
                fault = Outcome.NO_PLACEMENT if share_LPE is None else trial.fault(share_LPE)
                if fault is None and share_LPE is not None:
                    scores["command"] = trial.score(share_LPE)
            yield Judged(trial=trial, scores=scores, fault=fault, cpu_s=cpu_s)
            problem.unlink()


def all_trials(runs: Sequence[Path], *, seed: int = 0, captured: bool = True) -> Iterator[Trial]:
    """Generated trials, then those of captured steps: of the runs, or else of the bundled models.

    Raises:
        PlacementError: a run has no phase of at least 16 whole steps.
        ModelError, CaptureError: a bundled model cannot be profiled.
    """
    yield from generated_trials(seed)
    if not captured:
        return
    for run in runs:
        yield from _of_run(run, run.name)
    if not runs:
        from observatory.zoo.models import BUNDLED_NAMES

        with tempfile.TemporaryDirectory(prefix="captured-") as folder:
            for model in BUNDLED_NAMES:
                for batch_size in BATCH_SIZES:
                    job = ProfileJob(
                        model=model,
                        batch_size=batch_size,
                        sequence_length=64,
                        steps=CAPTURED_STEPS,
                        phase="both",
                        power="off",
                    )
                    run = run_profile(job, Path(folder) / f"{model}-{batch_size}")
                    yield from _of_run(run, f"{model}, batch {batch_size}")


def evaluation_document(command: str, judged: Sequence[Judged], *, seed: int) -> dict[str, Any]:
    """The evaluation as ``--json`` prints it (docs/json.md)."""
    valid = [item for item in judged if "command" in item.scores]
    ratios = [
        item.scores["command"] / item.scores.get("greedy", item.scores.get("stay", 1.0)) for item in valid
    ]
    return printed_document(
        "placement_evaluation",
        {
            "command": command,
            "evaluation_version": VERSION,
            "seed": seed,
            "trials": len(judged),
            "valid": len(valid),
            "better": sum(ratio < 1 - _BETTER for ratio in ratios),
            "worse": sum(ratio > 1 + _BETTER for ratio in ratios),
            "ratio": float(np.exp(np.mean(np.log(ratios)))) if ratios else None,
            "cpu_s": sum(item.cpu_s for item in judged),
            "rows": [
                {
                    "trial": item.trial.name,
                    "unit": item.trial.unit.value,
                    **{name: item.scores.get(name) for name in ("stay", "greedy", "observatory", "command")},
                    "hindsight": item.scores.get("hindsight"),
                    "fault": item.fault,
                    "cpu_s": item.cpu_s,
                }
                for item in judged
            ],
        },
    )


def evaluation_tables(document: dict[str, Any]) -> list[Table]:
    """The trials of an evaluation."""
    title = (
        f"Evaluation {document['evaluation_version']}, seed {document['seed']}: scores on steps that were "
        "not seen, lower is better"
    )
    columns = (
        Column(name="trial", title="trial", text=True, key=True),
        Column(name="stay", title="stay", digits=3, legend="today's layout"),
        Column(name="greedy", title="greedy", digits=3, legend="water-filled copies, packed largest first"),
        Column(name="observatory", title="observatory", digits=3, legend="observatory place"),
        Column(name="command", title="command", digits=3, legend="the command that is evaluated"),
        Column(name="hindsight", title="hindsight", digits=3, legend="made on the held-out steps"),
        Column(name="fault", title="fault", text=True, legend="why there is no score"),
        Column(name="cpu_s", title="CPU s", digits=2, legend="of the command"),
    )
    return [Table(name="rows", columns=columns, rows=document["rows"], title=title)]


def _of_run(path: Path, name: str) -> Iterator[Trial]:
    loads = step_loads(open_run(path))
    phases = [phase for phase in loads.phases if loads.phase_S.count(phase) >= _FEWEST_STEPS]
    if not phases:
        raise PlacementError(
            f"{path} has fewer than {_FEWEST_STEPS} whole steps of every phase; profile again with more "
            "--steps"
        )
    for phase in phases:
        yield from captured_trials(f"{name}, {phase}", loads.of_phase(phase).load_SLE)


def _split(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise PlacementError(f"the command {command[:200]!r} cannot be split into words ({error})") from error
    if not words:
        raise PlacementError("the command to evaluate is empty; expected a program and its arguments")
    if not any("{problem}" in word or "{out}" in word for word in words):
        words += ["{problem}", "{out}"]
    return words


def _filled(word: str, problem: Path, out: Path) -> str:
    return word.replace("{problem}", str(problem)).replace("{out}", str(out))


def _run(words: list[str], timeout_s: float) -> tuple[str | None, float]:
    """Run a command; how it failed, and its processor time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        raise PlacementError(
            f"{words[0]} cannot be started: {error.strerror}; expected a program on PATH"
        ) from error
    fault: str | None = None
    try:
        fault = Outcome.FAILED if process.wait(timeout_s) else None
    except subprocess.TimeoutExpired:
        fault = Outcome.TIMED_OUT
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # also what a command leaves behind when it ends
        process.wait()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return fault, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _shares(out: Path, problem: Problem) -> Float64 | None:
    """Share of each expert on each rank, (L, P, E); None where the file is no placement for the problem."""
    _, layers, experts = problem.load_SLE.shape
    share_LPE = np.zeros((layers, problem.ranks, experts))
    try:
        file = load_placement(out)
        if file.ranks is None:
            file = file.model_copy(update={"ranks": problem.ranks})
        for layer in range(layers):
            shares_E = file.shares_of(layer)
            for expert, ranks in enumerate(file.holders(layer, experts=experts, ep=problem.ranks)):
                share_LPE[layer, list(ranks), expert] = shares_E[expert] if shares_E else 1 / len(ranks)
    except PlacementError:
        return None
    return share_LPE

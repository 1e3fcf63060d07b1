"""Runs, grids and saved results measured and put against a baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from observatory.analysis.compare.architectures import architecture_rows
from observatory.analysis.compare.collect import measure_run, own_degrees
from observatory.analysis.compare.comparing import Comparison, compare_subjects
from observatory.analysis.compare.inputs import check_repeats, pair_subjects
from observatory.analysis.compare.saved import load_subjects
from observatory.analysis.compare.subject import Subject
from observatory.campaign.run_folders import expand_runs
from observatory.errors import ComparisonError
from observatory.reasons import Reason
from observatory.run import Run, open_run

#: Runs of one comparison; of more, `observatory history` shows the series.
_MOST_RUNS = 256
_ALONE = "one input alone cannot be compared"


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """What was compared.

    Attributes:
        comparisons: one for each pair.
        lonely: what has no counterpart.
        architectures: rows of models next to each other, where the only input is a grid; else empty.
        subjects: everything that was measured, each once.
    """

    comparisons: list[Comparison]
    lonely: list[Reason]
    architectures: list[dict[str, Any]]
    subjects: list[Subject]


def compare_inputs(
    inputs: Sequence[Path], repeats: Sequence[Path], *, progress: Callable[[int, int], None]
) -> Compared:
    """Measure the inputs and compare them with the first; a grid alone by its models, the first the baseline.

    Args:
        inputs: runs, grids, documents or reports.
        repeats: further runs of the baseline's set-up.
        progress: called with the runs that were measured and their number.

    Raises:
        ComparisonError: nothing to compare, too much of it, or repeats of another set-up or given twice.
        RunError: a run cannot be opened.
    """
    if len(repeats) == 1:
        raise ComparisonError(
            "one further run of the baseline shows no scatter to rely on", expected="two --repeat or more"
        )
    opened: list[list[Run | Subject]] = [
        [*load_subjects(path)] if path.is_file() else [open_run(run) for run in expand_runs([path])]
        for path in (*inputs, *repeats)
    ]
    total = sum(map(len, opened))
    if total > _MOST_RUNS:
        raise ComparisonError(
            f"{total} runs are more than can be compared side by side",
            expected=f"at most {_MOST_RUNS}",
            remedy="see the series with `observatory history DIR`",
        )
    if total < 2:
        raise ComparisonError(_ALONE, remedy="give a baseline and another run")
    runs = [item for side in opened for item in side if isinstance(item, Run)]
    degrees = sorted({ep for run in runs for ep in own_degrees(run.manifest)})
    measured: dict[int, Subject] = {}
    for run in runs:
        measured[id(run)] = measure_run(run, degrees=degrees)
        if len(runs) > 2:
            progress(len(measured), len(runs))
    sides = [[measured[id(item)] if isinstance(item, Run) else item for item in side] for side in opened]
    subjects, further = sides[: len(inputs)], [item for side in sides[len(inputs) :] for item in side]
    architectures: list[dict[str, Any]] = []
    if len(subjects) == 1:
        architectures = architecture_rows([(run, measured[id(run)]) for run in runs])
        subjects = _by_model(subjects[0])
    check_repeats(subjects[0], [item for side in subjects[1:] for item in side], further)
    comparisons, lonely = [], []
    for other in subjects[1:]:
        pairs, without = pair_subjects(subjects[0], other)
        comparisons += [compare_subjects(*pair, repeats=further) for pair in pairs]
        lonely += without
    if not comparisons:
        raise ComparisonError(
            "nothing on one side has a counterpart on the other",
            expected="a model or a data condition that both have",
        )
    every = {subject.name: subject for side in sides for subject in side}
    return Compared(
        comparisons=comparisons, lonely=lonely, architectures=architectures, subjects=list(every.values())
    )


def _by_model(subjects: Sequence[Subject]) -> list[list[Subject]]:
    """The runs of each model; the conditions of one model where there is no other."""
    models: dict[str | None, list[Subject]] = {}
    for subject in subjects:
        models.setdefault(subject.model, []).append(subject)
    return list(models.values()) if len(models) > 1 else [[subject] for subject in subjects]

"""Which subjects of two inputs belong together: of several, those of one model and data condition."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from observatory.analysis.compare.subject import Subject
from observatory.analysis.compare.words import CompareCode
from observatory.errors import ComparisonError
from observatory.reasons import Reason


def pair_subjects(
    base: Sequence[Subject], other: Sequence[Subject]
) -> tuple[list[tuple[Subject, Subject]], list[Reason]]:
    """Pairs to compare, and what has no counterpart.

    One subject on each side is compared whatever it is of. Of several, those of one model and condition
    belong together; where the inputs have no model in common, those of one condition; where they have no
    condition in common, those of one model.
    """
    if len(base) == len(other) == 1:
        return [(base[0], other[0])], []
    models = [{subject.model for subject in side} for side in (base, other)]
    conditions = [{subject.condition for subject in side} for side in (base, other)]
    place: Callable[[Subject], tuple[str | None, ...]]
    if models[0] & models[1]:
        place = _of_both if conditions[0] & conditions[1] else _of_model
    else:
        place = _of_condition
    here = {place(subject): subject for subject in reversed(base)}
    there = {place(subject): subject for subject in reversed(other)}
    pairs = [(here[key], there[key]) for key in dict.fromkeys(map(place, base)) if key in there]
    lonely = [
        Reason(CompareCode.NO_COUNTERPART, {"side": side, "place": " on ".join(filter(None, key))})
        for side, mine, theirs in (("the other", here, there), ("the baseline", there, here))
        for key in mine
        if key not in theirs
    ]
    return pairs, lonely


def _of_both(subject: Subject) -> tuple[str | None, ...]:
    return subject.model, subject.condition


def _of_condition(subject: Subject) -> tuple[str | None, ...]:
    return (subject.condition,)


def _of_model(subject: Subject) -> tuple[str | None, ...]:
    return (subject.model,)


def check_repeats(base: Sequence[Subject], others: Sequence[Subject], repeats: Sequence[Subject]) -> None:
    """Refuse further runs that are not of the baseline's set-up, or are given twice.

    Raises:
        ComparisonError: the baseline is several runs, or a run is of another model, data or number of ranks,
            or is the baseline, another of the runs or a copy of one.
    """
    if repeats and len(base) > 1:
        raise ComparisonError("--repeat is of one baseline run, not of a grid")
    for repeat in repeats:
        mine, theirs = _set_up(base[0]), _set_up(repeat)
        what = next((name for name in mine if mine[name] != theirs[name]), None)
        if what is not None:
            raise ComparisonError(
                f"--repeat {repeat.name} differs from the baseline in its {what}",
                expected="a further run of the same set-up",
            )
    names: dict[str, str] = {subject.run_id: subject.name for subject in (*base, *others) if subject.run_id}
    for repeat in repeats:
        if repeat.run_id in names:
            raise ComparisonError(
                f"--repeat {repeat.name} is the same run as {names[repeat.run_id]}",
                expected="a further run of the same set-up",
            )
        if repeat.run_id is not None:
            names[repeat.run_id] = repeat.name


def _set_up(subject: Subject) -> dict[str, object]:
    ranks = subject.facts.get(CompareCode.OTHER_RANKS)
    return {"model": subject.model, "data": subject.condition, "ranks": ranks}

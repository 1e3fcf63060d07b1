"""A series of runs over time or checkpoints, or of the steps of one run: where its quantities change.

Of every quantity the best split is tested; over the quantities of one series the p values are adjusted
(Benjamini-Hochberg), those of single layers apart from those of whole runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from observatory.analysis.compare.change_points import (
    FEWEST_POINTS,
    FEWEST_STEPS,
    Split,
    best_split,
    level,
    splits,
)
from observatory.analysis.compare.comparing import differing_facts, entropy_rows, whole_run_series
from observatory.analysis.compare.metrics import Key, sort_key
from observatory.analysis.compare.series import false_discovery
from observatory.analysis.compare.subject import GroupedLoads, Subject
from observatory.analysis.compare.words import CompareCode
from observatory.analysis.routing.imbalance import gini_rows
from observatory.reasons import Reason

Float64 = NDArray[np.float64]

_ALL_TOKENS = 1 << 62
_STEP = re.compile(r"\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One run of a series, or one group of steps.

    Attributes:
        name: the run, or the first step.
        order: training step, start in seconds since 1970, or step.
    """

    name: str
    order: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One change of level.

    Attributes:
        at: place of the first point of the new level.
        before, after: medians of the points since the change before, and up to the next.
        facts: what else changed there.
    """

    at: int
    before: float
    after: float
    facts: tuple[Reason, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Track:
    """One quantity over a series.

    Attributes:
        key: the quantity.
        at_N: places of the points that have it.
        value_N: its values.
        p, adjusted_p: of its best split; None where it was not tested.
        changes: in order; empty for none.
        reason: why it was not tested.
    """

    key: Key
    at_N: NDArray[np.int64]
    value_N: Float64
    p: float | None = None
    adjusted_p: float | None = None
    changes: tuple[Change, ...] = ()
    reason: Reason | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """A series and its tracks.

    Attributes:
        name: what the points have in common.
        kind: ``runs`` or ``steps``.
        order_by: ``training_step``, ``time`` or ``step``.
        points: in order.
        tracks: of whole runs.
        layers: of single layers.
    """

    name: str
    kind: str
    order_by: str
    points: tuple[Point, ...]
    tracks: tuple[Track, ...]
    layers: tuple[Track, ...]


def series_of(subjects: Iterable[Subject]) -> dict[tuple[str, ...], list[Subject]]:
    """Subjects that make one series, in order.

    They are of one model (but for numbers in its name), data, batch, sequence length, number of ranks and
    device.
    """
    groups: dict[tuple[str, ...], list[Subject]] = {}
    for subject in subjects:
        ranks = subject.facts.get(CompareCode.OTHER_RANKS)
        model = _STEP.sub("*", subject.model or "?") if subject.training_step is not None else subject.model
        shape = subject.facts.get(CompareCode.OTHER_SHAPE) or (None, None)
        parts = (
            model or "?",
            subject.condition or "data not stated",
            *(f"{name} {size}" for name, size in zip(("batch", "length"), shape, strict=True) if size),
            f"ranks {ranks[0]}" if ranks else "",
            *subject.facts.get(CompareCode.OTHER_DEVICE, ()),
        )
        key = tuple(filter(None, parts))
        groups.setdefault(key, []).append(subject)
    return {key: sorted(of_key, key=_order(of_key)) for key, of_key in sorted(groups.items())}


def _order(subjects: Sequence[Subject]) -> Callable[[Subject], tuple[float, str]]:
    if _by_training(subjects):
        return lambda subject: (float(subject.training_step or 0), subject.name)
    return lambda subject: (subject.started_unix_s or 0.0, subject.name)


def _by_training(subjects: Sequence[Subject]) -> bool:
    return all(subject.training_step is not None for subject in subjects)


def history_of_runs(name: str, subjects: Sequence[Subject]) -> History:
    """Changes over a series of runs in order."""
    by_training = _by_training(subjects)
    points = tuple(
        Point(
            name=subject.name,
            order=float((subject.training_step if by_training else subject.started_unix_s) or 0.0),
        )
        for subject in subjects
    )
    values: dict[Key, dict[int, float]] = {}
    shares: dict[tuple[str, int], Float64] = {}
    for place, subject in enumerate(subjects):
        for key, value in _values(subject, shares):
            values.setdefault(key, {})[place] = value
    tracks = [
        Track(
            key=key,
            at_N=np.array(list(of_key), dtype=np.int64),
            value_N=np.array(list(of_key.values()), dtype=np.float64),
        )
        for key, of_key in values.items()
    ]

    usual = _usual_changes(subjects)

    def facts(at: int) -> tuple[Reason, ...]:
        return tuple(
            fact for fact in differing_facts(subjects[at - 1], subjects[at]) if fact.code not in usual
        )

    return _tested(name, "runs", "training_step" if by_training else "time", points, tracks, facts)


def _usual_changes(subjects: Sequence[Subject]) -> set[str]:
    """Facts that change between most runs, such as the name of a checkpoint, and so explain nothing."""
    counts: dict[str, int] = {}
    for before, after in pairwise(subjects):
        for code in {fact.code for fact in differing_facts(before, after)}:
            counts[code] = counts.get(code, 0) + 1
    return {code for code, count in counts.items() if count > max(len(subjects) - 1, 2) / 2}


def _values(subject: Subject, shares: dict[tuple[str, int], Float64]) -> Iterator[tuple[Key, float]]:
    """Values of one run; ``shares`` keeps the shares of experts of the first."""
    yield from ((key, item.value) for key, item in subject.series.items())
    for phase in sorted({phase for phase, _ in subject.loads}):
        for key, item in whole_run_series(subject, phase, _ALL_TOKENS).items():
            yield key, item.value
        drifts = []
        for (name, place), loads in subject.loads.items():
            if name != phase:
                continue
            load_E = loads.load_GE.sum(axis=0)
            share_E = load_E / load_E.sum()
            first_E = shares.setdefault((phase, place), share_E)
            if first_E is not share_E and len(first_E) == len(share_E):
                drift = _distance(share_E, first_E)
                drifts.append(drift)
                yield Key("expert_drift", phase, place), drift
        if drifts:
            yield Key("expert_drift", phase), float(np.mean(drifts))
    if subject.bias_ranges:
        last = {place: float(range_N[-1]) for place, (_, range_N) in subject.bias_ranges.items()}
        phase = _phase_of_bias(subject)
        yield Key("router_bias", phase), float(np.mean(list(last.values())))
        yield from ((Key("router_bias", phase, place), value) for place, value in last.items())


def _phase_of_bias(subject: Subject) -> str:
    """The phase whose row shows the bias, which is one for all phases: training, else the run's first."""
    phases = [name for name, _ in subject.loads]
    return "train_forward" if "train_forward" in phases else next(iter(phases), "unknown")


def _distance(share_E: Float64, first_E: Float64) -> float:
    """Total variation: the share of assignments that went to other experts."""
    return float(np.abs(share_E - first_E).sum() / 2)


def history_of_steps(subject: Subject) -> list[History]:
    """Changes inside one run, phase by phase."""
    histories = []
    for phase in dict.fromkeys(
        [*(key.phase for key in subject.series), *(name for name, _ in subject.loads)]
    ):
        tracks = [
            Track(key=key, at_N=item.step_N, value_N=item.sample_N)
            for key, item in subject.series.items()
            if key.phase == phase and item.sample_N is not None and item.step_N is not None
        ]
        tracks += _load_tracks(phase, subject.loads)
        if subject.bias_ranges and phase == _phase_of_bias(subject):
            tracks += [
                Track(key=Key("router_bias", phase, place), at_N=step_N, value_N=range_N)
                for place, (step_N, range_N) in subject.bias_ranges.items()
            ]
        steps = sorted({int(step) for track in tracks for step in track.at_N})
        places = {step: place for place, step in enumerate(steps)}
        placed = [
            replace(track, at_N=np.array([places[int(step)] for step in track.at_N], dtype=np.int64))
            for track in tracks
        ]
        points = tuple(Point(name=f"step {step}", order=float(step)) for step in steps)
        histories.append(_tested(f"{subject.name}, {phase}", "steps", "step", points, placed, lambda _: ()))
    return histories


def _load_tracks(phase: str, loads: Mapping[tuple[str, int], GroupedLoads]) -> list[Track]:
    """Gini, entropy, experts without a token and drift of groups of steps, by layer and all together."""
    of_metric: dict[str, list[Track]] = {}
    for (name, place), of_layer in loads.items():
        if name != phase:
            continue
        load_GE = of_layer.load_GE
        first_E = load_GE[: max(len(load_GE) // 8, 1)].sum(axis=0)
        share_GE = load_GE / np.maximum(load_GE.sum(axis=1, keepdims=True), 1)
        drift_G = np.abs(share_GE - first_E / max(first_E.sum(), 1)).sum(axis=1) / 2
        for metric, value_G in (
            ("gini", gini_rows(load_GE)),
            ("entropy_bits", entropy_rows(load_GE)),
            ("dead_experts", np.count_nonzero(load_GE == 0, axis=1).astype(np.float64)),
            ("expert_drift", drift_G),
        ):
            track = Track(key=Key(metric, phase, place), at_N=of_layer.step_G, value_N=value_G)
            of_metric.setdefault(metric, []).append(track)
    wholes = []
    for metric, tracks in of_metric.items():
        alike = all(np.array_equal(track.at_N, tracks[0].at_N) for track in tracks)
        if alike:
            joined = np.mean if metric != "dead_experts" else np.sum
            value_G = np.asarray(joined([track.value_N for track in tracks], axis=0), dtype=np.float64)
            wholes.append(Track(key=Key(metric, phase), at_N=tracks[0].at_N, value_N=value_G))
    return [*wholes, *(track for tracks in of_metric.values() for track in tracks)]


def _tested(
    name: str,
    kind: str,
    order_by: str,
    points: tuple[Point, ...],
    tracks: list[Track],
    facts: Callable[[int], tuple[Reason, ...]],
) -> History:
    ordered = sorted(tracks, key=lambda track: sort_key(track.key))
    whole = [track for track in ordered if track.key.layer is None]
    of_layers = [track for track in ordered if track.key.layer is not None]
    families: dict[tuple[str, str, int | None], list[Track]] = {}
    for track in of_layers:
        families.setdefault((track.key.metric, track.key.phase, track.key.ep), []).append(track)
    alike = kind == "steps"
    return History(
        name=name,
        kind=kind,
        order_by=order_by,
        points=points,
        tracks=tuple(_family(whole, facts, alike=alike)),
        layers=tuple(track for family in families.values() for track in _family(family, facts, alike=alike)),
    )


def _family(tracks: list[Track], facts: Callable[[int], tuple[Reason, ...]], *, alike: bool) -> list[Track]:
    """Tracks with their p values adjusted for all of them, and changes where these are small enough."""
    finite = [_finite(track) for track in tracks]
    best = [best_split(track.value_N, alike=alike) for track in finite]
    p_N = np.array([split.p for split in best if split is not None], dtype=np.float64)
    adjusted = iter(false_discovery(p_N).tolist() if len(p_N) else ())
    needed = FEWEST_STEPS if alike else FEWEST_POINTS
    result = []
    for track, split in zip(finite, best, strict=True):
        if split is None:
            few = len(track.value_N) < needed
            values: dict[str, JsonValue] = {"points": len(track.value_N), "needed": needed}
            reason = Reason(CompareCode.FEW_POINTS, values) if few else Reason(CompareCode.CONSTANT)
            result.append(replace(track, reason=reason))
            continue
        adjusted_p = next(adjusted)
        changed = adjusted_p <= level(alike=alike)
        changes = tuple(_changes(track, split, facts, alike=alike)) if changed else ()
        result.append(replace(track, p=split.p, adjusted_p=adjusted_p, changes=changes))
    return result


def _finite(track: Track) -> Track:
    finite_N = np.isfinite(track.value_N)
    return replace(track, at_N=track.at_N[finite_N], value_N=track.value_N[finite_N])


def _changes(
    track: Track, first: Split, facts: Callable[[int], tuple[Reason, ...]], *, alike: bool
) -> Iterator[Change]:
    places = splits(track.value_N, first, alike=alike)
    ends = [0, *places, len(track.value_N)]
    for before, at, after in zip(ends, ends[1:], ends[2:], strict=False):
        place = int(track.at_N[at])
        yield Change(
            at=place,
            before=float(np.median(track.value_N[before:at])),
            after=float(np.median(track.value_N[at:after])),
            facts=facts(place),
        )

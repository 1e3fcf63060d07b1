"""What ran when on one rank: phases of the program, and what happened inside each.

Spans named ``phase`` are the phases (prefill, decode, ...); all others are spans inside a phase (dispatch,
experts, combine, ...). Short gaps between spans of one phase belong to it: a host that launches the next step
is part of what decoding costs. Longer ones belong to no phase and are called idle.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import JsonValue

from observatory.analysis.energy.codes import EnergyCode
from observatory.analysis.energy.timeline import Timeline, make_timeline
from observatory.errors import EnergyError
from observatory.reasons import Reason

Int64 = npt.NDArray[np.int64]

#: Name of the spans that are phases.
_PHASE = "phase"
#: Spans around a whole layer, which add nothing to those inside.
_WHOLE = "moe_layer"
#: Name of the time of a phase that is in no span inside it.
REST = "(rest)"
#: Gaps up to this between spans of one phase belong to the phase: a host launches the next step in less.
PHASE_GAP_NS = 10_000_000
#: Neighbouring spans may overlap by as much as the times of a device's events are off, well under 0.1 ms.
_MOST_OVERLAP_NS = 100_000
#: Times beyond this, 36 years, are not times of a monotonic clock.
_MOST_NS = 1 << 60


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankPhases:
    """Phases of one rank, on its own clock.

    Attributes:
        phases: bands of the phases.
        inside: per phase, the spans inside it and :data:`REST`; phases without any are not there.
        steps: per phase, the steps that have a span.
        step_starts_ns: per phase, when its steps started, ascending.
        overlap: why there is no energy per phase: its spans overlap; None where they follow each other.
        problems: what could not be used.
    """

    phases: Timeline
    inside: dict[str, Timeline]
    steps: dict[str, frozenset[int]]
    step_starts_ns: dict[str, Int64]
    overlap: Reason | None
    problems: tuple[Reason, ...]


def rank_phases(spans: pd.DataFrame, *, gap_ns: int = PHASE_GAP_NS) -> RankPhases | Reason:
    """Phases of the rank whose spans these are, or why there are none.

    Args:
        spans: rows of one rank, columns of ``tables.SPAN_SCHEMA``.
        gap_ns: longest gap between spans of one phase that belongs to it.
    """
    timed, unusable = _timed(spans)
    bands = timed[timed["name"] == _PHASE].sort_values(["start_ns", "end_ns"], kind="stable")
    if bands.empty:
        return Reason(EnergyCode.NO_PHASE_SPANS)
    phases = _bands(bands, gap_ns)
    inside: dict[str, Timeline] = {}
    problems = [Reason(EnergyCode.UNUSABLE_SPANS, {"spans": unusable})] if unusable else []
    inner = timed[~timed["name"].isin([_PHASE, _WHOLE, REST])]
    for phase, rows in inner.groupby("phase", sort=True):
        if str(phase) in phases.names:
            try:
                inside[str(phase)] = _inside(rows, phases, str(phase))
            except EnergyError as error:
                values: dict[str, JsonValue] = {"phase": str(phase), "detail": str(error)}
                problems.append(Reason(EnergyCode.SPANS_NOT_SEPARABLE, values))
    by_phase = bands.groupby("phase", sort=True)
    return RankPhases(
        phases=phases,
        inside=inside,
        steps={str(phase): frozenset(rows["step"].unique().tolist()) for phase, rows in by_phase},
        step_starts_ns={
            str(phase): rows.groupby("step")["start_ns"].min().sort_values().to_numpy(np.int64)
            for phase, rows in by_phase
        },
        overlap=_overlap(bands),
        problems=tuple(problems),
    )


def _timed(spans: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Spans with possible times, as integers, and how many others there were."""
    fits = spans["end_ns"].notna() & spans["start_ns"].between(0, _MOST_NS)
    fits &= spans["end_ns"].between(0, _MOST_NS) & (spans["end_ns"] > spans["start_ns"])
    timed = spans[fits].astype({"start_ns": "int64", "end_ns": "int64"})
    return timed, int((~fits).sum())


def _overlap(bands: pd.DataFrame) -> Reason | None:
    """Which spans of phases, sorted by their start, lie over each other: one moment would count for both."""
    start, end = bands["start_ns"].to_numpy(np.int64), bands["end_ns"].to_numpy(np.int64)
    over_ns = np.maximum.accumulate(end)[:-1] - start[1:]
    count = int((over_ns > _MOST_OVERLAP_NS).sum())
    if not count:
        return None
    later = int(np.argmax(over_ns > _MOST_OVERLAP_NS)) + 1
    earlier = int(np.argmax(end[:later]))
    values: dict[str, JsonValue] = {
        "rank": int(bands["source_rank"].iloc[0]),
        "phase": str(bands["phase"].iloc[later]), "step": int(bands["step"].iloc[later]),
        "other_phase": str(bands["phase"].iloc[earlier]), "other_step": int(bands["step"].iloc[earlier]),
        "overlap_ms": float(over_ns[later - 1]) * 1e-6, "more": count - 1,
    }  # fmt: skip
    return Reason(EnergyCode.PHASES_OVERLAP, values)


def _bands(bands: pd.DataFrame, gap_ns: int) -> Timeline:
    """Spans of one phase that follow each other closely, joined."""
    start, end = bands["start_ns"].to_numpy(np.int64), bands["end_ns"].to_numpy(np.int64)
    phase = bands["phase"].to_numpy(object)
    fresh = np.ones(len(start), dtype=bool)
    fresh[1:] = (phase[1:] != phase[:-1]) | (start[1:] - np.maximum.accumulate(end)[:-1] > gap_ns)
    first = np.flatnonzero(fresh)
    return make_timeline(phase[first].tolist(), start[first], np.maximum.reduceat(end, first))


def _inside(spans: pd.DataFrame, phases: Timeline, phase: str) -> Timeline:
    """Spans inside one phase, cut to its bands, and the rest of the bands."""
    is_phase_M = phases.name_M == phases.names.index(phase)
    band_start, band_end = phases.start_ns_M[is_phase_M], phases.end_ns_M[is_phase_M]
    start, end = spans["start_ns"].to_numpy(np.int64), spans["end_ns"].to_numpy(np.int64)
    # A span belongs to the band it starts in.
    band = np.searchsorted(band_start, start, side="right") - 1
    held = band >= 0
    start, end, band = start[held], end[held], band[held]
    cut_end = np.minimum(end, band_end[band])
    names = spans["name"].to_numpy(object)[held]
    kept = cut_end > start
    if not kept.any():
        return make_timeline([REST] * len(band_start), band_start, band_end)
    detailed = make_timeline(names[kept].tolist(), start[kept], cut_end[kept])
    return _with_rest(detailed, band_start, band_end)


def _with_rest(detailed: Timeline, band_start: Int64, band_end: Int64) -> Timeline:
    """A timeline whose bands are filled: what nothing covers is called :data:`REST`."""
    # Between the end of one segment (or start of a band) and the start of the next (or end of the band).
    opens = np.concatenate([detailed.end_ns_M, band_start])
    closes = np.concatenate([detailed.start_ns_M, band_end])
    opens, closes = np.sort(opens), np.sort(closes)
    gap = closes > opens
    return Timeline(
        names=(*detailed.names, REST),
        **_merged(detailed, opens[gap], closes[gap]),
    )


def _merged(detailed: Timeline, start: Int64, end: Int64) -> dict[str, Int64]:
    starts = np.concatenate([detailed.start_ns_M, start])
    order = np.argsort(starts, kind="stable")
    rest = np.full(len(start), len(detailed.names), dtype=np.int64)
    return {
        "start_ns_M": starts[order],
        "end_ns_M": np.concatenate([detailed.end_ns_M, end])[order],
        "name_M": np.concatenate([detailed.name_M, rest])[order],
    }

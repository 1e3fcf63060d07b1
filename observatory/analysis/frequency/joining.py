"""What sweeps have to say beside their points when they are fitted together."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from observatory.analysis.frequency.points import CLOCK_STEP_MHZ
from observatory.errors import ClockError
from observatory.run.documents.clock_sweep import ClockPoint, ClockSweep

_MOST_NOTES = 20
_LONGEST_NOTE = 500
#: Temperatures of the chip so far apart are no accident; leakage grows with them.
_WARMER_C = 10


def idle_power_mw(sweeps: Sequence[ClockSweep]) -> float | None:
    """Median power without load, of the sweeps that began without a lock if there are any: locks raise it."""
    told = [sweep for sweep in sweeps if sweep.idle_power_mw is not None]
    free = [sweep for sweep in told if not (sweep.set_outside and _locked(sweep))]
    powers = [sweep.idle_power_mw for sweep in free or told if sweep.idle_power_mw is not None]
    return float(median(powers)) if powers else None


def refuse_repeated(sweeps: Sequence[ClockSweep], sources: Sequence[str]) -> None:
    """Refuse measurements that are given twice: they would count as repeats that agree.

    Raises:
        ClockError: a series of two sweeps has the same points.
    """
    known: dict[tuple[ClockPoint, ...], str] = {}
    for name, sweep in zip(_names(sweeps, sources), sweeps, strict=True):
        for series in sweep.series:
            if series.points in known:
                raise ClockError(
                    f"{name} and {known[series.points]} hold the same measurements, which would count twice; "
                    "give each result once"
                )
            known[series.points] = name


def _names(sweeps: Sequence[ClockSweep], sources: Sequence[str]) -> list[str]:
    return [
        sources[number][:100] if number < len(sources) else f"sweep {number + 1}"
        for number in range(len(sweeps))
    ]


def join_notes(sweeps: Sequence[ClockSweep], sources: Sequence[str]) -> list[str]:
    """What a reader of the model must know: doubts about how the sweeps fit together, and their own notes.

    Args:
        sweeps: the sweeps.
        sources: names of their files, of as many as have one.
    """
    names = _names(sweeps, sources)
    own = [
        f"of {name}: {note[:_LONGEST_NOTE]}"
        for name, sweep in zip(names, sweeps, strict=False)
        for note in sweep.notes
    ]
    if len(own) > _MOST_NOTES:
        own[_MOST_NOTES:] = [f"{len(own) - _MOST_NOTES} more notes stand in the sweeps"]
    return [*_unlike_unlocked(sweeps, names), *_unlike_warm(sweeps, names), *own]


def _points(sweep: ClockSweep) -> list[ClockPoint]:
    return [point for series in sweep.series for point in series.points]


def _locked(sweep: ClockSweep) -> bool:
    return any(point.requested_sm_clock_mhz is not None for point in _points(sweep))


def _unlike_unlocked(sweeps: Sequence[ClockSweep], names: Sequence[str]) -> list[str]:
    """Sweeps without any lock that ran at different clocks: somebody had set them, and nobody said so."""
    seen: dict[str, float] = {}
    for name, sweep in zip(names, sweeps, strict=False):
        clocks = [
            point.sm_clock_mhz for point in _points(sweep) if point.sm_clock_mhz and point.label == "ok"
        ]
        limited = any(point.requested_limit_mw is not None for point in _points(sweep))
        if clocks and not _locked(sweep) and not limited:
            seen[name] = median(clocks)
    if not seen or max(seen.values()) - min(seen.values()) <= 2 * CLOCK_STEP_MHZ:
        return []
    low, high = min(seen, key=lambda name: seen[name]), max(seen, key=lambda name: seen[name])
    return [
        f"said to be unlocked, {low} ran at {seen[low]:.0f} MHz and {high} at {seen[high]:.0f} "
        "MHz, and they are taken for repeats of one setting: where somebody had set the clock, sweep with "
        "--set-outside --clocks MHZ"
    ]


def _unlike_warm(sweeps: Sequence[ClockSweep], names: Sequence[str]) -> list[str]:
    """Sweeps whose points began at different temperatures."""
    began: dict[str, float] = {}
    for name, sweep in zip(names, sweeps, strict=False):
        told = [p.start_temperature_c for p in _points(sweep) if p.start_temperature_c is not None]
        if told:
            began[name] = median(told)
    if not began or max(began.values()) - min(began.values()) < _WARMER_C:
        return []
    cold, warm = min(began, key=lambda name: began[name]), max(began, key=lambda name: began[name])
    return [
        f"the chip had {began[cold]:.0f} C at the points of {cold} and {began[warm]:.0f} C at those of "
        f"{warm}: warm silicon draws more, a part of the difference between their clocks may be that"
    ]

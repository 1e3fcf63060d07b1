"""Frames about clocks: what sweeps measured, the curves fitted to them, and the advice that follows.

``points``  file, series, kind, label, requested_mhz, limit_w, sm_clock_mhz, repeats, iteration_ms, its _low
            and _high, energy_mj likewise (per iteration, least and greatest repeat), slowdown and saving with
            _low and _high (90 %), on_front; one row per setting
``curves``  file, series, and the columns of ``SeriesView.curve``

``file`` is the position among the files given. A sweep is fitted here; a fit is taken as it is.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from pydantic import Field, JsonValue

from observatory.advice.frequency import ClockAdvice, SeriesAdvice, recommend_clocks
from observatory.analysis.frequency import ClockModel, fit_clocks, load_clock_model
from observatory.analysis.frequency.model_file import CLOCK_MODEL_VERSION, Setting
from observatory.analysis.frequency.views import SeriesView
from observatory.analysis.statistics import Interval
from observatory.errors import ClockError
from observatory.run.documents.clock_sweep import load_sweep
from observatory.run.documents.versioned import load_document
from observatory.run.records import Record

#: Samples of a sweep that is fitted for the report; as ``clocks fit`` takes.
_BOOTSTRAP = 200
_CURVE_CLOCKS = 80
_POINTS = (
    "file", "series", "kind", "label", "requested_mhz", "limit_w", "sm_clock_mhz", "repeats", "iteration_ms",
    "iteration_ms_low", "iteration_ms_high", "energy_mj", "energy_mj_low", "energy_mj_high", "slowdown",
    "slowdown_low", "slowdown_high", "saving", "saving_low", "saving_high", "on_front",
)  # fmt: skip

PathText = str | os.PathLike[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockFile:
    """One file that was given.

    Attributes:
        path: where it was read from.
        what: ``sweep`` or ``fit``.
        model: its model.
        advice: what follows from it.
    """

    path: Path
    what: str
    model: ClockModel
    advice: ClockAdvice


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockFrames:
    """Files and frames (columns in the module's docstring).

    Attributes:
        max_slowdown: the budget of the advice.
        gaps: (name of a file, why it is left out).
    """

    files: tuple[ClockFile, ...]
    points: pd.DataFrame
    curves: pd.DataFrame
    max_slowdown: float
    gaps: tuple[tuple[str, str], ...] = ()

    def options(self) -> list[str]:
        """The options of ``observatory report`` that give these files."""
        given = [word for file in self.files for word in ("--clocks", str(file.path))]
        return [*given, "--max-slowdown", f"{self.max_slowdown:g}"]


def collect_clocks(paths: Sequence[PathText], *, max_slowdown: float = 0.02) -> ClockFrames | None:
    """Read sweeps and fits, fit the sweeps, and ask for advice; None without files.

    A sweep that cannot be fitted (too few clocks) is left out and named.

    Raises:
        ClockError: a file is neither, is damaged or of a newer schema, or the budget is none.
    """
    if not paths:
        return None
    files: list[ClockFile] = []
    gaps: list[tuple[str, str]] = []
    for path in dict.fromkeys(Path(path) for path in paths):
        try:
            what, model = _read(path)
        except _SweepNotFittedError as error:
            gaps.append((path.name, str(error)))
            continue
        advice = recommend_clocks(model, max_slowdown=max_slowdown)
        files.append(ClockFile(path=path, what=what, model=model, advice=advice))
    points = [row for index, file in enumerate(files) for row in _points(index, file)]
    curves = [
        SeriesView(fit).curve(_CURVE_CLOCKS).assign(file=index, series=series)
        for index, file in enumerate(files)
        for series, fit in enumerate(file.model.series)
    ]
    return ClockFrames(
        files=tuple(files),
        points=pd.DataFrame(points, columns=list(_POINTS)),
        curves=pd.concat(curves, ignore_index=True) if curves else pd.DataFrame({"file": [], "series": []}),
        max_slowdown=max_slowdown,
        gaps=tuple(gaps),
    )


class _Series(Record):
    settings: JsonValue = None


class _Document(Record):
    series: Annotated[tuple[_Series, ...], Field(min_length=1)]


class _SweepNotFittedError(ClockError):
    """A sweep that is valid and cannot be fitted."""


def _read(path: Path) -> tuple[str, ClockModel]:
    """What a file is and its model.

    Raises:
        ClockError: it is neither a sweep nor a fit, is damaged or of a newer schema.
        _SweepNotFittedError: it is a sweep that cannot be fitted.
    """
    document = load_document(
        _Document,
        path,
        version=CLOCK_MODEL_VERSION,
        what="clock sweep or model",
        remedy="make one with `observatory clocks sweep` or `clocks fit`",
        failure=ClockError,
    )
    if document.series[0].settings is not None:
        return "fit", load_clock_model(path)
    sweep = load_sweep(path)
    try:
        return "sweep", fit_clocks([sweep], sources=[path.name], bootstrap=_BOOTSTRAP)
    except ClockError as error:
        raise _SweepNotFittedError(f"the sweep is not shown: {error}") from error


def _points(index: int, file: ClockFile) -> list[dict[str, Any]]:
    """Every setting of a file's series as measured."""
    return [
        _point(setting, advice, {"file": index, "series": advice.index})
        for advice, fit in zip(file.advice.series, file.model.series, strict=True)
        for setting in fit.settings
    ]


def _point(setting: Setting, advice: SeriesAdvice, key: dict[str, Any]) -> dict[str, Any]:
    plane = next(
        (
            point
            for point in advice.points
            if (point.kind, point.requested_sm_clock_mhz, point.limit_mw)
            == (setting.kind, setting.requested_sm_clock_mhz, setting.limit_mw)
        ),
        None,
    )
    return {
        **key,
        "kind": setting.kind,
        "label": setting.label,
        "requested_mhz": setting.requested_sm_clock_mhz,
        "limit_w": None if setting.limit_mw is None else setting.limit_mw * 1e-3,
        "sm_clock_mhz": setting.sm_clock_mhz,
        "repeats": len(setting.iteration_s_R),
        **_spread("iteration_ms", [seconds * 1e3 for seconds in setting.iteration_s_R]),
        **_spread("energy_mj", setting.energy_mj_R),
        **_interval("slowdown", None if plane is None else plane.slowdown),
        **_interval("saving", None if plane is None else plane.saving),
        "on_front": plane is not None and plane.on_front,
    }


def _spread(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """Median, least and greatest of repeats; None without."""
    if not values:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    return {name: float(np.median(values)), f"{name}_low": min(values), f"{name}_high": max(values)}


def _interval(name: str, value: Interval | None) -> dict[str, float | None]:
    if value is None:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    return {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}

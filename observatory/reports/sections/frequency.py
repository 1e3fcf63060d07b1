"""Which SM clock serves each phase with the least energy inside a slowdown budget."""

from __future__ import annotations

import pandas as pd

from observatory.advice.frequency import SeriesAdvice
from observatory.advice.frequency_words import series_words
from observatory.advice.tables import ADVICE_COLUMNS, advice_table
from observatory.analysis.columns import Column, chosen
from observatory.analysis.frequency.tables import POINT_COLUMNS
from observatory.analysis.frequency.views import LEAST_PROBABILITY
from observatory.reports.figures.frequency import clock_curves, clock_plane
from observatory.reports.frames.frequency import ClockFile, ClockFrames
from observatory.reports.frames.report import ReportFrames
from observatory.reports.page import Block, Cell, FigureBlock, Section, Table, Variant, frame_table
from observatory.reports.text import percent, plain, shorten
from observatory.run.documents.writing import frame_records

_TITLE = "Which clock"
_MOST_ROWS = 60
_SETTINGS = (
    Column(name="asked", title="asked for", text=True),
    *chosen(POINT_COLUMNS, "label", "sm_clock_mhz"),
    Column(name="repeats", title="repeats"),
    Column(name="iteration_ms", title="iteration", unit="ms", digits=3),
    Column(name="energy_mj", title="energy", unit="mJ", legend="of one iteration"),
    *chosen(ADVICE_COLUMNS, "slowdown", "saving"),
    Column(name="on_front", title="on the front", text=True),
)
_NO_SWEEP = (
    "Which frequency saves energy is not known from one frequency: it takes the time and energy of an "
    "iteration at several. Measure with observatory clocks sweep, then pass its file with --clocks."
)


def clocks_section(frames: ReportFrames) -> Section:
    """Plane, curves and advice of every series; the reason where nothing was swept."""
    clocks = frames.clocks
    if clocks is None:
        sampled = frames.power is not None and not frames.power.samples.empty
        return Section(id="clocks", title=_TITLE, reason=_NO_SWEEP if sampled else "")
    planes, curves = [], []
    for index, file in enumerate(clocks.files):
        for advice in file.advice.series:
            plane = _plane_variant(clocks, index, file, advice)
            planes += [] if plane is None else [plane]
            curves.append(_curve_variant(clocks, index, file, advice))
    blocks: list[Block] = []
    if planes:
        blocks.append(
            FigureBlock(
                id="clock-plane",
                title="Time against energy, and the Pareto front",
                caption="Every setting as measured, relative to running unlocked (where no unlocked point "
                "counts, to the highest clock); down is less energy. Filled: on the front, no other setting "
                "is at least as good in both and better in one. Bars are 90 % intervals. The ring is the "
                "recommended clock by the curves.",
                choice="Series",
                variants=tuple(planes),
            )
        )
    if curves:
        blocks.append(
            FigureBlock(
                id="clock-curves",
                title="Time and energy of an iteration at each clock",
                caption="Against the clock that was sampled, never the one asked for. Bars run from the "
                "least to the greatest repeat; open marks did not run as asked (clamped, held by a limit, "
                "heat or the brake). Line and band: median and 90 % of the fitted curves.",
                choice="Series",
                variants=tuple(curves),
            )
        )
        blocks.append(_advice_table(clocks))
    lead = [advice_sentence(file, advice) for file in clocks.files for advice in file.advice.series]
    lead += [f"{_capital(file.advice.common.text)}." for file in clocks.files if file.advice.common]
    lead += [f"{_capital(note)}." for file in clocks.files for note in file.model.notes]
    reason = "" if curves else " ".join(f"{shorten(name)}: {plain(text)}." for name, text in clocks.gaps)
    return Section(id="clocks", title=_TITLE, lead=tuple(lead), blocks=tuple(blocks), reason=reason)


def advice_sentence(file: ClockFile, advice: SeriesAdvice) -> str:
    """The recommendation with its evidence, one sentence; the device is named at its head."""
    device = file.model.device
    name = shorten(device.name or device.uuid or "device", 32)
    title = advice.title
    text = series_words(advice, file.advice.max_slowdown)
    return f"{name}, {shorten(title, 80)}: {plain(text)}."


def _capital(text: str) -> str:
    return plain(text[:1].upper() + text[1:]).rstrip(".")


def _own(frame: pd.DataFrame, file: int, series: int) -> pd.DataFrame:
    return frame[(frame["file"] == file) & (frame["series"] == series)]


def _names(file: ClockFile, advice: SeriesAdvice) -> tuple[str, str]:
    """Group and label of a choice."""
    return shorten(file.path.name, 40), f"{shorten(advice.title, 48)} · {shorten(file.path.name, 24)}"


def _plane_variant(clocks: ClockFrames, index: int, file: ClockFile, advice: SeriesAdvice) -> Variant | None:
    points = _own(clocks.points, index, advice.index)
    points = points[points["saving"].notna()]
    if points.empty:
        return None
    curve = _own(clocks.curves, index, advice.index)
    curve = curve[(curve["sm_clock_mhz"] <= advice.reference_mhz) & curve["saving"].notna()]
    choice = advice.choice
    chosen = (
        None
        if choice is None
        else (
            choice.sm_clock_mhz,
            choice.slowdown.value,
            choice.saving.value,
        )
    )
    group, label = _names(file, advice)
    sentence = advice_sentence(file, advice)
    return Variant(
        group=group,
        label=label,
        figure=clock_plane(
            points, curve, chosen=chosen, max_slowdown=clocks.max_slowdown, reference=advice.reference_how
        ),
        alt=f"{len(points)} settings in the plane of time and energy, {int(points['on_front'].sum())} of "
        "them on the "
        f"Pareto front. {sentence}",
        note=f"{sentence} {_capital(advice.lock_against_cap.text)}.",
        numbers=_settings_table(points, advice),
    )


def _curve_variant(clocks: ClockFrames, index: int, file: ClockFile, advice: SeriesAdvice) -> Variant:
    fit = file.model.series[advice.index]
    points = _own(clocks.points, index, advice.index)
    sampled = points[points["sm_clock_mhz"].notna() & points["iteration_ms"].notna()]
    chosen_mhz = None if advice.choice is None else advice.choice.sm_clock_mhz
    group, label = _names(file, advice)
    energy = "" if fit.has_energy else f"; no energy: {plain(fit.no_power)}"
    left = [f"{item.points} points left out: {item.reason}" for item in fit.left_out]
    return Variant(
        group=group,
        label=label,
        figure=clock_curves(
            sampled,
            _own(clocks.curves, index, advice.index),
            chosen_mhz=chosen_mhz,
            reference_mhz=advice.reference_mhz,
            reference=advice.reference_how,
        ),
        alt=f"Time and energy of an iteration of {shorten(advice.title, 60)} from {fit.low_mhz:.0f} to "
        f"{fit.high_mhz:.0f} MHz.",
        note=f"{shorten(advice.title, 80)}: {fit.points} points at {len(fit.clock_mhz_K)} clocks"
        f"{energy}. {_capital(advice.behaviour.text)}."
        + (f" First: {plain(advice.behaviour.fix_first)}." if advice.behaviour.fix_first else "")
        + "".join(f" {_capital(item.text)}." for item in advice.confounds)
        + "".join(f" {_capital(text)}." for text in left),
        numbers=_settings_table(points, advice),
    )


def _settings_table(points: pd.DataFrame, advice: SeriesAdvice) -> Table:
    rows = []
    for row in frame_records(points.head(_MOST_ROWS)):
        asked = [
            f"{row[name]:.0f} {unit}"
            for name, unit in (("requested_mhz", "MHz"), ("limit_w", "W"))
            if row[name] is not None
        ]
        cell = Cell(text=" and ".join(asked) or "nothing", detail=plain(row["kind"]))
        rows.append({**row, "asked": cell})
    left = len(points) - len(rows)
    return frame_table(
        f"{shorten(advice.title, 80)}: settings as measured",
        _SETTINGS,
        rows,
        note=f"Medians of repeats.{f' {left} more rows in the file.' if left else ''}",
    )


def _advice_table(clocks: ClockFrames) -> Table:
    rows = [
        {
            **row,
            "series": Cell(text=shorten(advice.title, 60), detail=shorten(file.path.name, 40)),
            "lock_mhz": row["lock_mhz"] if advice.choice else Cell(text=plain(advice.verdict)),
            "behaviour": Cell(text=row["behaviour"], detail=_agreement(advice.behaviour.agreement)),
        }
        for file in clocks.files
        for advice, row in zip(file.advice.series, advice_table(file.advice).rows, strict=True)
    ]
    return frame_table(
        f"The clock of least energy for at most {100 * clocks.max_slowdown:.3g} % more time",
        ADVICE_COLUMNS,
        rows,
        note=f"The budget is kept with a probability of at least {percent(LEAST_PROBABILITY, 0)}. Nothing "
        "was set; observatory clocks recommend prints the commands.",
        leave_out=("verdict",),
        below={
            "reference_mhz": "reference_how",
            "mj_per_token": "reference_mj_per_token",
            "edp_mhz": "ed2p_mhz",
        },
    )


def _agreement(share: float | None) -> str:
    return "" if share is None else f"{percent(share, 0)} of samples agree on the curve"

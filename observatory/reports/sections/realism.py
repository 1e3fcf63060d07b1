"""What realism costs: captured traffic replayed against mock traffic of equal volume."""

from __future__ import annotations

from typing import Any

import pandas as pd

from observatory.analysis.columns import Column
from observatory.analysis.network.documents import REALISM_COLUMNS
from observatory.reports.figures.realism import realism_by_layer
from observatory.reports.frames.benchmarks import BenchmarkFrames
from observatory.reports.frames.report import ReportFrames, each_group, each_row
from observatory.reports.page import Cell, FigureBlock, Section, Table, Variant, frame_table
from observatory.reports.sections.common import phases_in, replay_name, run_choice, run_keys
from observatory.reports.text import count, interval, microseconds, plain, shorten, times
from observatory.run.documents.writing import frame_records

_TITLE = "Mock traffic against real: what realism costs"
#: Fewer steps make an interval that is itself a rough guess.
_FEW_STEPS = 8
_MOST_ROWS = 120
_PLACE = Column(name="place", title="phase and role", text=True)
_READING = Column(name="reading", title="reading", text=True)


def realism_section(frames: ReportFrames, benchmarks: BenchmarkFrames) -> Section:
    """A figure per replay, algorithm and phase, and a table of the pooled numbers."""
    variants = []
    for (replay, run, algorithm), group in _by_replay(benchmarks):
        for phase in phases_in(group):
            rows = group[(group["phase"] == phase) & group["layer"].notna()]
            if len(rows):
                whole = pooled(group, phase)
                variants.append(
                    _variant(frames, benchmarks, int(replay), int(run), str(algorithm), whole, rows)
                )
    if not variants:
        return Section(id="realism", title=_TITLE)
    return Section(
        id="realism",
        title=_TITLE,
        short="Mock against real",
        lead=(
            "The traffic matrices that the run's routing made were sent again, each paired with uniform "
            "traffic of the same volume: what random tokens, and most benchmarks, would have sent. The model "
            "does not run meanwhile, so the difference is what the unevenness of real traffic costs on this "
            "fabric.",
        ),
        blocks=(
            FigureBlock(
                id="realism-layers",
                title="Captured against uniform traffic, per layer",
                caption="Above: time of captured over uniform traffic, 1 is no difference. Below: what one "
                "exchange takes more. Time is that of the slowest rank, median of repeats; bars are 90 % "
                "intervals over steps.",
                choice="Replay",
                variants=tuple(variants),
            ),
            _pooled_table(frames, benchmarks),
        ),
    )


def realism_verdict(row: Any) -> str:
    """What an interval allows to say about the ratio."""
    if pd.isna(row.ratio_low):
        return "no interval: one step was replayed"
    if row.ratio_low > 1:
        return "captured traffic takes longer"
    if row.ratio_high < 1:
        return "captured traffic takes less time"
    return "no difference beyond the interval"


def pooled(rows: pd.DataFrame, phase: str) -> Any:
    """The row of one phase over all layers and both roles."""
    whole = rows[(rows["phase"] == phase) & rows["layer"].isna() & rows["role"].isna()]
    return next(each_row(whole))


def _by_replay(benchmarks: BenchmarkFrames) -> list[tuple[Any, pd.DataFrame]]:
    return list(each_group(benchmarks.realism, ["replay", "run", "algorithm"]))


def _variant(
    frames: ReportFrames,
    benchmarks: BenchmarkFrames,
    replay: int,
    run: int,
    algorithm: str,
    whole: Any,
    rows: pd.DataFrame,
) -> Variant:
    phase = shorten(whole.phase, 24)
    of_run = frames.runs.iloc[run]
    where = f"{replay_name(frames, benchmarks, replay)}, {shorten(algorithm, 24)}, {phase}"
    result = benchmarks.files.replays[replay].document
    steps = int(rows["steps"].max())
    notes = [shorten(note, 160) for note in result.notes]
    return Variant(
        group=shorten(of_run["label"]),
        label=f"{run_choice(of_run['label'], of_run['condition'], phase)} · {shorten(algorithm, 24)}",
        keys=run_keys(of_run["label"], of_run["condition"], phase),
        figure=realism_by_layer(rows),
        alt=f"Dots with intervals for {where}: captured over uniform time per layer, from "
        f"{times(rows['ratio'].min())} to {times(rows['ratio'].max())}.",
        note=f"{where}: {_sentence(whole)} {count(whole.exchanges)} pairs of exchanges from {steps} steps, "
        f"{result.repeats} repeats of {result.iterations} exchanges each."
        + (f" An interval from {steps} steps is itself rough." if 1 < steps < _FEW_STEPS else "")
        + (f" The replay notes: {'; '.join(notes)}." if notes else ""),
        numbers=_numbers(rows, where),
    )


def _sentence(row: Any) -> str:
    return (
        f"{times(row.ratio)} ({interval(row.ratio_low, row.ratio_high, 2)}) the time of uniform traffic, "
        f"{microseconds(row.extra_us, signed=True)} per exchange; {realism_verdict(row)}."
    )


def _numbers(rows: pd.DataFrame, where: str) -> Table:
    shown = rows.sort_values(["layer", "role"], ascending=[True, False]).head(_MOST_ROWS)
    left_out = len(rows) - len(shown)
    return frame_table(
        f"{where}: mean time of one exchange",
        REALISM_COLUMNS,
        frame_records(shown),
        note=f"{left_out} more rows: observatory replay RUN --json." if left_out else "",
        leave_out=("algorithm", "phase"),
    )


def _pooled_table(frames: ReportFrames, benchmarks: BenchmarkFrames) -> Table:
    several = len(benchmarks.files.replays) > 1
    rows = []
    for (replay, run, algorithm), group in _by_replay(benchmarks):
        of_run = [shorten(frames.runs.loc[int(run), "label"]), shorten(algorithm, 24)]
        of_run += [shorten(benchmarks.files.replays[int(replay)].name, 32)] if several else []
        for phase in phases_in(group):
            of_phase = group[(group["phase"] == phase) & group["layer"].isna()]
            for row in each_row(of_phase.sort_values("role", ascending=False, na_position="first")):
                what = f"{shorten(phase, 24)}, {'both ways' if pd.isna(row.role) else plain(row.role)}"
                place = Cell(text=what, detail=", ".join(of_run))
                rows.append({**row._asdict(), "place": place, "reading": realism_verdict(row)})
    return frame_table(
        "Over all layers",
        (_PLACE, *(column for column in REALISM_COLUMNS if not column.key), _READING),
        rows,
        note="Means of one exchange; the ratio is of sums over steps.",
    )

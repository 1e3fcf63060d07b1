"""Values of a run over its steps, as events of TensorBoard.

Written by TensorBoard's own writer, without torch or TensorFlow. Tags:

    loads/layer 3                     histogram: x is the expert, the height its assignments in the step
    gini/layer 3                      of these loads (`analysis.routing.imbalance`)
    max over mean/layer 3             likewise
    step/ms, step/tokens              of the rank that takes longest; of all ranks
    waiting ms/rank 0                 waiting in exchanges, summed over the step; transfer ms likewise
    power W/DEVICE (rank 0)           mean of the readings that lie in the step; SM clock MHz likewise

Shapes: S steps, E experts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pandas as pd

from observatory.analysis.exchange.alignment import rank_clocks, to_reference_ns
from observatory.analysis.exchange.waiting import wait_and_transfer
from observatory.analysis.routing.imbalance import gini_rows, max_over_mean_rows
from observatory.analysis.step_times import step_times
from observatory.errors import RunError
from observatory.run import Run
from observatory.run.files import one_line

Int64 = npt.NDArray[np.int64]
#: Name of the tag, column, and what one unit of the column is in that of the name.
_READINGS = (
    ("power W", "power_mw", 1e-3),
    ("power W, mean of the last second", "average_power_mw", 1e-3),
    ("SM clock MHz", "sm_clock_mhz", 1.0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A value of one step, or a histogram.

    Attributes:
        tag: as TensorBoard shows it; what stands before the first slash is its group.
        step: number of the step.
        value: finite number; or, (E,), heights of bars at 0 to E - 1.
    """

    tag: str
    step: int
    value: float | Int64


class EventFile:
    """The event file of one TensorBoard run.

    Args:
        folder: where it is written.
        unix_s: wall-clock time of the steps that ``unix_of`` leaves out.
        unix_of: Unix time in seconds of the beginning of each step that was timed.

    Raises:
        RunError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, *, unix_s: float, unix_of: Mapping[int, float]) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise RunError(
                f"TensorBoard's writer cannot be loaded ({one_line(error, 80)})",
                remedy="pip install 'moe-observatory[tensorboard]'",
            ) from error
        self._events, self._summaries = event_pb2, summary_pb2
        self._unix_s, self._unix_of = unix_s, unix_of
        self._writer = EventFileWriter(str(folder))

    def add(self, point: Point) -> None:
        """Write a point."""
        value: Any
        if isinstance(point.value, np.ndarray):
            used = np.flatnonzero(point.value)  # TensorBoard drops empty bars on both ends
            value = self._summaries.Summary.Value(
                tag=point.tag,
                histo=self._summaries.HistogramProto(
                    min=used[0] - 0.5 if used.size else -0.5,
                    max=used[-1] + 0.5 if used.size else -0.5,
                    num=float(point.value.sum()),
                    bucket_limit=[expert + 0.5 for expert in range(len(point.value))],
                    bucket=point.value.tolist(),
                ),
            )
        else:
            value = self._summaries.Summary.Value(tag=point.tag, simple_value=point.value)
        self._writer.add_event(
            self._events.Event(
                wall_time=self._unix_of.get(point.step, self._unix_s),
                step=point.step,
                summary=self._summaries.Summary(value=[value]),
            )
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """What is read of a run once, for all phases.

    Attributes:
        run: the run.
        routed: its ``routed_tokens``.
        timed: `step_times`.
        phase_spans: spans of phases that have ended, with ``start`` and ``end`` on the reference's clock.
        waits: `wait_and_transfer` of all exchanges; empty without any.
        ahead_ns: Unix time less the reference's clock; None where it is not known.
    """

    run: Run
    routed: pd.DataFrame
    timed: pd.DataFrame
    phase_spans: pd.DataFrame
    waits: pd.DataFrame
    ahead_ns: int | None

    @classmethod
    def of(cls, run: Run) -> Self:
        """Read them."""
        manifest = run.manifest
        clocks = rank_clocks(manifest)
        reference = next((clock.reference_rank for clock in clocks.values() if clock), 0)
        raw = {status.rank: status.clock for status in manifest.ranks}.get(reference)
        spans = run.spans()
        spans = spans[(spans["name"] == "phase") & spans["end_ns"].notna()]
        waits = pd.DataFrame()
        if run.row_count("exchange"):
            topology = manifest.topology
            waits = wait_and_transfer(
                run.exchanges(arrow_lists=True),
                ranks=topology.ranks,
                clocks=clocks,
                node_of_rank=topology.node_of_rank,
            )
        return cls(
            run=run,
            routed=run.routed_tokens(),
            timed=step_times(run),
            phase_spans=spans.assign(
                start=_on_reference(run, spans, "start_ns"), end=_on_reference(run, spans, "end_ns")
            ),
            waits=waits,
            ahead_ns=None if raw is None else raw.unix_minus_monotonic_ns,
        )

    def steps_of(self, phase: str) -> set[int]:
        """Steps of a phase with loads, times or exchanges."""
        routed, waits = self.routed, self.waits
        return {
            *(waits.loc[waits["phase"] == phase, "step"].tolist() if len(waits) else ()),
            *routed.loc[routed["phase"] == phase, "step"].tolist(),
            *self.phase_spans.loc[self.phase_spans["phase"] == phase, "step"].tolist(),
        }

    def unix_of(self, phase: str) -> dict[int, float]:
        """Unix time in seconds at which each timed step began."""
        if self.ahead_ns is None:
            return {}
        own = self.phase_spans[self.phase_spans["phase"] == phase]
        began = own.groupby("step")["start"].min()
        return {int(str(step)): (int(at) + self.ahead_ns) * 1e-9 for step, at in began.items()}


def points_of(
    tables: Tables, phase: str, *, steps: Collection[int], layers: Collection[int] | None
) -> Iterator[Point]:
    """Everything of a phase in these steps, each tag in the order of its steps."""
    yield from _loads(tables.run, phase, steps, layers)
    timed = tables.timed[(tables.timed["phase"] == phase) & tables.timed["step"].isin(steps)]
    for row in timed.to_dict("records"):
        yield Point(tag="step/ms", step=row["step"], value=row["ms"])
        if row["tokens"] == row["tokens"]:
            yield Point(tag="step/tokens", step=row["step"], value=row["tokens"])
    yield from _waits(tables.waits, phase, steps, layers)
    yield from _readings(tables, phase, steps)


def _loads(run: Run, phase: str, steps: Collection[int], layers: Collection[int] | None) -> Iterator[Point]:
    for block in run.iter_loads(phase=phase, layers=layers):
        load_SE = block.load_SE
        measures = {"gini": gini_rows(load_SE), "max over mean": max_over_mean_rows(load_SE)}
        for place, step in enumerate(block.step_S.tolist()):
            if step not in steps:
                continue
            yield Point(tag=f"loads/layer {block.layer}", step=step, value=load_SE[place])
            for name, value_S in measures.items():
                if np.isfinite(value_S[place]):
                    yield Point(tag=f"{name}/layer {block.layer}", step=step, value=float(value_S[place]))


def _waits(
    waits: pd.DataFrame, phase: str, steps: Collection[int], layers: Collection[int] | None
) -> Iterator[Point]:
    """Sums over a step's exchanges; none where one of them is not known."""
    if waits.empty:
        return
    own = waits[(waits["phase"] == phase) & waits["step"].isin(steps)]
    if layers is not None:
        own = own[own["layer"].isna() | own["layer"].isin(layers)]
    for (step, rank), rows in own.groupby(["step", "source_rank"]):
        for name, column in (("waiting ms", "wait_s"), ("transfer ms", "transfer_s")):
            total = float(rows[column].sum(skipna=False))
            if np.isfinite(total):
                yield Point(tag=f"{name}/rank {rank}", step=int(str(step)), value=total * 1e3)


def _readings(tables: Tables, phase: str, steps: Collection[int]) -> Iterator[Point]:
    """Mean reading of each device in each step, from when its first rank begins to when its last ends."""
    own = tables.phase_spans[(tables.phase_spans["phase"] == phase) & tables.phase_spans["step"].isin(steps)]
    if own.empty or not tables.run.row_count("power"):
        return
    step_S, start_S, end_S = _apart(own)
    power = tables.run.power()
    power = power.assign(at=_on_reference(tables.run, power, "time_ns"))
    for (rank, uuid), rows in power.groupby(["source_rank", "device_uuid"]):
        at = rows["at"].to_numpy(np.int64)
        place = np.searchsorted(start_S, at, side="right") - 1
        inside = (place >= 0) & (at <= end_S[np.maximum(place, 0)])
        for name, column, factor in _READINGS:
            if column not in rows:
                continue
            known = rows[column].to_numpy(np.float64, na_value=np.nan)
            means = pd.Series(known[inside]).groupby(place[inside]).mean().dropna()
            for index, mean in means.items():
                yield Point(
                    tag=f"{name}/{one_line(uuid, 80)} (rank {rank})",
                    step=int(step_S[int(str(index))]),
                    value=float(mean) * factor,
                )


def _apart(spans: pd.DataFrame) -> tuple[Int64, Int64, Int64]:
    """Number, start and end of each step in order of time; one that still runs ends where the next begins."""
    bounds = spans.groupby("step").agg(start=("start", "min"), end=("end", "max")).sort_values("start")
    start_S, end_S = bounds["start"].to_numpy(np.int64), bounds["end"].to_numpy(np.int64).copy()
    end_S[:-1] = np.minimum(end_S[:-1], start_S[1:] - 1)
    return bounds.index.to_numpy(np.int64), start_S, end_S


def _on_reference(run: Run, rows: pd.DataFrame, column: str) -> Int64:
    """Times of rows of several ranks on the reference's clock; a rank's own where it is not aligned."""
    clocks = rank_clocks(run.manifest)
    time_N = rows[column].to_numpy(np.int64).copy()
    rank_N = rows["source_rank"].to_numpy(np.int64)
    for rank in np.unique(rank_N).tolist():
        time_N[rank_N == rank] = to_reference_ns(time_N[rank_N == rank], clocks.get(rank))[0]
    return time_N

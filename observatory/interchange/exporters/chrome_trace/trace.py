"""A run as a trace in the Trace Event Format, for Perfetto and chrome://tracing.

One process per rank with its phases, layers, what happens inside them, and its exchanges; one process per
sampled device with counters of power, clocks and temperature and slices of the driver's event reasons. All
times are microseconds after the run's first event, on the reference rank's clock; ``baseTimeNanoseconds`` is
that event's Unix time where the run knows it. Rows are read a row group at a time, twice (the first time for
where time begins), and never held.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from observatory.analysis.exchange.alignment import clock_problem
from observatory.analysis.exchange.words import sentence
from observatory.errors import RunError
from observatory.interchange.exporters.chrome_trace.devices import COUNTERS, DeviceTrack
from observatory.interchange.exporters.chrome_trace.lanes import Lanes, metadata
from observatory.interchange.exporters.chrome_trace.rows import (
    Chosen,
    choose_steps,
    exchange_events,
    rows_of,
    span_events,
)
from observatory.interchange.exporters.chrome_trace.survey import Survey, column_ns, survey_run
from observatory.run import Run
from observatory.run.files import committed, committed_folder, is_free

Int64 = npt.NDArray[np.int64]
Event = dict[str, Any]

#: Devices' processes are numbered from here; ranks' from 1.
_FIRST_DEVICE = 1_000_001
_NEAR_NS = 1_000_000_000
_MANY_EVENTS = 2_000_000
_DEFAULT_PERIOD_NS = 50_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ChromeTrace:
    """What was written.

    Attributes:
        files: in the order of ranks.
        events: events in all of them, metadata included.
        notes: what a reader of the trace must know.
    """

    files: tuple[Path, ...]
    events: int
    notes: tuple[str, ...]


def write_chrome_trace(
    run: Run,
    out: Path,
    *,
    phase: str | None = None,
    layers: Collection[int] | None = None,
    steps: int | None = None,
) -> ChromeTrace:
    """Write the trace of a run.

    Args:
        run: the run.
        out: a file (``.json``, or ``.json.gz`` to compress it) for all ranks, or a new folder for one file
            per rank.
        phase: only this phase; of the samples, those from the first event left to a second after the last.
        layers: only these layers, and what belongs to none.
        steps: at most so many steps of each phase, evenly spread.

    Raises:
        RunError: ``out`` is there already, or there is nothing to write.
    """
    single = out.name.endswith((".json", ".json.gz"))
    if out.exists() if single else not is_free(out):
        raise RunError(f"{out} is there already and not an empty folder; give another --out")
    chosen = Chosen(phase=phase, layers=layers, steps=choose_steps(run, phase, steps))
    survey = survey_run(run, chosen)
    if not survey.first_ns:
        raise RunError(
            f"run {run.path} holds no spans, exchanges or power samples of what was asked for; capture it "
            "with exchanges or power, or leave out --phase, --layer and --steps"
        )
    tracing = Tracing(run, chosen, survey)
    ranks = sorted(survey.first_ns)
    files = []
    if single:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_trace(out, tracing, ranks)
        files.append(out)
    else:
        with committed_folder(out) as folder:
            for rank in ranks:
                write_trace(folder / f"rank-{rank:05d}.json", tracing, [rank])
        files = [out / f"rank-{rank:05d}.json" for rank in ranks]
    return ChromeTrace(files=tuple(files), events=tracing.events, notes=tuple(tracing.notes()))


def write_trace(
    path: Path, tracing: Tracing, ranks: list[int], *, adapt: Callable[[Event], Event] | None = None
) -> None:
    """One file, whole or not at all; ``adapt`` puts each event into the words of a certain viewer."""
    with committed(path) as temporary:
        opened: TextIO
        if path.name.endswith(".gz"):
            opened = gzip.open(temporary, "wt", encoding="ascii", compresslevel=6)  # noqa: SIM115
        else:
            opened = temporary.open("w", encoding="ascii")
        with opened as handle:
            head = json.dumps(tracing.head(ranks), allow_nan=False)
            handle.write(head[:-1] + ', "traceEvents": [\n')
            separator = ""
            for event in tracing.all_events(ranks):
                shown = event if adapt is None else adapt(event)
                handle.write(separator + json.dumps(shown, allow_nan=False, separators=(",", ":")))
                separator = ",\n"
            handle.write("\n]}\n")


def _at(time_ns: int, pid: int, tid: int) -> Event:
    return {"ts": time_ns / 1e3, "pid": pid, "tid": tid}


class Tracing:
    """Events of a run, rank by rank."""

    def __init__(self, run: Run, chosen: Chosen, survey: Survey) -> None:
        self.run, self.chosen, self.survey = run, chosen, survey
        self.unaligned = {
            rank: sentence(problem)
            for rank in survey.first_ns
            if (problem := clock_problem(survey.clocks, rank)) is not None
        }
        aligned = [first for rank, first in survey.first_ns.items() if rank not in self.unaligned]
        self.base_ns = min(aligned or survey.first_ns.values())
        self.end_ns = max(
            [last for rank, last in survey.last_ns.items() if rank not in self.unaligned]
            or survey.last_ns.values()
        )
        self.device_pid = {key: _FIRST_DEVICE + index for index, key in enumerate(sorted(survey.reported))}
        self.events = 0
        self.crowded = 0

    def trace_ns(self, rank: int, own_ns: Int64) -> Int64:
        """Times of the trace; an unaligned rank begins at 0."""
        base = self.survey.first_ns[rank] if rank in self.unaligned else self.base_ns
        return self.survey.placed(rank, own_ns) - base

    def head(self, ranks: list[int]) -> dict[str, Any]:
        """Everything of the file but its events."""
        manifest = self.run.manifest
        reference = next((clock.reference_rank for clock in self.survey.clocks.values() if clock), 0)
        raw = {status.rank: status.clock for status in manifest.ranks}.get(reference)
        ahead = None if raw is None else raw.unix_minus_monotonic_ns
        about = {
            "producer": "moe-observatory",
            "run_id": manifest.run_id[:200],
            "model": manifest.model.name[:200],
            "ranks": ranks,
            "first_event_monotonic_ns": self.base_ns,
            "clock": f"monotonic clock of rank {reference}",
            "notes": self.notes(),
        }
        document: dict[str, Any] = {"displayTimeUnit": "ms", "otherData": about}
        if ahead is not None:
            document["baseTimeNanoseconds"] = self.base_ns + ahead
        if len(ranks) == 1:
            document["distributedInfo"] = {"rank": ranks[0], "world_size": manifest.topology.ranks}
        return document

    def notes(self) -> list[str]:
        """What a reader of the trace must know."""
        notes = [
            f"rank {rank}: {problem}; its first event is put at 0" for rank, problem in self.unaligned.items()
        ]
        if self.survey.unfinished:
            notes.append(f"{self.survey.unfinished} spans or exchanges have no end and are marks")
        if self.crowded:
            notes.append(f"{self.crowded} events overlap others on the last lane")
        if self.events > _MANY_EVENTS:
            notes.append(
                f"{self.events} events are more than viewers like; choose --phase, --layer or --steps, or a "
                "folder (one file per rank)"
            )
        return [*notes, *self.run.problems]

    def all_events(self, ranks: list[int]) -> Iterator[Event]:
        """Events of these ranks and of the devices that they sampled."""
        for events in (
            self._spans(ranks),
            self._marks(ranks),
            self._exchanges(ranks),
            self._devices(ranks),
        ):
            for event in events:
                self.events += 1
                yield event

    def _spans(self, ranks: list[int]) -> Iterator[Event]:
        for rank in ranks:
            label = " (clock not aligned)" if rank in self.unaligned else ""
            yield metadata("process_name", rank + 1, name=f"rank {rank}{label}")
            yield metadata("process_sort_index", rank + 1, sort_index=rank)
        yield from self._slices(
            "spans", ranks, span_events, {"phases": 100, "layers": 200, "inside layers": 300}
        )

    def _marks(self, ranks: list[int]) -> Iterator[Event]:
        """Moments that were named while the run was captured; none before the first event of the trace."""
        for status in self.run.manifest.ranks:
            if status.rank in ranks and status.marks:
                own_ns = np.array([mark.time_ns for mark in status.marks], dtype=np.int64)
                times_ns = self.trace_ns(status.rank, own_ns).tolist()
                for mark, at_ns in zip(status.marks, times_ns, strict=True):
                    if at_ns >= 0:
                        event = {"name": mark.name, "cat": "mark", "args": {"step": mark.step}}
                        yield event | _at(at_ns, status.rank + 1, 0) | {"ph": "i", "s": "p"}

    def _exchanges(self, ranks: list[int]) -> Iterator[Event]:
        yield from self._slices("exchange", ranks, exchange_events, {"exchanges": 1000})

    def _slices(
        self,
        table: str,
        ranks: list[int],
        make: Callable[[pa.Table], Iterator[tuple[str, Event]]],
        tids: dict[str, int],
    ) -> Iterator[Event]:
        """Slices of one table on their lanes."""
        lanes = {
            (rank, name): Lanes(name, pid=rank + 1, tid=tid) for rank in ranks for name, tid in tids.items()
        }
        for rows in rows_of(self.run, table):
            chosen_rows = self.chosen.of(rows)
            if not chosen_rows.num_rows or chosen_rows.column("source_rank")[0].as_py() not in ranks:
                continue
            chosen_rows = chosen_rows.sort_by("start_ns")
            rank = chosen_rows.column("source_rank")[0].as_py()
            start = self.trace_ns(rank, column_ns(chosen_rows, "start_ns"))
            end_own = chosen_rows.column("end_ns").fill_null(0).to_numpy().astype(np.int64)
            end = self.trace_ns(rank, end_own)
            open_ended = chosen_rows.column("end_ns").is_null().to_numpy()
            for index, (track, event) in enumerate(make(chosen_rows)):
                begin, stop = int(start[index]), int(end[index])
                if open_ended[index] or stop < begin:
                    event["args"]["problem"] = "it has no end"
                    yield event | _at(begin, rank + 1, tids[track]) | {"ph": "i", "s": "t"}
                    continue
                tid, named = lanes[rank, track].place(begin, stop)
                yield from named
                yield event | _at(begin, rank + 1, tid) | {"ph": "X", "dur": (stop - begin) / 1e3}
        self.crowded += sum(lane.crowded for lane in lanes.values())

    def _devices(self, ranks: list[int]) -> Iterator[Event]:
        """Counters and reasons of the devices that these ranks sampled."""
        tracks = {key: self._track(key) for key in self.device_pid if key[0] in ranks}
        for key, track in tracks.items():
            yield metadata("process_name", track.pid, name=self._device_name(key))
            yield metadata("process_sort_index", track.pid, sort_index=track.pid)
        until_ns = self.end_ns - self.base_ns + _NEAR_NS
        for rows in rows_of(self.run, "power"):
            rank = rows.column("source_rank")[0].as_py()
            if rank not in ranks:
                continue
            samples = rows.sort_by("time_ns").select(["time_ns", "device_uuid", *COUNTERS, "event_reasons"])
            time_ns = self.trace_ns(rank, column_ns(samples, "time_ns"))
            for at, row in zip(time_ns.tolist(), samples.to_pylist(), strict=True):
                if not self.chosen.narrows or 0 <= at <= until_ns:
                    yield from tracks[rank, row["device_uuid"]].sample(at, row)
        for track in tracks.values():
            yield from track.end()

    def _track(self, key: tuple[int, str]) -> DeviceTrack:
        reported = self.survey.reported[key]
        columns = ["power_mw"] if "power_mw" in reported else []
        columns += ["average_power_mw"] if not columns and "average_power_mw" in reported else []
        columns += ["energy_mj"] if not columns and "energy_mj" in reported else []
        always = ("sm_clock_mhz", "memory_clock_mhz", "temperature_c", "enforced_limit_mw")
        columns += [name for name in always if name in reported]
        power = {status.rank: status.power for status in self.run.manifest.ranks}.get(key[0])
        period_s = None if power is None else power.period_s
        period_ns = round(period_s * 1e9) if period_s and 0 < period_s < 3600 else _DEFAULT_PERIOD_NS
        return DeviceTrack(pid=self.device_pid[key], columns=tuple(columns), period_ns=period_ns)

    def _device_name(self, key: tuple[int, str]) -> str:
        spec = self.run.manifest.device_specs.get(key[1])
        name = "" if spec is None or not spec.name else f"{spec.name[:80]} "
        note = "" if self.survey.reported[key] else ": no readings"
        return f"{name}{key[1][:120]} (sampled by rank {key[0]}){note}"

"""Kineto: the chrome traces of PyTorch's profiler, one file for each rank.

What an exchange is follows from arguments and from what launched a kernel, not from the kernel's name: NCCL
names kernels of other collectives ``SendRecv`` too. Three generations are read: kernels whose arguments state
the collective (since 2024); kernels that state nothing, by their launch inside an annotation
``nccl:all_to_all`` (before); annotations of other backends, in the order of the calls. Times of kernels
include waiting for other ranks.

A file is streamed: only events of exchanges are kept.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from observatory.interchange.importers.alignment import Exchange, align_ranks
from observatory.interchange.importers.imported import UNIX_CLOCK, ImportedRun, ImportOptions, Rows
from observatory.interchange.importers.json_stream import stream_json
from observatory.interchange.importers.sources import Source
from observatory.run.manifest import ModelSpec
from observatory.run.tables import EXCHANGE_SCHEMA
from observatory.text import counted

_ELEMENT_BYTES = {
    **dict.fromkeys(("byte", "char", "unsigned char", "signed char", "bool"), 1),
    **dict.fromkeys(("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"), 1),
    **dict.fromkeys(("half", "bfloat16", "short", "c10::half", "c10::bfloat16", "short int"), 2),
    **dict.fromkeys(("float", "int", "unsigned int"), 4),
    **dict.fromkeys(("double", "long", "long int", "long long"), 8),
}
_ANNOTATION = re.compile(r"(\w{1,16}):all_?to_?all\w{0,10}")
_STEP = re.compile(r"ProfilerStep#(\d{1,15})")
_NUMBERS = re.compile(r"\[\s*(?:\d{1,18}\s*(?:,\s*\d{1,18}\s*)*)?\]")
_LAUNCHES = frozenset({"cuda_runtime", "cuda_driver", "hip_runtime"})
_EVENTS = "traceEvents"
_MOST_RANKS = 4096
_MOST_EXCHANGES = 1 << 20
_MOST_BYTES = 1 << 50


@dataclass(frozen=True, kw_only=True, slots=True)
class _Event:
    """A stretch of time on a thread, nanoseconds, with what its arguments state."""

    start_ns: int
    end_ns: int
    thread: object = None
    name: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class _Trace:
    """What is kept of one file.

    Attributes:
        rank, ranks: as it states; None where it does not.
        calls: operators that exchange, in order of time.
        annotations: of backends, likewise.
        kernels: of communication, by what correlates them with their launch.
        launches: when, and on which thread, the kernels were launched.
        steps: numbers and starts of the profiler's steps.
        base_ns: what is to be added to all times.
    """

    source: Source
    rank: int | None = None
    ranks: int | None = None
    calls: list[_Event] = field(default_factory=list)
    annotations: list[_Event] = field(default_factory=list)
    kernels: list[tuple[object, _Event]] = field(default_factory=list)
    launches: dict[object, _Event] = field(default_factory=dict)
    steps: list[tuple[int, int]] = field(default_factory=list)
    base_ns: int = 0


def recognises(head: bytes) -> bool:
    """Whether a file begins like one of this format."""
    return head.lstrip()[:1] == b"{" and (
        b'"traceEvents"' in head or (b'"schemaVersion"' in head and b'"deviceProperties"' in head)
    )


def read(sources: Sequence[Source], options: ImportOptions) -> ImportedRun:
    """All-to-alls of the ranks of one run.

    Raises:
        InterchangeError: a file is no trace, holds no all-to-all, or its rank is that of another file.
    """
    notes: list[str] = []
    traces = [_read_trace(source) for source in sources]
    _name_ranks(traces, notes)
    world = max(*(trace.ranks or 0 for trace in traces), *((trace.rank or 0) + 1 for trace in traces), 1)
    if world > _MOST_RANKS:
        raise sources[0].refused(f"is of {world} ranks", expected=f"at most {_MOST_RANKS}")
    exchanges = {trace.rank or 0: list(_exchanges(trace, world, notes)) for trace in traces}
    for trace in traces:
        if not exchanges[trace.rank or 0]:
            raise trace.source.refused("holds no all-to-all whose time is known")
    clocks, problem = align_ranks(exchanges)
    if len(traces) > 1:
        notes.append(problem or "clocks of the ranks are aligned by the exchanges that they share")
    return ImportedRun(
        version=None,
        model=ModelSpec(name=options.model_name(sources)),
        ranks=world,
        rows=_rows(exchanges, options.phase),
        clocks={rank: clocks.get(rank, UNIX_CLOCK) for rank in exchanges},
        notes=notes,
    )


def _name_ranks(traces: Sequence[_Trace], notes: list[str]) -> None:
    if any(trace.rank is None for trace in traces):
        notes.append("a trace does not state its rank: files are ranks in the order given")
        for number, trace in enumerate(traces):
            trace.rank = number
    ranks = [trace.rank for trace in traces]
    for trace in traces:
        if ranks.count(trace.rank) > 1:
            raise trace.source.refused(f"and another file are of rank {trace.rank}", remedy="import one")


def _read_trace(source: Source) -> _Trace:
    trace = _Trace(source=source)
    base_ns = 0
    is_trace = False
    for key, value in stream_json(source, _EVENTS):
        is_trace |= key == _EVENTS
        if key == "distributedInfo" and isinstance(value, dict):
            trace.rank, trace.ranks = _whole(value.get("rank")), _whole(value.get("world_size"))
        elif key == "baseTimeNanoseconds":
            base_ns = _whole(value) or 0
        elif key == _EVENTS and isinstance(value, dict) and value.get("ph") == "X":
            _keep(trace, value)
    if not is_trace:
        raise source.refused("holds no traceEvents")
    if trace.kernels:
        wanted = {correlation for correlation, _ in trace.kernels}
        for key, value in stream_json(source, _EVENTS):
            if key == _EVENTS and isinstance(value, dict) and value.get("cat") in _LAUNCHES:
                correlation = _arguments(value).get("correlation")
                if isinstance(correlation, int) and correlation in wanted:
                    trace.launches[correlation] = _event(source, value)
    for events in (trace.calls, trace.annotations):
        events.sort(key=lambda event: event.start_ns)
    trace.steps.sort(key=lambda step: step[1])
    trace.base_ns = base_ns
    return trace


def _keep(trace: _Trace, item: dict[str, Any]) -> None:
    name, category = str(item.get("name", ""))[:200], item.get("cat")
    arguments = _arguments(item)
    if category == "kernel":
        if "Collective name" in arguments or "nccl" in name.lower():
            trace.kernels.append((arguments.get("correlation"), _event(trace.source, item)))
    elif category == "user_annotation" and (found := _STEP.fullmatch(name)):
        trace.steps.append((int(found[1]), _event(trace.source, item).start_ns))
    elif category == "user_annotation" and _ANNOTATION.fullmatch(name):
        trace.annotations.append(_event(trace.source, item))
    elif category == "cpu_op" and name in ("c10d::alltoall_base_", "c10d::alltoall_"):
        trace.calls.append(_event(trace.source, item))
    if len(trace.kernels) + len(trace.annotations) + len(trace.calls) > 8 * _MOST_EXCHANGES:
        raise trace.source.refused(f"holds over {_MOST_EXCHANGES:,} exchanges", remedy="trace fewer steps")


def _arguments(item: dict[str, Any]) -> dict[str, Any]:
    arguments = item.get("args")
    return arguments if isinstance(arguments, dict) else {}


def _event(source: Source, item: dict[str, Any]) -> _Event:
    start_us, long_us = item.get("ts"), item.get("dur", 0)
    if not isinstance(start_us, int | float) or not isinstance(long_us, int | float):
        raise source.refused("has an event without a time")
    if not (math.isfinite(start_us) and abs(start_us) < 1 << 52 and 0 <= long_us < 1 << 50):
        raise source.refused("has an event at a time that cannot be")
    start_ns = round(start_us * 1000)
    return _Event(
        start_ns=start_ns,
        end_ns=start_ns + round(long_us * 1000),
        thread=repr(item.get("tid"))[:64],
        name=str(item.get("name", ""))[:200],
        arguments={key: value for key, value in _arguments(item).items() if key in _KEPT},
    )


_KEPT = frozenset(
    {
        "Collective name",
        *("In msg nelems", "Out msg nelems", "In split size", "Out split size", "dtype"),
        *("Process Group Ranks", "Group size", "Concrete Inputs", "Input Dims", "Input type"),
    }
)


def _exchanges(trace: _Trace, world: int, notes: list[str]) -> Iterator[Exchange]:
    """All-to-alls of one rank in order of time."""
    found = sorted(_timed(trace), key=lambda pair: pair[0].start_ns)
    if len(found) > _MOST_EXCHANGES:
        raise trace.source.refused(f"holds over {_MOST_EXCHANGES:,} exchanges", remedy="trace fewer steps")
    if not trace.steps:
        notes.append(f"rank {trace.rank}: no steps are marked: all exchanges are in step 0")
    starts = [start for _, start in trace.steps]
    sequence: dict[str, int] = {}
    unknown = cut = 0
    for event, launched_ns, stated in ((event, at, stated) for event, (at, stated) in found):
        place = bisect_right(starts, launched_ns) - 1
        group, size, is_cut = _group(stated, world)
        send, receive = _bytes(stated, size)
        unknown += send is None
        cut += is_cut
        number = sequence[group] = sequence.get(group, -1) + 1
        yield Exchange(
            step=trace.steps[max(place, 0)][0] if trace.steps else 0,
            group=group,
            sequence=number,
            start_ns=trace.base_ns + event.start_ns,
            end_ns=trace.base_ns + event.end_ns,
            send_bytes=send,
            receive_bytes=receive,
        )
    if unknown:
        notes.append(
            f"rank {trace.rank}: bytes to each rank are not stated for {counted(unknown, 'exchange')}"
        )
    if cut:
        notes.append(f"rank {trace.rank}: the ranks of the group are cut or not stated, taken as all {world}")


def _timed(trace: _Trace) -> Iterator[tuple[_Event, tuple[int, dict[str, Any]]]]:
    """Each exchange with when it was launched and what is stated of it."""
    if trace.kernels:
        for correlation, kernel in trace.kernels:
            launch = trace.launches.get(correlation)
            at = kernel.start_ns if launch is None else launch.start_ns
            if "Collective name" in kernel.arguments:
                if str(kernel.arguments["Collective name"]).replace("_", "").startswith("alltoall"):
                    yield kernel, (at, kernel.arguments)
            elif launch is not None and _around(trace.annotations, launch) is not None:
                call = _around(trace.calls, launch)
                yield kernel, (at, {} if call is None else call.arguments)
        return
    calls = trace.calls if len(trace.calls) == len(trace.annotations) else [None] * len(trace.annotations)
    for annotation, call in zip(trace.annotations, calls, strict=True):
        stated = {} if call is None else call.arguments
        yield annotation, (annotation.start_ns if call is None else call.start_ns, stated)


def _around(events: Sequence[_Event], inner: _Event) -> _Event | None:
    """The latest event of the same thread that has not ended; events are in order of time."""
    place = bisect_right(events, inner.start_ns, key=lambda event: event.start_ns)
    for event in reversed(events[max(0, place - 64) : place]):
        if event.thread == inner.thread and event.end_ns >= inner.start_ns:
            return event
    return None


def _group(stated: dict[str, Any], world: int) -> tuple[str, int, bool]:
    """Label and size of the group, and whether its ranks had to be assumed."""
    ranks = _numbers(stated.get("Process Group Ranks"))
    if ranks and ranks == sorted(set(ranks)) and ranks[-1] < world:
        if ranks == list(range(ranks[0], ranks[-1] + 1)) and len(ranks) > 1:
            return f"{ranks[0]}-{ranks[-1]}", len(ranks), False
        return ",".join(map(str, ranks)), len(ranks), False
    return "world", world, world > 1 and _whole(stated.get("Group size")) not in (None, world)


def _bytes(stated: dict[str, Any], size: int) -> tuple[list[int] | None, list[int] | None]:
    """Bytes to and from each rank of the group; None where they are not stated, or lists are cut."""
    if "In msg nelems" in stated:
        element = _ELEMENT_BYTES.get(str(stated.get("dtype", "")).lower())
        return (
            _parts(stated.get("In split size"), _whole(stated["In msg nelems"]), element, size),
            _parts(stated.get("Out split size"), _whole(stated.get("Out msg nelems")), element, size),
        )
    dims, kinds, inputs = (stated.get(key) for key in ("Input Dims", "Input type", "Concrete Inputs"))
    if not (isinstance(dims, list) and isinstance(kinds, list) and isinstance(inputs, list)):
        return None, None
    if min(len(dims), len(kinds)) < 2 or len(inputs) < 5:
        return None, None
    element = _ELEMENT_BYTES.get(str(kinds[0]).lower())
    # Of c10d::alltoall_base_: output, input, group, output splits, input splits.
    return (
        _parts(inputs[4], _elements(dims[1]), element, size),
        _parts(inputs[3], _elements(dims[0]), element, size),
    )


def _parts(splits: Any, elements: int | None, element: int | None, size: int) -> list[int] | None:
    """Bytes of each part: splits are in rows of equal size, and empty where all are equal."""
    rows = _numbers(splits)
    if rows is None or elements is None or element is None or elements * element > _MOST_BYTES:
        return None
    rows = rows or [1] * size
    total = sum(rows)
    if len(rows) != size or (total == 0 and elements) or (total and elements % total):
        return None
    return [row * (elements // total if total else 0) * element for row in rows]


def _elements(dims: Any) -> int | None:
    if not isinstance(dims, list) or not all(_whole(item) is not None for item in dims) or len(dims) > 16:
        return None
    return math.prod(dims)


def _numbers(text: Any) -> list[int] | None:
    """Whole numbers of a text such as ``[3, 5]``; None where it is none, as one that is cut with dots."""
    if not isinstance(text, str) or _NUMBERS.fullmatch(text) is None:
        return None
    return [int(number) for number in re.findall(r"\d+", text)]


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62 else None


def _rows(exchanges: dict[int, list[Exchange]], phase: str) -> Iterator[Rows]:
    for rank, items in sorted(exchanges.items()):
        columns: dict[str, Any] = {
            "step": [item.step for item in items],
            "phase": [phase] * len(items),
            "source_rank": np.full(len(items), rank),
            "role": ["other"] * len(items),
            "group": [item.group for item in items],
            "sequence": [item.sequence for item in items],
            "start_ns": [item.start_ns for item in items],
            "end_ns": [item.end_ns for item in items],
            "send_bytes": [item.send_bytes for item in items],
            "receive_bytes": [item.receive_bytes for item in items],
        }
        schema = pa.schema([EXCHANGE_SCHEMA.field(name) for name in columns])
        yield Rows(table="exchange", rank=rank, batch=pa.record_batch(columns, schema=schema))

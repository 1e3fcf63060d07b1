"""What a running clock sweep has measured so far, a line a window: a kill loses one at most."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from observatory.errors import ClockError
from observatory.run.bounded import MAX_DOCUMENT_BYTES, parse_json, read_at_most
from observatory.run.manifest import DeviceSpec, Phase
from observatory.run.records import Count, Record, Text

_Mhz = Annotated[int, Field(ge=1, le=100_000)]


class JournalSeries(Record):
    """What one workload is; fields as in :class:`observatory.run.documents.clock_sweep.ClockSeries`."""

    name: Text
    phase: Phase = "unknown"
    batch_size: Count | None = None
    context_tokens: Count | None = None
    tokens_per_iteration: Count | None = None


class JournalHead(Record):
    """The first line: what every window has in common.

    Attributes:
        device: the GPU.
        series: what is swept.
        supported_sm_clocks_mhz: clocks it can be locked to.
        default_limit_mw: default power limit; None when not reported.
        idle_power_mw: power without load, before anything was set or started; None when not reported.
        set_outside: clock and limit were set from outside.
        note: what must be known of the whole sweep; None for nothing.
        seed: of the order.
        argv: command line.
    """

    device: DeviceSpec
    series: Annotated[tuple[JournalSeries, ...], Field(min_length=1, max_length=1000)]
    supported_sm_clocks_mhz: Annotated[tuple[_Mhz, ...], Field(min_length=1, max_length=4096)]
    default_limit_mw: Count | None = None
    idle_power_mw: Count | None = None
    set_outside: bool = False
    note: Text | None = None
    seed: int = 0
    argv: tuple[Text, ...] = ()


class JournalPoint(Record):
    """One window.

    Attributes:
        order: position in the sweep.
        repeat: which repeat of its setting.
        series: index of what ran.
        sm_clock_mhz, limit_mw: what was asked for; None for nothing.
        start_ns, end_ns: the window on the host's monotonic clock.
        iterations: in it.
        note: what must be known of it; None for nothing.
    """

    order: Count
    repeat: Count
    series: Count
    sm_clock_mhz: _Mhz | None = None
    limit_mw: Count | None = None
    start_ns: Count
    end_ns: Count
    iterations: Annotated[int, Field(ge=1)]
    note: Text | None = None


def journal_path(out: Path) -> Path:
    """Where the journal of a result lies while the sweep runs."""
    return out.with_suffix(".points.jsonl")


def append_line(path: Path, record: Record, *, fresh: bool = False) -> None:
    """Write one line; ``fresh`` begins the file anew.

    Raises:
        ClockError: it cannot be written; the file is as before.
    """
    size = 0 if fresh or not path.exists() else path.stat().st_size
    try:
        with path.open("wb" if fresh else "ab") as handle:
            handle.write(record.model_dump_json().encode() + b"\n")
    except OSError as error:
        with contextlib.suppress(OSError):
            os.truncate(path, size)  # half a line would spoil the next
        raise ClockError(
            f"{path} cannot be written ({error.strerror}); windows before it are kept"
        ) from error


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Alone with a journal, and so with the result and the telemetry next to it; gone after a kill.

    Raises:
        ClockError: another sweep writes it at this moment, or it cannot be written.
    """
    try:
        handle = path.open("ab")
    except OSError as error:
        raise ClockError(
            f"{path} cannot be written ({error.strerror})", remedy="give another --out"
        ) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ClockError(
                f"{path} is being written by a sweep that runs", remedy="wait for it, or give another --out"
            ) from error
        try:
            yield
        finally:
            if not holds_points(path):
                path.unlink(missing_ok=True)


def holds_points(path: Path) -> bool:
    """Whether there is a journal with a line behind its first."""
    if not path.is_file():
        return False
    with path.open("rb") as handle:
        return bool(handle.readline(MAX_DOCUMENT_BYTES)) and bool(handle.readline(MAX_DOCUMENT_BYTES))


def read_journal(path: Path) -> tuple[JournalHead, list[JournalPoint]]:
    """Read a journal; a last line that was cut off is left out.

    Raises:
        ClockError: it cannot be read, or is no journal, or holds no window.
    """
    try:
        content = read_at_most(path, MAX_DOCUMENT_BYTES)
    except OSError as error:
        raise ClockError(
            f"{path} cannot be read ({error.strerror})",
            expected="what a sweep that was killed left, NAME.points.jsonl next to NAME.run",
        ) from error
    if content is None:
        raise ClockError(
            f"{path} is over {MAX_DOCUMENT_BYTES >> 20} MiB", expected="the journal of one sweep"
        )
    # What follows the last line break was cut off.
    lines = content.split(b"\n")[:-1]
    try:
        head = JournalHead.model_validate(parse_json(lines[0] if lines else b""))
        points = [JournalPoint.model_validate(parse_json(line)) for line in lines[1:]]
    except ValueError as error:
        reason = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else error
        raise ClockError(
            f"{path} is no journal of a clock sweep ({reason!s:.200})",
            expected="NAME.points.jsonl of a sweep that was killed",
        ) from error
    wrong = [point for point in points if point.series >= len(head.series) or point.end_ns <= point.start_ns]
    if wrong:
        raise ClockError(
            f"{path}: window {wrong[0].order} is of no series of its sweep, or has no length",
            expected="the journal as the sweep left it",
        )
    ordered = sorted(points, key=lambda point: point.start_ns)
    for earlier, later in itertools.pairwise(ordered):
        if later.start_ns < earlier.end_ns:
            raise ClockError(
                f"{path}: windows {earlier.order} and {later.order} overlap, which one sweep never does",
                expected="the journal as the sweep left it",
            )
    if not points:
        raise ClockError(f"{path} holds no finished window: nothing can be recovered, sweep again")
    return head, points

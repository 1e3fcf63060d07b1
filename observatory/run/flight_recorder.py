"""torch's flight recorder: its dump as validated records, and what it says of one exchange.

The recorder keeps the latest collectives of a process in a ring: when each was enqueued, its group, number
and tensor sizes, and, where the backend times its work (NCCL with ``TORCH_NCCL_ENABLE_TIMING=1``), how long
it took. A dump is read in its JSON form only; the other form is a pickle, which could run code. Fields and
their meaning: ``FlightRecorder.hpp`` of torch, dump version 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from observatory.errors import RunFormatError
from observatory.run.bounded import MAX_DOCUMENT_BYTES, parse_json, read_at_most

#: A dump of 2,000 entries is 1 MB.
_MAX_ENTRIES = 1 << 17
_MAJOR = 2

_REMEDY = "write one with torch._C._distributed_c10d._dump_nccl_trace_json(), for gloo _dump_fr_trace_json()"

#: Bytes of one element by the name that torch's C++ gives a dtype; others are not compared.
_ITEM_BYTES = {
    "Byte": 1, "Char": 1, "Bool": 1, "Short": 2, "Int": 4, "Long": 8, "UInt16": 2, "UInt32": 4, "UInt64": 8,
    "Half": 2, "BFloat16": 2, "Float": 4, "Double": 8, "ComplexHalf": 4, "ComplexFloat": 8,
    "ComplexDouble": 16, "Float8_e5m2": 1, "Float8_e4m3fn": 1, "Float8_e5m2fnuz": 1,
    "Float8_e4m3fnuz": 1, "Float8_e8m0fnu": 1,
}  # fmt: skip

Short = Annotated[str, Field(max_length=256)]
Number = Annotated[int, Field(ge=0, lt=2**63)]
Shape = Annotated[tuple[Number, ...], Field(max_length=64)]
Shapes = Annotated[tuple[Shape, ...], Field(max_length=65536)]
Names = Annotated[tuple[Short, ...], Field(max_length=65536)]


class RecorderEntry(BaseModel):
    """One operation in the recorder's ring.

    Attributes:
        process_group: name of the group and what it is for.
        collective_seq_id: number of the collective in its group, as NCCL's process group counts.
        op_id: number of the operation in its group, as gloo's process group counts.
        profiling_name: backend and operation, ``nccl:all_to_all``.
        input_sizes, output_sizes: shapes of the tensors.
        input_dtypes, output_dtypes: dtypes of the tensors.
        time_created_ns: wall clock when it was enqueued, nanoseconds since 1970.
        duration_ms: how long it took; None where the backend did not time it.
        state: ``scheduled``, ``started`` or ``completed``. Gloo's entries stay ``scheduled``.
        retired: the backend is done with it.
        is_p2p: a send or receive.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    process_group: Annotated[tuple[Short, Short], Field()]
    collective_seq_id: Number
    op_id: Number
    profiling_name: Short
    input_sizes: Shapes = ()
    output_sizes: Shapes = ()
    input_dtypes: Names = ()
    output_dtypes: Names = ()
    time_created_ns: Number
    duration_ms: Annotated[float, Field(ge=0, lt=1e12, allow_inf_nan=False)] | None = None
    state: Short
    retired: bool
    is_p2p: bool = False

    @property
    def backend(self) -> str:
        """gloo, nccl, ..."""
        return self.profiling_name.partition(":")[0]

    @property
    def number(self) -> int:
        """Its number as its process group counts: what ``backend_sequence`` of an exchange row says."""
        return self.op_id if self.backend == "gloo" else self.collective_seq_id


class RecorderDump(BaseModel):
    """What the recorder of one process held."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: Annotated[str, Field(pattern=r"^\d{1,4}\.\d{1,4}$")]
    entries: Annotated[tuple[RecorderEntry, ...], Field(max_length=_MAX_ENTRIES)] = ()


def parse_recorder_dump(content: bytes, *, name: str) -> RecorderDump:
    """A dump from its JSON form.

    Args:
        content: the document.
        name: where it is from, for messages.

    Raises:
        RunFormatError: it is a pickle, of a newer major version, or not what the recorder writes.
    """
    if content[:1] == b"\x80":
        raise RunFormatError(f"{name} is a pickle, which could run code and is not read; {_REMEDY}")
    try:
        dump = RecorderDump.model_validate(parse_json(content))
    except ValueError as error:
        if not isinstance(error, ValidationError):
            raise RunFormatError(f"{name} is no flight recorder dump ({error!s:.200}); {_REMEDY}") from error
        problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in problem["loc"][:4])
        reason = f"{where + ': ' if where else ''}{problem['msg']:.200}"
        raise RunFormatError(f"{name} is no flight recorder dump ({reason}); {_REMEDY}") from error
    if int(dump.version.partition(".")[0]) != _MAJOR:
        raise RunFormatError(
            f"{name} is a flight recorder dump of version {dump.version}",
            expected=f"{_MAJOR}.x",
            remedy="update moe-observatory",
        )
    return dump


def read_recorder_dump(path: Path) -> RecorderDump:
    """A dump from a file of at most 16 MiB.

    Raises:
        RunFormatError: it cannot be read, or is no dump.
    """
    name = f"flight recorder dump {path}"
    try:
        content = read_at_most(path, MAX_DOCUMENT_BYTES)
    except OSError as error:
        raise RunFormatError(f"{name} cannot be read ({error.strerror}); {_REMEDY}") from error
    if content is None:
        raise RunFormatError(f"{name} is over {MAX_DOCUMENT_BYTES >> 20} MiB; {_REMEDY}")
    return parse_recorder_dump(content, name=name)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecorderMatch:
    """What the recorder holds of one exchange.

    Attributes:
        start_ns: when it was enqueued, on the monotonic clock; None without an entry that fits, or where it
            is not known how the wall clock relates to that clock.
        duration_ns: how long it took; None where the recorder has none.
        problem: why a time is missing; None when none is.
        final: another look at the recorder would not add anything.
    """

    start_ns: int | None = None
    duration_ns: int | None = None
    problem: str | None = None
    final: bool = True


class _GroupEntries:
    """Entries of one group, the latest to bear its name; added in the order in which they were recorded."""

    def __init__(self) -> None:
        self.by_number: dict[int, RecorderEntry | None] = {}
        self._last_op_id = -1

    def add(self, entry: RecorderEntry) -> None:
        if entry.op_id <= self._last_op_id:  # the group was taken down and another one has its name
            self.by_number.clear()
        self._last_op_id = entry.op_id
        # Parts of one coalesced collective have one number.
        self.by_number[entry.number] = None if entry.number in self.by_number else entry


class RecorderIndex:
    """Entries by backend, group and number.

    Args:
        entries: of one process.
        unix_minus_monotonic_ns: what that process's wall clock is ahead of its monotonic clock; both run
            alike unless the wall clock is set. None where it is not known.

    Attributes:
        size: entries of collectives.
    """

    def __init__(
        self, entries: Iterable[RecorderEntry] = (), *, unix_minus_monotonic_ns: int | None = None
    ) -> None:
        self._groups: dict[tuple[str, str], _GroupEntries] = {}
        self._unix_minus_monotonic_ns = unix_minus_monotonic_ns
        self.size = 0
        for entry in entries:
            if not entry.is_p2p:
                self.size += 1
                group = (entry.backend, entry.process_group[0])
                self._groups.setdefault(group, _GroupEntries()).add(entry)

    def match(
        self,
        *,
        backend: str | None,
        group: str | None,
        number: int | None,
        send_bytes: Sequence[int] | None,
        receive_bytes: Sequence[int] | None,
    ) -> RecorderMatch:
        """What the recorder holds of one exchange.

        Args:
            backend: gloo, nccl, ...
            group: torch's name of its group.
            number: its number in the group as the backend counts.
            send_bytes: bytes to each member.
            receive_bytes: bytes from each member.
        """
        if backend is None or group is None or number is None:
            return RecorderMatch(problem="the exchange has no number by which the recorder could know it")
        entries = self._groups.get((backend, group), _GroupEntries())
        if number not in entries.by_number:
            return RecorderMatch(
                problem="the recorder holds no entry of it: its ring has moved on or it is off"
            )
        entry = entries.by_number[number]
        if entry is None:
            return RecorderMatch(problem="the recorder holds several entries of its number")
        other = _other_bytes(entry, send_bytes, receive_bytes)
        if other is not None:
            return RecorderMatch(problem=other)
        behind_ns = self._unix_minus_monotonic_ns
        start_ns = None if behind_ns is None else entry.time_created_ns - behind_ns
        if entry.duration_ms is not None:
            return RecorderMatch(start_ns=start_ns, duration_ns=round(entry.duration_ms * 1e6))
        if not entry.retired:
            problem = "no duration: it was not over when the recorder was read"
            return RecorderMatch(start_ns=start_ns, problem=problem, final=False)
        hint = "; set TORCH_NCCL_ENABLE_TIMING=1" if backend == "nccl" else ""
        return RecorderMatch(start_ns=start_ns, problem=f"no duration: {backend} did not time it{hint}")


def _other_bytes(
    entry: RecorderEntry, send_bytes: Sequence[int] | None, receive_bytes: Sequence[int] | None
) -> str | None:
    """How the sizes of an entry contradict an exchange; None where they do not or cannot."""
    operation = entry.profiling_name.partition(":")[2]
    pairs = (
        ("sent", send_bytes, entry.input_sizes, entry.input_dtypes, "gather" not in operation),
        ("received", receive_bytes, entry.output_sizes, entry.output_dtypes, "reduce" not in operation),
    )
    for what, of_row, shapes, dtypes, comparable in pairs:
        of_entry = _bytes(shapes, dtypes) if comparable else None
        if of_entry is not None and of_row is not None and sum(of_row) != of_entry:
            return (
                f"the recorder's entry of its number is another: {of_entry} bytes {what}, not {sum(of_row)}"
            )
    return None


def _bytes(shapes: Sequence[Sequence[int]], dtypes: Sequence[str]) -> int | None:
    if len(shapes) != len(dtypes) or not all(dtype in _ITEM_BYTES for dtype in dtypes):
        return None
    return sum(math.prod(shape) * _ITEM_BYTES[dtype] for shape, dtype in zip(shapes, dtypes, strict=True))

"""nccl-tests: what ``alltoall_perf`` prints, or writes with ``-J``.

The text has changed little: a header line names its columns, rows follow, comments begin with ``#``. A log
may hold several tests, each with the ranks in front of it, lines of NCCL_DEBUG between its rows, and what
mpirun and srun put before each line. Of each all-to-all the out-of-place times are taken. The text gives one
time for all ranks; JSON of version 3 and 4 may also give one for each iteration and process.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from observatory.interchange.importers.imported import ImportedBenches, ImportOptions
from observatory.interchange.importers.sources import Source
from observatory.run.bounded import first_problem
from observatory.run.documents.bench import BenchCase, BenchResult
from observatory.text import counted, listing

#: Bytes of an element by nccl-tests' name of its type.
_ELEMENT_BYTES = {
    **dict.fromkeys(("int8", "uint8", "char", "f8e4m3", "f8e5m2", "fp8_e4m3", "fp8_e5m2"), 1),
    **dict.fromkeys(("half", "float16", "bfloat16"), 2),
    **dict.fromkeys(("int32", "uint32", "float", "int"), 4),
    **dict.fromkeys(("int64", "uint64", "double"), 8),
}
_REDUCTIONS = ("none", "sum", "prod", "min", "max", "avg", "mulsum")
_MOST_RANKS = 1024
_JSON_VERSIONS = (3, 4)

_RANK = re.compile(r"#\s+Rank\s+(\d{1,6})\s.*?\bon\s+(\S{1,255})\s+device\s+\d{1,4}\s+\[")
_STARTS = re.compile(r"#\s*Collective test starting:\s*(\w{1,64})")
_BINARY = re.compile(r"\b(\w{2,40})_perf\b")
_ITERATIONS = re.compile(r"warmup iters:\s*(\d{1,9}).*?\biters:\s*(\d{1,9})")
_VERSION = re.compile(r"#\s*nccl-tests version\s+(\S{1,40})(?:.*?\bnccl-library=(\S{1,20}))?")
_COLUMNS = re.compile(r"#\s+size\s+count\s+type\s")
#: Before each line: ``[1,0]<stdout>:`` of mpirun, and ``0: `` of srun.
_PREFIX = re.compile(r"(?:\[[^\]\s]{1,300}\]<std\w{2,4}>:? ?|\s*\d{1,6}: )")
#: Between bandwidths that are printed with two decimals and their quotient.
_ROUNDED = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    """One line of a table.

    Attributes:
        size_bytes: of the whole buffer of a rank.
        peer_bytes: to each rank.
        times_us: of each iteration, or one that is their mean.
        process_times_us: of each process and iteration; empty where not stated.
        wrong: elements that were wrong; None where they were not checked.
        like_alltoall: whether only an all-to-all prints such a row: checked out of place and not in place, a
            size of (ranks) counts, and a bus bandwidth of (ranks - 1) / ranks.
    """

    size_bytes: int
    peer_bytes: int
    times_us: tuple[float, ...]
    process_times_us: tuple[tuple[float, ...], ...] = ()
    wrong: float | None = None
    like_alltoall: bool = False


@dataclass(slots=True)
class _Test:
    """One test of a log.

    Attributes:
        name: such as ``alltoall``; None where the log does not say.
        hosts: of each rank.
        iterations: warm-up and timed; None where not stated.
        torn: rows that are not understood.
    """

    name: str | None = None
    hosts: dict[int, str] = field(default_factory=dict)
    iterations: tuple[int, int] | None = None
    rows: list[_Row] = field(default_factory=list)
    has_header: bool = False
    torn: int = 0

    @property
    def is_alltoall(self) -> bool:
        """By its name; without one by its largest row."""
        return self.name == "alltoall" or (
            self.name is None and bool(self.rows) and self.rows[-1].like_alltoall
        )


def recognises(head: bytes) -> bool:
    """Whether a file begins like one of this format."""
    if re.match(rb'\s*\{\s*"version"\s*:', head):
        return b'"args"' in head or b'"nccl_version"' in head
    return b"# nccl-tests version" in head or re.search(rb"(?m)#\s+nThread\s+\d+\s+nGpus", head) is not None


def read(sources: Sequence[Source], options: ImportOptions) -> ImportedBenches:
    """All-to-all tests of logs and JSON files.

    Raises:
        InterchangeError: a file is none of these, or holds no times of an all-to-all.
    """
    del options
    results: list[BenchResult] = []
    left_out: list[str] = []
    versions: set[str] = set()
    for source in sources:
        is_json = source.head().lstrip().startswith(b"{")
        tests, version, library = _read_json(source) if is_json else _read_text(source)
        versions.update({version} if version else ())
        exchanges = [test for test in tests if test.is_alltoall and test.rows]
        if not exchanges:
            raise source.refused(_why_none(tests))
        left_out += [test.name or "a test without a name" for test in tests if test not in exchanges]
        results += [_result(source, test, library) for test in exchanges]
    names = sorted(set(left_out))
    notes = (f"of the same files not imported, no all-to-all: {listing(names, most=8)}",) if names else ()
    return ImportedBenches(version=", ".join(sorted(versions)) or None, results=tuple(results), notes=notes)


def _why_none(tests: Sequence[_Test]) -> str:
    exchanges = [test for test in tests if test.name == "alltoall"]
    if exchanges and not any(test.torn for test in exchanges):
        ranks = len(exchanges[0].hosts)
        of = f" of {counted(ranks, 'rank')}" if ranks else ""
        return f"holds an all-to-all test{of} that ended before its first row"
    names = sorted({test.name for test in tests if test.name})
    if names and not exchanges:
        return f"holds no all-to-all test, but {listing(names)}"
    if any(test.torn for test in tests):
        return "has rows that are not understood, and no others"
    if tests:
        return "does not say which test it holds: neither its header nor a command line names one"
    return "holds no test"


def _read_text(source: Source) -> tuple[list[_Test], str | None, str | None]:
    tests: list[_Test] = []
    version = library = named = None
    columns: list[str] = []
    for whole in source.lines():
        line = whole[found.end() :] if (found := _PREFIX.match(whole)) else whole
        if found := _VERSION.match(line):
            version, library = found[1], found[2]
        elif found := _STARTS.match(line):
            tests.append(_Test(name=found[1].removesuffix("_perf")))
        elif (found := _ITERATIONS.search(line)) and line.startswith("#"):
            # Of logs that do not say where a test starts, this line is the first of each.
            if not tests or tests[-1].iterations is not None:
                tests.append(_Test(name=named))
            tests[-1].iterations = (int(found[1]), int(found[2]))
        elif (found := _RANK.match(line)) and tests:
            tests[-1].hosts[int(found[1])] = found[2]
        elif _COLUMNS.match(line):
            columns = line[1:].split()
            if not tests:
                tests.append(_Test(name=named))
            tests[-1].has_header = True
        elif line.startswith("#") or not line.strip():
            continue
        elif tests and tests[-1].has_header and line.split()[0].isdigit():
            row = _text_row(line, columns)
            tests[-1].torn += row is None
            tests[-1].rows += [row] if row else []
        elif found := _BINARY.search(line):  # a command line that was quoted above its output
            named = found[1]
    return tests, version, library


def _text_row(line: str, columns: Sequence[str]) -> _Row | None:
    """A row of a table; None where it is cut, or something was printed into it."""
    cells = line.split()
    # Blank cells of `redop` and `root` (older versions) are in front of the times, time stamps behind them.
    blank = 0 if cells[3:4] and cells[3] in _REDUCTIONS else len({"redop", "root"}.intersection(columns))
    try:
        time_at = columns.index("time") - blank
        time_us, algbw, busbw, wrong = cells[time_at : time_at + 4]
        in_place_wrong = (cells[time_at + 4 : time_at + 8] + [""] * 4)[3]
        size, peer = int(cells[0]), int(cells[1]) * _ELEMENT_BYTES[cells[2]]
        ranks = size // peer if peer else 0
        is_part = ranks > 1 and abs(float(busbw) - float(algbw) * (ranks - 1) / ranks) <= 2 * _ROUNDED
        return _Row(
            size_bytes=size,
            peer_bytes=peer,
            times_us=(float(time_us),),
            wrong=None if wrong == "N/A" else float(wrong),
            like_alltoall=is_part and size == ranks * peer and wrong != "N/A" and in_place_wrong == "N/A",
        )
    except (KeyError, ValueError, IndexError):
        return None


def _read_json(source: Source) -> tuple[list[_Test], str | None, str | None]:
    document: Any = source.json()
    try:
        version = int(document["version"])
    except (KeyError, TypeError, ValueError) as error:
        raise source.refused("does not state the version of its format") from error
    if version not in _JSON_VERSIONS:
        raise source.refused(f"has version {version}", expected=listing([str(v) for v in _JSON_VERSIONS]))
    if "config" not in document or not isinstance(document["config"], dict):
        raise source.refused("has no `config` of nccl-tests")
    try:
        return _json_tests(document), f"JSON {version}", _nccl_version(document.get("nccl_version"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise source.refused(
            "lacks what results of nccl-tests have", expected="config and results"
        ) from error


def _json_tests(document: dict[str, Any]) -> list[_Test]:
    config = document["config"]
    arguments = " ".join(str(item) for item in document.get("args") or [])
    named = _BINARY.search(arguments)
    tests: dict[str, _Test] = {}
    for result in document.get("results") or []:
        name = str(result.get("experiment_name") or (named[1] if named else "")).lower().removesuffix("_perf")
        test = tests.setdefault(name, _Test(name=name or None))
        outside = result.get("out_of_place")
        if outside is None or "time" not in outside:  # processor time alone says nothing of an exchange
            continue
        each = result.get("out_of_place_per_iter") or {}
        skipped = int(each.get("skipped_iterations") or 0)
        wrong = outside.get("nwrong")
        test.rows.append(
            _Row(
                size_bytes=int(result["size"]),
                peer_bytes=int(result["count"]) * _ELEMENT_BYTES[str(result["type"])],
                times_us=_times(each.get("times_us"), skipped) or (float(outside["time"]),),
                process_times_us=tuple(
                    _times(times, skipped) for times in each.get("per_process_max_times_us") or []
                ),
                wrong=None if wrong is None else float(wrong),
            )
        )
    devices = config.get("devices") or []
    for test in tests.values():
        test.hosts = {int(item["rank"]): str(item["hostname"]) for item in devices}
        test.iterations = int(config["warmup_iters"]), int(config["iterations"])
    return list(tests.values())


def _times(values: Any, skipped: int) -> tuple[float, ...]:
    return tuple(float(value) for value in values or [])[skipped:]


def _nccl_version(code: Any) -> str | None:
    return str(code) if isinstance(code, int) and 0 < code < 10**7 else None


def _result(source: Source, test: _Test, library: str | None) -> BenchResult:
    first = test.rows[0]
    ranks = first.size_bytes // first.peer_bytes if first.peer_bytes else len(test.hosts)
    same = all(row.size_bytes == row.peer_bytes * ranks for row in test.rows)
    if not same or not 1 < ranks <= _MOST_RANKS or (test.hosts and max(test.hosts) >= ranks):
        raise source.refused(
            f"has an all-to-all whose sizes and counts do not fit {counted(len(test.hosts), 'rank')}",
            expected=f"2 to {_MOST_RANKS} ranks, sizes that are their counts times the ranks",
        )
    warmup, iterations = test.iterations or (0, 1)
    each = all(len(row.times_us) > 1 for row in test.rows)
    by_rank = all(
        [len(times) for times in row.process_times_us] == [len(row.times_us)] * ranks for row in test.rows
    )
    notes = [] if by_rank else ["a time is that of all ranks together; no rank's own is known"]
    if test.iterations is None:
        notes.append("the number of iterations that a time is the mean of is not stated")
    if test.name is None:
        notes.append("the test is not named; its sizes and bandwidths are those of an all-to-all")
    if test.torn:
        notes.append(f"{counted(test.torn, 'row')} left out that cannot be read")
    if any(row.wrong is None for row in test.rows):
        notes.append("whether the bytes arrived was not checked")
    try:
        return BenchResult(
            kind="alltoall",
            created_unix_s=time.time(),
            backend="nccl",
            node_of_P=_nodes(test.hosts, ranks),
            warmup=warmup,
            repeats=min(len(row.times_us) for row in test.rows),
            iterations=1 if each else iterations,
            timing="out of place, each iteration" if each else "out of place, mean over iterations",
            cases=tuple(_case(row, ranks, by_rank=by_rank) for row in test.rows if row.peer_bytes),
            software={"nccl": library} if library else {},
            notes=tuple(notes),
        )
    except ValidationError as error:
        raise source.refused(f"holds times or sizes that cannot be: {first_problem(error)}") from error


def _nodes(hosts: dict[int, str], ranks: int) -> tuple[int, ...]:
    """Node of each rank. Of a process with several GPUs JSON lists the first: the others are on its host."""
    host, host_of = hosts.get(0, ""), []
    for rank in range(ranks):
        host = hosts.get(rank, host)
        host_of.append(host)
    names = list(dict.fromkeys(host_of))
    return tuple(names.index(name) for name in host_of)


def _case(row: _Row, ranks: int, *, by_rank: bool) -> BenchCase:
    of_ranks = row.process_times_us if by_rank else (row.times_us,) * ranks
    return BenchCase(
        pattern="uniform",
        send_bytes_PP=((row.peer_bytes,) * ranks,) * ranks,
        algorithm="flat",
        rank_us_RP=tuple(zip(*of_ranks, strict=True)),
        correct=not row.wrong,
    )

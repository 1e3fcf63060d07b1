"""OSU micro-benchmarks: what ``osu_alltoall`` and ``osu_alltoallv`` print, with or without ``-f``.

``# Size`` is what a rank sends to each rank; columns of latencies in microseconds follow it: the mean over
ranks and iterations, with ``-f`` also that of the fastest and the slowest rank. The slowest is taken where it
is there, as an exchange lasts as long as its slowest rank. How many ranks ran stands in no line of the
benchmark, only in a command above it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import ValidationError

from observatory.interchange.importers.imported import ImportedBenches, ImportOptions
from observatory.interchange.importers.sources import Source
from observatory.run.bounded import first_problem
from observatory.run.documents.bench import BenchCase, BenchResult
from observatory.text import counted, listing

_MOST_RANKS = 1024
_TITLE = re.compile(r"#\s*OSU MPI(?:-\w{1,20})?\s+(\S.{0,80}?)\s+(?:Latency )?Test(?:\s+v(\S{1,20}))?\s*$")
_TESTS = ("All-to-All Personalized Exchange", "All-to-Allv Personalized Exchange")
_RANKS = re.compile(
    r"\b(?:mpirun|mpiexec|srun|prun|orterun|ibrun|aprun|jsrun)\S*\s(?:.*\s)?"
    r"(?:-np?|--np|--ntasks)[ =](\d{1,6})(?=\s|$)"
)
#: Characters of a line that are looked at for a command.
_MOST_COMMAND = 4096
_AVERAGE, _SLOWEST = "Avg Latency(us)", "Max Latency(us)"
_FAILED = "Fail"


@dataclass(slots=True)
class _Test:
    """One test of a log.

    Attributes:
        title: what it measures.
        version: of the benchmarks.
        ranks: of the command above it; None where none states it.
        columns: of its table.
        rows: cells by column.
    """

    title: str
    version: str | None
    ranks: int | None
    columns: list[str] = field(default_factory=list)
    rows: list[dict[str, str]] = field(default_factory=list)


def recognises(head: bytes) -> bool:
    """Whether a file begins like one of this format."""
    return re.search(rb"(?m)^#\s*OSU MPI\S*\s", head) is not None


def read(sources: Sequence[Source], options: ImportOptions) -> ImportedBenches:
    """All-to-all tests of logs.

    Raises:
        InterchangeError: a file is none of these, holds no times of an all-to-all, or does not say of how
            many ranks and no option does.
    """
    results: list[BenchResult] = []
    versions: set[str] = set()
    others: set[str] = set()
    for source in sources:
        tests = list(_tests(source))
        exchanges = [test for test in tests if test.title in _TESTS]
        names = sorted({test.title for test in tests} - set(_TESTS))
        if not exchanges:
            raise source.refused(f"holds no blocking all-to-all test, but {listing(names) or 'none'}")
        others.update(names)
        results += [_result(source, test, options.ranks) for test in exchanges]
        versions.update(test.version for test in exchanges if test.version)
    notes = ["a time is that of all ranks together; no rank's own is known"]
    notes.append("which ranks share a node is not stated: all are taken as of one")
    if others:
        notes.append(f"of the same files not imported: {listing(sorted(others), most=8)}")
    return ImportedBenches(
        version=", ".join(sorted(versions)) or None, results=tuple(results), notes=tuple(notes)
    )


def _tests(source: Source) -> list[_Test]:
    tests: list[_Test] = []
    ranks: int | None = None
    for line in source.lines():
        if found := _TITLE.match(line):
            tests.append(_Test(title=found[1], version=found[2], ranks=ranks))
        elif tests and re.match(r"#\s*Size\s{2,}", line):
            if tests[-1].columns:
                raise source.refused("holds two tables in one test")
            tests[-1].columns = re.split(r"\s{2,}", line[1:].strip())
        elif line.startswith("#") or not line.strip():
            continue
        elif tests and tests[-1].columns and line.split()[0].isdigit():
            cells = line.split()
            # A row that is cut is left out, as it may be cut within a number.
            if len(cells) == len(tests[-1].columns):
                tests[-1].rows.append(dict(zip(tests[-1].columns, cells, strict=True)))
        elif (found := _RANKS.search(line[:_MOST_COMMAND])) or "osu_" in line:
            ranks = int(found[1]) if found else None
    return tests


def _result(source: Source, test: _Test, stated: int | None) -> BenchResult:
    ranks = test.ranks or stated
    if ranks is None:
        raise source.refused("does not state how many ranks ran", remedy="give it with --ranks")
    if stated is not None and ranks != stated:
        raise source.refused(f"is of {counted(ranks, 'rank')} by its command, and --ranks is {stated}")
    if not 1 < ranks <= _MOST_RANKS:
        raise source.refused(f"is of {counted(ranks, 'rank')}", expected=f"2 to {_MOST_RANKS}")
    column = next((name for name in (_SLOWEST, _AVERAGE) if name in test.columns), None)
    if column is None or not test.rows:
        raise source.refused("holds an all-to-all test that ended before its first row")
    notes = [] if column == _SLOWEST else ["times are the mean over ranks, not those of the slowest (-f)"]
    iterations = {row.get("Iterations") for row in test.rows}
    if iterations == {None}:
        notes.append("the number of iterations that a time is the mean of is not stated")
    if not any("Validation" in row for row in test.rows):
        notes.append("whether the bytes arrived was not checked")
    try:
        return BenchResult(
            kind="alltoall",
            created_unix_s=time.time(),
            backend="mpi",
            node_of_P=(0,) * ranks,
            warmup=0,
            repeats=1,
            iterations=min(int(row.get("Iterations", 1)) for row in test.rows),
            timing=f"{column.split(maxsplit=1)[0]} over ranks, mean over iterations",
            cases=tuple(_case(row, column, ranks) for row in test.rows if int(row["Size"])),
            notes=tuple(notes),
        )
    except (ValidationError, ValueError) as error:
        raise source.refused(f"holds times or sizes that cannot be: {first_problem(error)}") from error


def _case(row: dict[str, str], column: str, ranks: int) -> BenchCase:
    return BenchCase(
        pattern="uniform",
        send_bytes_PP=((int(row["Size"]),) * ranks,) * ranks,
        algorithm="flat",
        rank_us_RP=((float(row[column]),) * ranks,),
        correct=row.get("Validation") != _FAILED,
    )

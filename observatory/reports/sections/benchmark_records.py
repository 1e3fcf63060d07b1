"""Where the numbers of benchmark files come from: everything they say about how they were made."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from observatory.analysis.network import NetworkModel
from observatory.reports.frames.benchmark_files import Given
from observatory.reports.frames.frequency import ClockFile
from observatory.reports.frames.report import ReportFrames
from observatory.reports.frames.route_fetch import RouteFetchFile
from observatory.reports.sections.overview import when
from observatory.reports.text import bytes_text, count, plain, shorten
from observatory.run.documents.bench import BenchResult


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """Provenance of one file.

    Attributes:
        title: its name and what it is.
        pairs: (name, value) in reading order.
        command: the command line that made it, quoted for a shell; empty when not recorded.
    """

    title: str
    pairs: tuple[tuple[str, str], ...]
    command: str


def file_records(frames: ReportFrames) -> list[FileRecord]:
    """Everything each benchmark file says about itself."""
    of_clocks = [_clocks(file) for file in frames.clocks.files] if frames.clocks else []
    of_clocks += [_route_fetch(file) for file in frames.route_fetch]
    if frames.benchmarks is None:
        return of_clocks
    files = frames.benchmarks.files
    return [
        *(_result(given, "benchmark") for given in files.bench),
        *(_result(given, "replay") for given in files.replays),
        *(_network(given) for given in files.networks),
        *of_clocks,
    ]


def _result(given: Given[BenchResult], what: str) -> FileRecord:
    result = given.document
    pairs: list[tuple[str, object]] = [
        ("file", given.path),
        ("of run", result.run_id) if what == "replay" else ("exchanges", count(len(result.cases))),
        ("created", when(result.created_unix_s)),
        ("backend", result.backend),
        ("ranks", count(result.ranks)),
        ("node of each rank", ", ".join(map(str, result.node_of_P))),
        ("warm-up rounds, repeats", f"{count(result.warmup)}, {count(result.repeats)}"),
        ("exchanges in one timed interval", count(result.iterations)),
        ("timing", result.timing),
        ("commit", result.git_sha),
    ]
    for index, host in enumerate(result.hosts):
        items = (f"{name} {value}" for name, value in host if value is not None and name != "name")
        pairs.append((f"host {index + 1}", ", ".join((host.name, *items))))
    versions = sorted(result.software.items())
    pairs += [("software", ", ".join(f"{name} {version}" for name, version in versions))]
    pairs += [("note", note) for note in result.notes]
    return _record(given.name, what, pairs, result.argv)


def _route_fetch(file: RouteFetchFile) -> FileRecord:
    result = file.result
    pairs: list[tuple[str, object]] = [
        ("file", file.path),
        ("created", when(result.created_unix_s)),
        ("backend", result.backend),
        ("device", result.device),
        ("shapes", ", ".join(shape.name for shape in result.shapes)),
        ("node of each rank", ", ".join(map(str, result.node_of_P))),
        ("warm-up rounds, repeats", f"{count(result.warmup)}, {count(result.repeats)}"),
        ("timing", result.timing),
        ("commit", result.git_sha),
        ("hosts", ", ".join(host.name for host in result.hosts)),
    ]
    pairs += [("note", note) for note in result.notes]
    return _record(file.path.name, "routes and fetches", pairs, result.argv)


def _network(given: Given[NetworkModel]) -> FileRecord:
    model = given.document
    pairs: list[tuple[str, object]] = [
        ("file", given.path),
        ("created", when(model.created_unix_s)),
        ("backend", model.backend),
        ("schema", model.schema_version),
        ("fitted to", ", ".join(model.sources)),
        ("commit", model.git_sha),
    ]
    for fit in model.fits:
        low, high = fit.domain.rank_bytes
        where = (
            f"ranks {_numbers(fit.domain.ranks)}; nodes {_numbers(fit.domain.nodes)}; ranks on a node "
            f"{_numbers(fit.domain.ranks_on_node)}; busiest rank {bytes_text(low)} to {bytes_text(high)}"
        )
        pairs += [(f"{shorten(fit.algorithm, 24)} measured at", where)]
        pairs += [(f"{shorten(fit.algorithm, 24)} held out", fit.sharing)]
    pairs += [("note", note) for note in model.notes]
    return _record(given.name, "network model", pairs, model.argv)


def _clocks(file: ClockFile) -> FileRecord:
    model = file.model
    pairs: list[tuple[str, object]] = [
        ("file", file.path),
        ("fitted", when(model.created_unix_s)),
        ("device", ", ".join(f"{name} {value}" for name, value in model.device if value is not None)),
        ("schema", model.schema_version),
        ("fitted to", ", ".join(model.sources)),
        ("seed", model.seed),
        ("commit", model.git_sha),
    ]
    pairs += [("note", note) for note in model.notes]
    what = "clock sweep, fitted for this page" if file.what == "sweep" else "clock model"
    return _record(file.path.name, what, pairs, model.argv)


def _numbers(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))


def _record(name: str, what: str, pairs: list[tuple[str, object]], argv: tuple[str, ...]) -> FileRecord:
    def text(value: object) -> str:
        return "not recorded" if value is None or value == "" else plain(value)

    return FileRecord(
        title=f"{shorten(name, 60)}: {what}",
        pairs=tuple((plain(key), text(value)) for key, value in pairs),
        command=plain(shlex.join(argv)),
    )

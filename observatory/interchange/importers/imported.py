"""What files of other tools become: a run directory, or results of benchmarks.

What a format does not state stays unknown. Where the files came from is kept: name, size, SHA-256, version.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from observatory.errors import InterchangeError
from observatory.host.provenance import command_line
from observatory.interchange.importers.sources import Source
from observatory.run import RunWriter
from observatory.run.documents.bench import BenchResult
from observatory.run.documents.writing import write_text
from observatory.run.files import committed_folder, is_free, os_reason
from observatory.run.manifest import ClockSpec, Manifest, ModelSpec, RankPower, Topology
from observatory.run.replacing import check_free, empty_run

#: Of times that are Unix time in nanoseconds.
UNIX_CLOCK = ClockSpec(
    method="none", identity="unix time", unix_minus_monotonic_ns=0, reason="the times are those of the file"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportOptions:
    """What a user states where files do not.

    Attributes:
        name: what the run is called by; None: the name of the first file.
        top_k: experts of a token; None where the format states it.
        experts: experts of a layer, E; None where the format states it.
        ranks: P; None where the format states it.
        phase: of the steps.
        utc_offset_s: local time minus UTC of times without a zone, seconds; None: not stated.
    """

    name: str | None = None
    top_k: int | None = None
    experts: int | None = None
    ranks: int | None = None
    phase: str = "unknown"
    utc_offset_s: int | None = None

    def model_name(self, sources: Sequence[Source]) -> str:
        """What the model of the run is called by."""
        return self.name or sources[0].name


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Rows of one table and rank."""

    table: str
    rank: int
    batch: pa.RecordBatch


@dataclass(kw_only=True, slots=True)
class ImportedRun:
    """A run as it is read.

    Attributes:
        version: of the tool or of its format; None where it is not stated.
        model: the model, as far as it is known.
        ranks: P.
        rows: its rows, read as they are taken.
        power: what the power rows of a rank are of.
        clocks: how times of a rank relate to others; none where no row has a time.
        notes: what the files do not say, complete when all rows were taken.
    """

    version: str | None
    model: ModelSpec
    ranks: int
    rows: Iterable[Rows]
    power: Mapping[int, RankPower] = field(default_factory=dict)
    clocks: Mapping[int, ClockSpec] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportedBenches:
    """Results of benchmarks.

    Attributes:
        version: as of a run.
        results: one for each set of ranks.
        notes: what the files do not say, or what was left out.
    """

    version: str | None
    results: tuple[BenchResult, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What an import wrote.

    Attributes:
        paths: the run directory, or the files of results.
        rows: rows by table; empty for results.
        notes: as in the run.
    """

    paths: tuple[Path, ...]
    rows: Mapping[str, int]
    notes: tuple[str, ...]


def import_record(form: str, version: str | None, sources: Sequence[Source]) -> dict[str, Any]:
    """Where it came from, as the manifest of the run keeps it.

    Raises:
        InterchangeError: a file cannot be read.
    """
    return {"format": form, "version": version, "files": [source.facts() for source in sources]}


def write_run(
    imported: ImportedRun, out: Path, *, form: str, sources: Sequence[Source], overwrite: bool
) -> Written:
    """Write the run directory; it appears under its name when it is whole.

    Raises:
        InterchangeError: the files hold no rows, or are damaged.
        RunError: the directory cannot be written.
        LoadError, RunFormatError: rows that cannot be true.
    """
    check_free(out, overwrite=overwrite)
    manifest = Manifest(
        run_id=uuid.uuid4().hex,
        created_unix_s=time.time(),
        argv=command_line(),
        config={"import": import_record(form, imported.version, sources)},
        model=imported.model,
        topology=Topology(ranks=imported.ranks),
    )
    rows: dict[str, int] = {}
    try:
        with committed_folder(out) as folder:
            _write_rows(imported, folder, manifest, rows)
            if not rows:
                raise InterchangeError(f"{sources[0].name} holds no rows", remedy="import a file with data")
            if out.exists():
                empty_run(out)
    except OSError as error:
        raise InterchangeError(f"{out} cannot be written: {os_reason(error)}") from error
    return Written(paths=(out,), rows=rows, notes=tuple(imported.notes))


def _write_rows(imported: ImportedRun, folder: Path, manifest: Manifest, counted: dict[str, int]) -> None:
    writers = {0: RunWriter.create(folder, manifest, measured_here=False)}
    steps: dict[int, int] = {}
    for rows in imported.rows:
        if rows.rank not in writers:
            writers[rows.rank] = RunWriter.join(
                folder, rank=rows.rank, run_id=manifest.run_id, ranks=imported.ranks, measured_here=False
            )
        writers[rows.rank].append(rows.table, rows.batch)
        counted[rows.table] = counted.get(rows.table, 0) + rows.batch.num_rows
        if "step" in rows.batch.schema.names and rows.batch.num_rows:
            last = max(rows.batch.column("step").to_pylist())
            steps[rows.rank] = max(steps.get(rows.rank, 0), last + 1)
    writers[0].update_manifest(notes=tuple(imported.notes))
    for rank, writer in sorted(writers.items(), reverse=True):  # rank 0 closes the run
        if rank in imported.clocks:
            writer.set_clock(imported.clocks[rank])
        if rank in imported.power:
            writer.set_power(imported.power[rank])
        writer.close(steps=steps.get(rank, 0))


def write_results(
    imported: ImportedBenches, out: Path, *, form: str, sources: Sequence[Source], overwrite: bool
) -> Written:
    """Write the results as files of a folder, ``alltoall-0.json`` and so on.

    Raises:
        InterchangeError: the folder holds something else, or cannot be written.
    """
    record = import_record(form, imported.version, sources)
    names = [f"alltoall-{number}.json" for number in range(len(imported.results))]
    if not is_free(out) and not (overwrite and out.is_dir()):
        raise InterchangeError(f"{out} exists and is not an empty directory", remedy="choose another place")
    paths = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, result in zip(names, imported.results, strict=True):
            marked = result.model_copy(
                update={"argv": command_line(), "import": record, "notes": (*result.notes, *imported.notes)}
            )
            write_text(out / name, marked.model_dump_json(indent=1))
            paths.append(out / name)
    except OSError as error:
        raise InterchangeError(f"{out} cannot be written: {os_reason(error)}") from error
    return Written(paths=tuple(paths), rows={}, notes=imported.notes)

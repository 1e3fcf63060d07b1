"""Grids: every model on every data condition, then a scan over EP degrees; resumable.

A grid directory holds ``grid.json`` (the configuration and the state of every cell), ``cells/<cell>`` (one
run directory each), ``scan.json``, and ``.lock``, which one process at a time holds while it runs the
grid. A cell's name ends in a digest of everything that decides its content, so a changed option makes a new
cell, and a finished cell is never run twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from observatory.campaign.job import ProfileJob, ProfileOptions
from observatory.campaign.naming import content_name, job_content
from observatory.campaign.preflight import check_job, check_libraries
from observatory.campaign.profile import run_profile
from observatory.campaign.run_folders import is_complete
from observatory.errors import DataError, ObservatoryError, PlacementError, RunError
from observatory.run.bounded import read_toml
from observatory.run.documents.writing import frame_records, write_json

if TYPE_CHECKING:
    from observatory.zoo.models import LoadedModel

_LARGEST_CONFIG_BYTES = 1 << 20
_PLACEMENT_RULES = ("linear", "round-robin")
Name = Annotated[str, Field(min_length=1, max_length=4096)]
Positive = Annotated[int, Field(ge=1)]


class GridConfig(BaseModel):
    """A grid as its TOML file states it.

    Attributes:
        models: bundled names, checkpoint directories or hub ids.
        data: data conditions, text files, or ``datasets:NAME``.
        ep: EP degrees to scan every cell at; none skips the scan.
        gpus_per_node: ranks per node of the scan.
        placement: ``linear``, ``round-robin``, or a placement file.
        profile: options all cells share.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: Annotated[tuple[Name, ...], Field(min_length=1, max_length=1000)]
    data: Annotated[tuple[Name, ...], Field(min_length=1, max_length=1000)]
    ep: Annotated[tuple[Positive, ...], Field(max_length=100)] = (4, 8, 16, 32)
    gpus_per_node: Annotated[int, Field(ge=1, le=65536)] = 4
    placement: Name = "linear"
    profile: ProfileOptions = ProfileOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One profile of a grid: its job and the folder name of its run."""

    name: str
    job: ProfileJob


@dataclass(frozen=True, slots=True, kw_only=True)
class CellResult:
    """How a cell ended.

    Attributes:
        cell: the cell.
        run: its run directory.
        state: ``done`` now, ``kept`` from an earlier start, or ``failed``.
        error: one line when ``failed``.
    """

    cell: Cell
    run: Path
    state: Literal["done", "kept", "failed"]
    error: str | None = None


#: Called when a cell starts (result None) and when it ends.
CellProgress = Callable[[Cell, CellResult | None], None]
StepProgress = Callable[[int, int], None]


def load_grid(path: Path) -> GridConfig:
    """Read a grid's TOML file.

    Raises:
        DataError: missing, too large, not TOML, or a key or value that is not understood.
    """
    return read_toml(
        path,
        GridConfig,
        most_bytes=_LARGEST_CONFIG_BYTES,
        failure=DataError,
        what="grid file",
        remedy="docs/grid.md has its form",
    )


def grid_cells(config: GridConfig) -> tuple[Cell, ...]:
    """All cells, model by model so that each model is loaded once."""
    cells = []
    for model in config.models:
        for data in config.data:
            job = ProfileJob(model=model, data=data, **asdict(config.profile))
            cells.append(Cell(name=content_name(model, data, content=job_content(job)), job=job))
    names = [cell.name for cell in cells]
    if len(set(names)) != len(names):
        raise DataError("the grid names a model or a data condition twice; name each once")
    return tuple(cells)


def run_grid(
    config: GridConfig,
    out: Path,
    *,
    cell_progress: CellProgress | None = None,
    step_progress: StepProgress | None = None,
) -> tuple[CellResult, ...]:
    """Run the cells that are not finished yet, then scan all of them.

    One cell's failure does not stop the others; it is stated in the result and in ``grid.json``.

    Args:
        config: the grid.
        out: grid directory; made when missing, resumed when it is one.
        cell_progress: called when a cell starts and ends.
        step_progress: called for every step of the running cell.

    Returns:
        How each cell ended, in grid order.

    Raises:
        RunError: ``out`` exists and is no grid directory, or another process runs a grid in it.
        PlacementError: the placement file cannot be used; known before any cell runs.
        ModelError: a library that every cell needs is missing.
    """
    from observatory.analysis.parallel.placement import load_placement

    cells = grid_cells(config)
    if config.ep and config.placement not in _PLACEMENT_RULES:
        load_placement(config.placement)
    _open_grid(out)
    with _locked(out):
        results = _run_cells(config, cells, out, cell_progress, step_progress)
        _write_scan(out, config, results)
    return tuple(results)


def _run_cells(
    config: GridConfig,
    cells: Sequence[Cell],
    out: Path,
    cell_progress: CellProgress | None,
    step_progress: StepProgress | None,
) -> list[CellResult]:
    """Run or keep each cell; the index names all of them from the start, for early reports.

    Cells that cannot run are stated before the first one runs.
    """
    ended = _early_results(cells, out)
    results: list[CellResult] = []
    _write_index(out, config, cells, list(ended.values()))
    loaded: LoadedModel | None = None
    loaded_name: str | None = None
    for cell in cells:
        run = out / "cells" / cell.name
        if cell.name in ended:
            results.append(ended[cell.name])
        else:
            if cell_progress is not None:
                cell_progress(cell, None)
            try:
                if loaded_name != cell.job.model:
                    from observatory.zoo.models import load_model

                    loaded = load_model(cell.job.model, device=cell.job.device, dtype=cell.job.dtype)
                    loaded_name = cell.job.model
                run_profile(cell.job, run, loaded=loaded, overwrite=True, progress=step_progress)
                results.append(CellResult(cell=cell, run=run, state="done"))
            except ObservatoryError as error:
                results.append(CellResult(cell=cell, run=run, state="failed", error=str(error)))
        if cell_progress is not None:
            cell_progress(cell, results[-1])
        _write_index(out, config, cells, [*results, *ended.values()])
    return results


def _early_results(cells: Sequence[Cell], out: Path) -> dict[str, CellResult]:
    """Cells that end without being run, by name: kept ones, and those that can be known to fail.

    Raises:
        ModelError: a library that all others need is missing.
    """
    ended: dict[str, CellResult] = {}
    for cell in cells:
        run = out / "cells" / cell.name
        if is_complete(run):
            ended[cell.name] = CellResult(cell=cell, run=run, state="kept")
            continue
        check_libraries()
        try:
            check_job(cell.job)
        except ObservatoryError as error:
            ended[cell.name] = CellResult(cell=cell, run=run, state="failed", error=str(error))
    return ended


def _open_grid(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; name a directory for the grid")
    if out.is_dir() and any(out.iterdir()) and not (out / "cells").is_dir():
        raise RunError(f"{out} is not empty and holds no grid; name another directory")
    (out / "cells").mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep a second process from running the same cells; the lock goes with the process, however it ends."""
    descriptor = os.open(out / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                f"another process runs the grid in {out}; wait for it, or name another directory"
            ) from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def _write_index(out: Path, config: GridConfig, cells: Sequence[Cell], results: Sequence[CellResult]) -> None:
    ended = {result.cell.name: result for result in results}
    states = {"done": "complete", "kept": "complete", "failed": "failed"}
    index = []
    for cell in cells:
        result = ended.get(cell.name)
        index.append(
            {
                "name": cell.name,
                "model": cell.job.model,
                "data": cell.job.data,
                "state": "pending" if result is None else states[result.state],
                "error": None if result is None else result.error,
            }
        )
    write_json(out / "grid.json", {"config": config.model_dump(mode="json"), "cells": index})


def _write_scan(out: Path, config: GridConfig, results: Sequence[CellResult]) -> None:
    """Scan every finished cell at every degree that fits its model; degrees that do not are listed."""
    from observatory.analysis.parallel.scan import scan_run
    from observatory.run import open_run

    placement = config.placement if config.placement in _PLACEMENT_RULES else Path(config.placement)
    rows: list[dict[str, object]] = []
    skipped: list[dict[str, object]] = []
    for result in results:
        if result.state == "failed":
            continue
        for ep in config.ep:
            try:
                frame = scan_run(
                    open_run(result.run),
                    ep_degrees=(ep,),
                    gpus_per_node=config.gpus_per_node,
                    placement=placement,
                )
            except PlacementError as error:
                skipped.append({"cell": result.cell.name, "ep": ep, "reason": str(error)})
                continue
            rows.extend({"cell": result.cell.name, **row} for row in frame_records(frame))
    write_json(out / "scan.json", {"rows": rows, "skipped": skipped})

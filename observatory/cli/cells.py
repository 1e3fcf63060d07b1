"""A grid with its progress, for the commands that run one."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from observatory.campaign.grid import (
    Cell,
    CellProgress,
    CellResult,
    GridConfig,
    StepProgress,
    grid_cells,
    run_grid,
)
from observatory.cli.output import ProgressLines, progress_bar

_Progress = tuple[CellProgress, StepProgress | None]


def run_cells(config: GridConfig, out: Path) -> Sequence[CellResult]:
    """Run a grid; on a terminal one bar counts cells, the one below it the steps of the running cell."""
    progress = _bars if sys.stderr.isatty() else _lines
    with progress(len(grid_cells(config))) as (on_cell, on_step):
        return run_grid(config, out, cell_progress=on_cell, step_progress=on_step)


@contextlib.contextmanager
def _bars(total: int) -> Iterator[_Progress]:
    with progress_bar() as bar:
        cells = bar.add_task("cells", total=total)
        steps = bar.add_task("starting", total=None)

        def on_cell(cell: Cell, result: CellResult | None) -> None:
            if result is None:
                bar.start()
                bar.reset(steps, description=f"{cell.job.model} on {cell.job.data}")
            else:
                bar.advance(cells)

        yield on_cell, lambda done, total: bar.update(steps, completed=done, total=total)


@contextlib.contextmanager
def _lines(total: int) -> Iterator[_Progress]:
    """Lines that count cells, from the first that runs on."""
    lines = ProgressLines()
    ended = 0
    has_begun = False

    def on_cell(_: Cell, result: CellResult | None) -> None:
        nonlocal ended, has_begun
        ended += result is not None
        has_begun = has_begun or result is None
        if has_begun:
            lines.update("cells", ended, total)

    yield on_cell, None

"""A grid with its progress bar, for the commands that run one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from observatory.campaign.grid import Cell, CellResult, GridConfig, grid_cells, run_grid
from observatory.cli.output import ProgressLines, progress_bar


def run_cells(config: GridConfig, out: Path) -> Sequence[CellResult]:
    """Run a grid; one bar counts cells, the one below it the steps of the running cell."""
    if not sys.stderr.isatty():
        return _run_in_log(config, out)
    with progress_bar() as bar:
        cells = bar.add_task("cells", total=len(grid_cells(config)))
        steps = bar.add_task("starting", total=None)

        def on_cell(cell: Cell, result: CellResult | None) -> None:
            if result is None:
                bar.start()
                bar.reset(steps, description=f"{cell.job.model} on {cell.job.data}")
            else:
                bar.advance(cells)

        return run_grid(
            config,
            out,
            cell_progress=on_cell,
            step_progress=lambda done, total: bar.update(steps, completed=done, total=total),
        )


def _run_in_log(config: GridConfig, out: Path) -> Sequence[CellResult]:
    """Run a grid where stderr is no terminal; lines count cells."""
    lines = ProgressLines()
    total = len(grid_cells(config))
    ended = 0

    has_begun = False

    def on_cell(_: Cell, result: CellResult | None) -> None:
        nonlocal ended, has_begun
        ended += result is not None
        has_begun = has_begun or result is None
        if has_begun:
            lines.update("cells", ended, total)

    return run_grid(config, out, cell_progress=on_cell)

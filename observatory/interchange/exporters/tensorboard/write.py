"""The directory that ``tensorboard --logdir`` is given: a run of TensorBoard for each phase."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from observatory.errors import RunError
from observatory.interchange.exporters.chrome_trace.rows import Chosen, spread
from observatory.interchange.exporters.tensorboard.scalars import EventFile, Tables, points_of
from observatory.interchange.exporters.tensorboard.traces import write_profiler_traces
from observatory.run import Run
from observatory.run.files import committed_folder
from observatory.run.manifest import PHASES

_MANY_POINTS = 2_000_000
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9_.-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorboardRun:
    """What was written.

    Attributes:
        files: event files and traces.
        points: scalars and histograms.
        notes: what a reader must know.
    """

    files: tuple[Path, ...]
    points: int
    notes: tuple[str, ...]


def write_tensorboard(
    run: Run,
    out: Path,
    *,
    phase: str | None = None,
    layers: Collection[int] | None = None,
    steps: int | None = None,
) -> TensorboardRun:
    """Write ``out/<name of the run>/<phase>/`` with events and, where the run was timed, traces.

    Args:
        run: the run.
        out: the log directory; other runs may lie in it.
        phase: only this phase.
        layers: only these layers, and what belongs to none.
        steps: at most so many steps of each phase, evenly spread.

    Raises:
        RunError: the run is there already, has no steps, or TensorBoard is not installed.
        LoadError: loads are negative or inconsistent.
    """
    if phase is not None and phase not in PHASES:
        raise RunError(f"phase {phase[:40]!r} is unknown", expected=f"one of {', '.join(PHASES)}")
    home = out / (_NOT_IN_A_NAME.sub("_", run.path.resolve().name).strip(".") or "run")
    if home.exists():
        raise RunError(f"{home} is there already", remedy="give another --out, or remove it")
    tables = Tables.of(run)
    found = {name: tables.steps_of(name) for name in PHASES if phase in (None, name)}
    wanted = {name: spread(own, steps or len(own)) for name, own in found.items() if own}
    if not wanted:
        raise RunError(
            f"run {run.path} has no steps of what was asked for",
            remedy="export power samples alone as chrome-trace, or leave out --phase",
        )
    names: list[Path] = []
    notes: dict[str, None] = {}
    points = 0
    with committed_folder(home) as folder:
        for name, own in wanted.items():
            inside = folder / name
            inside.mkdir()
            events = EventFile(inside, unix_s=run.manifest.created_unix_s, unix_of=tables.unix_of(name))
            with events:
                for point in points_of(tables, name, steps=own, layers=layers):
                    events.add(point)
                    points += 1
            chosen = Chosen(phase=name, layers=layers, steps={name: own} if steps else None)
            notes |= dict.fromkeys(write_profiler_traces(run, inside, chosen)[1])
            names += [path.relative_to(folder) for path in sorted(inside.iterdir())]
    if points > _MANY_POINTS:
        notes[f"{points} points are more than TensorBoard likes; choose --phase, --layer or --steps"] = None
    return TensorboardRun(files=tuple(home / name for name in names), points=points, notes=tuple(notes))

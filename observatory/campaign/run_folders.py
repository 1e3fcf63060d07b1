"""Run directories below a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from observatory.errors import ComparisonError, RunError
from observatory.run.bounded import MAX_DOCUMENT_BYTES, parse_json, read_at_most

_DEEPEST = 5
MOST_RUNS = 20_000
_MOST_ENTRIES = 1_000_000


def find_runs(folder: Path) -> list[Path]:
    """Run directories at most five levels below, without following links, by name.

    Raises:
        ComparisonError: it cannot be read, or holds too much to be searched.
    """
    runs: list[Path] = []
    waiting = [(folder, 0)]
    entries = 0
    while waiting:
        here, depth = waiting.pop()
        try:
            with os.scandir(here) as scanned:
                inner = [Path(item.path) for item in scanned if item.is_dir(follow_symlinks=False)]
        except OSError as error:
            if depth == 0:
                raise ComparisonError(
                    f"{folder} cannot be read ({error.strerror})", remedy="give a folder that holds runs"
                ) from error
            continue
        entries += len(inner)
        if len(runs) > MOST_RUNS or entries > _MOST_ENTRIES:
            raise ComparisonError(
                f"{folder} holds over {MOST_RUNS} runs or {_MOST_ENTRIES} folders", remedy="give a part of it"
            )
        for path in inner:
            # Not Path.is_file(): of a folder that may not be entered it raises.
            if os.path.isfile(path / "run.json"):
                runs.append(path)
            elif depth + 1 < _DEEPEST:
                waiting.append((path, depth + 1))
    return sorted(runs)


def expand_runs(paths: Sequence[Path]) -> list[Path]:
    """Run directories behind the paths: a grid or a batch campaign stands for its finished runs.

    Raises:
        RunError: a grid or campaign without a finished run, or with a damaged index.
    """
    runs: list[Path] = []
    for path in paths:
        index = next((path / name for name in _INDEXES if (path / name).is_file()), None)
        if index is None:
            runs.append(path)
            continue
        finished = [run for run in _indexed_runs(index) if is_complete(run)]
        if not finished:
            raise RunError(f"{path} has no finished run yet; {_INDEXES[index.name]}")
        runs.extend(finished)
    return runs


def captured_runs(paths: Sequence[Path]) -> list[Path]:
    """Run directories behind the paths, each once: runs, grids, batch campaigns and folders of runs.

    Runs that never finished are among them.

    Raises:
        RunError: a path holds no run, or the index of a grid or campaign is damaged.
        ComparisonError: a folder cannot be read, or holds too much to be searched.
    """
    runs: dict[Path, None] = {}
    for path in paths:
        index = next((path / name for name in _INDEXES if (path / name).is_file()), None)
        if index is not None:
            found = [run for run in _indexed_runs(index) if (run / "run.json").is_file()]
        elif (path / "run.json").exists() or not path.is_dir():
            found = [path]
        else:
            found = find_runs(path)
        if not found:
            raise RunError(
                f"{path} holds no run", remedy="give a run, a grid, a campaign or a folder of runs"
            )
        runs |= dict.fromkeys(found)
    return list(runs)


#: Files that make a directory stand for its runs, and what to do while there are none.
_INDEXES = {
    "grid.json": "run `observatory grid` again",
    "campaign.json": "see `observatory jobs`",
}


def _indexed_runs(index: Path) -> Iterator[Path]:
    """Where runs of a grid or campaign are, in its order, finished or not."""
    try:
        document = parse_json(read_at_most(index, MAX_DOCUMENT_BYTES) or b"")
        entries = document["cells" if index.name == "grid.json" else "points"]
        names = [Path(str(entry["name"])).name for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{index} is damaged ({error}); run or submit it again") from error
    for name in names:
        if index.name == "grid.json":
            yield index.parent / "cells" / name
        else:
            yield index.parent / "points" / name / "result" / "out" / "run"


def is_complete(run: Path) -> bool:
    """Whether a directory holds a run that was closed in order, as its manifest states; no table is read."""
    from observatory.run.manifest_files import read_manifest

    try:
        return read_manifest(run).state == "complete"
    except RunError:
        return False


def is_whole(run: Path) -> bool:
    """Whether all that a complete run of a profile captured is still there; footers of all parts are read."""
    from observatory.run.head import list_parts, read_head

    try:
        head = read_head(run)
        ranks = range(head.manifest.topology.ranks)
        return head.ranks_of["routing"] == tuple(ranks) and not list_parts(head, head.shards).unreadable
    except RunError:
        return False

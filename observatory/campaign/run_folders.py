"""Run directories below a folder."""

from __future__ import annotations

import os
from pathlib import Path

from observatory.errors import ComparisonError

_DEEPEST = 4
MOST_RUNS = 20_000
_MOST_ENTRIES = 1_000_000


def find_runs(folder: Path) -> list[Path]:
    """Run directories at most four levels below, without following links, by name.

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
            if (path / "run.json").is_file():
                runs.append(path)
            elif depth + 1 < _DEEPEST:
                waiting.append((path, depth + 1))
    return sorted(runs)

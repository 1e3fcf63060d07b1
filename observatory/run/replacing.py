"""Making room for a new run where an old one lies.

Only what a writer has made is ever removed: a folder with a manifest, and nothing in it that no writer makes.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from observatory.errors import PlaceTakenError, RunError
from observatory.run.files import CONTROL_FOLDER, MANIFEST_NAME, RANKS_FOLDER, is_temporary, one_line
from observatory.run.tables import TABLES

_OWN = {MANIFEST_NAME, RANKS_FOLDER, CONTROL_FOLDER, *TABLES}


def check_free(path: Path, *, overwrite: bool = False) -> None:
    """Make sure that a run may be made here: nothing is there, an empty folder, or a run to be replaced.

    Raises:
        PlaceTakenError: a run is there, and ``overwrite`` is not given.
        RunError: something else is there.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise RunError(f"{path} exists and is not a directory", remedy="choose another place for the run")
    names = sorted(entry.name for entry in path.iterdir())
    if not names:
        return
    if not overwrite:
        raise PlaceTakenError(f"{path} exists and is not empty")
    foreign = [name for name in names if name not in _OWN and not is_temporary(name)]
    if MANIFEST_NAME not in names or foreign:
        reason = f"it also holds {one_line(foreign[0], 80)}" if foreign else f"it has no {MANIFEST_NAME}"
        raise RunError(
            f"{path} is not overwritten: {reason}", remedy="remove it yourself or choose another place"
        )


def empty_run(path: Path) -> None:
    """Remove all that a run directory holds; the manifest last, so that a half-emptied one is still a run."""
    for entry in sorted(path.iterdir(), key=lambda entry: entry.name == MANIFEST_NAME):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()

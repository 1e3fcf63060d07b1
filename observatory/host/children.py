"""Command lines of the Python processes that the observatory starts for itself.

Such a child imports from, in this order: the standard library; for the observatory itself, the folder
from which its parent has imported them; packages that an installer has recorded in a folder on its parent's
path; the site-packages of its interpreter. It reads no ``PYTHON*`` variable, and never imports from the
working directory or from the folder of a user's program, whatever ``PYTHONPATH`` holds: a ``queue.py`` there
is meant for others, also where a package was installed next to it. Warning filters and development mode pass
on; the environment stays as it is, for programs that users name.

This file is also what the child runs first, before anything of the observatory is on its path.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import runpy
import site
import subprocess
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import ClassVar

_THIS_FILE = os.path.abspath(__file__)
_OWN = "observatory"
#: Without these nothing runs; a parent may have found them in a folder that no installer has made.
_NEEDED = ("numpy", "pandas", "pyarrow", "pydantic", "scipy", "torch", "transformers")


def python_module(module: str, *arguments: str) -> list[str]:
    """Command that runs a module of the observatory as ``python -m`` would, in an isolated interpreter."""
    return [
        sys.executable,
        "-I",
        *_options(),
        _THIS_FILE,
        json.dumps(_folders()),
        module,
        *arguments,
    ]


def python_code(code: str, *arguments: str) -> list[str]:
    """Command that runs code which needs the standard library only; it starts in milliseconds."""
    return [sys.executable, "-I", "-S", "-c", code, *arguments]


def _options() -> list[str]:
    """Options of this interpreter that its children take over: ``-W``, ``-X`` and the like."""
    options: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # as multiprocessing
    return [*options, *(["-X", "utf8"] if sys.flags.utf8_mode else [])]


def _folders() -> list[str]:
    """Folders of installed packages on this process's path; others that it needed come last."""
    working = _identity(os.curdir)
    kept = [
        folder
        for folder in dict.fromkeys(sys.path)
        if os.path.isabs(folder) and _identity(folder) not in (None, working)
    ]
    loaded = {_folder_of(sys.modules.get(name)) for name in _NEEDED}
    installed = [folder for folder in kept if _takes_packages(folder)]
    return [*installed, *(folder for folder in kept if folder in loaded and folder not in installed)]


def _takes_packages(folder: str) -> bool:
    """Whether an installer has put packages there."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        return any(entry.name.endswith(".dist-info") for entry in entries)
    return False


def _folder_of(module: ModuleType | None) -> str | None:
    file = getattr(module, "__file__", None)
    return None if file is None else os.path.dirname(os.path.dirname(file))


def _identity(folder: str) -> tuple[int, int] | None:
    """Device and inode; None of what is not there."""
    with contextlib.suppress(OSError):
        status = os.stat(folder)
        return status.st_dev, status.st_ino
    return None


class _OwnPackage:
    """Finds the package of the observatory in one folder, and nothing else there."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Where a package lies; None for every other package."""
        return PathFinder.find_spec(name, [self._folder], target) if path is None and name == _OWN else None


class _InstalledModules(PathFinder):
    """Finds modules on the path; in some folders only those that an installer has put there."""

    #: Names of modules, by folder; folders that are not listed have no restriction.
    recorded: ClassVar[dict[str, set[str]]] = {}

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Where a module lies; None if it is not on the path, or only where it was not installed."""
        if path is None:
            path = [
                folder
                for folder in sys.path
                if folder not in cls.recorded or fullname in cls.recorded[folder]
            ]
        return PathFinder.find_spec(fullname, path, target)


def _recorded(folder: str) -> set[str]:
    """Names of the modules and packages that installers have put into a folder.

    An installer may leave no list of files: then the package has the name of what was installed.
    """
    names = set[str]()
    for made in Path(folder).glob("*.dist-info"):
        try:
            with (made / "RECORD").open(encoding="utf-8", errors="replace", newline="") as lines:
                files = [row[0] for row in csv.reader(lines) if row]
        except (OSError, csv.Error):
            files = [made.name.partition("-")[0]]
        names.update(file.replace("\\", "/").partition("/")[0].partition(".")[0] for file in files)
    return names


def _run(argv: Sequence[str]) -> None:
    """In the child: arrange the path, then become the module."""
    folders, module, *arguments = argv
    wanted: list[str] = json.loads(folders)
    first = min(
        (sys.path.index(folder) for folder in site.getsitepackages() if folder in sys.path),
        default=len(sys.path),
    )
    sys.path[:] = [
        *sys.path[:first],
        *wanted,
        *(folder for folder in sys.path[first:] if folder not in wanted),
    ]
    _InstalledModules.recorded = {
        folder: _recorded(folder)
        for folder in wanted
        if folder not in site.getsitepackages() and _takes_packages(folder)
    }
    sys.meta_path[sys.meta_path.index(PathFinder)] = _InstalledModules
    sys.meta_path.insert(0, _OwnPackage(str(Path(_THIS_FILE).parents[2])))
    sys.argv[:] = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _run(sys.argv[1:])

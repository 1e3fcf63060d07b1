"""Commands on imported runs: a run holds the tables that its format brings, and no command can have others.

Runs that were captured here are left to the commands, which know how more can be captured.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from observatory.errors import InterchangeError, ObservatoryError

_LOADS = ("routing",)
#: What differences and series are made of.
_COMPARED = ("routing", "exchange", "spans")
#: The argument of a command that names runs, and the tables of which it needs one.
_NEEDED: dict[str, tuple[str, tuple[str, ...]]] = {
    "routing": ("run", _LOADS),
    "exchanges": ("run", ("exchange",)),
    "scan": ("run", _LOADS),
    "place": ("run", _LOADS),
    "advise": ("runs", _LOADS),
    "plan": ("sources", _LOADS),
    "route-fetch": ("run", _LOADS),
    "replay": ("run", _LOADS),
    "compare": ("inputs", _COMPARED),
    "history": ("folder", _COMPARED),
    "fit": ("results", ("results",)),
    "energy": ("run", ("power",)),
    "clocks recommend": ("model", ("power",)),
    "export": ("run", ()),
}
#: Of exports that need a table; the others write what is there.
_EXPORTED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("nccl-tests", "ucc", "sglang", "tensorrt-llm", "vllm-ascend", "aiconfigurator"), _LOADS),
    "chrome-trace": ("spans", "exchange", "power"),
}


def check_imported(command: str, parameters: Mapping[str, Any]) -> None:
    """Refuse an imported run that holds no table that a command needs.

    Args:
        command: its words, such as ``clocks recommend``.
        parameters: its arguments and options by name.

    Raises:
        InterchangeError: which table is missing, and which formats bring it.
    """
    argument, tables = _NEEDED.get(command, ("", ()))
    if command == "export":
        tables = _EXPORTED.get(str(parameters.get("form")), ())
    named = parameters.get(argument)
    if not tables:
        return
    paths = named if isinstance(named, list | tuple) else [named]
    for path in [Path(path) for path in paths if path is not None]:
        form = _imported_from(path)
        if form is not None:
            _check(command, path, form, tables)


def _imported_from(path: Path) -> str | None:
    """The format that a run was imported from; None for everything else, which the command judges itself."""
    from observatory.run.files import MANIFEST_NAME, one_line
    from observatory.run.manifest_files import read_manifest

    try:
        if not (path / MANIFEST_NAME).is_file():
            return None
        record = read_manifest(path).config.get("import")
    except (ObservatoryError, OSError, ValueError):
        return None
    return one_line(record.get("format"), 40) if isinstance(record, dict) else None


def _check(command: str, path: Path, form: str, tables: tuple[str, ...]) -> None:
    from observatory.interchange.importers.formats import FORMATS
    from observatory.run.parts import list_rank_folders
    from observatory.text import listing

    if any(list_rank_folders(path, table)[0] for table in tables):
        return
    formats = [name for name, known in FORMATS.items() if known.brings in tables]
    raise InterchangeError(
        f"{path} was imported from {form} and has no table {listing(tables, joined_by='or')}, "
        f"which `observatory {command}` needs",
        remedy=f"import {listing(formats, most=len(formats), joined_by='or')}",
    )

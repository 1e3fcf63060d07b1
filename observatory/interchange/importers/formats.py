"""The formats that can be imported, and which of them a file is of."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from observatory.errors import InterchangeError
from observatory.interchange.importers.imported import (
    ImportedRun,
    ImportOptions,
    Written,
    write_results,
    write_run,
)
from observatory.interchange.importers.not_imported import what_is_missing
from observatory.interchange.importers.sources import Source
from observatory.text import listing


class Format(NamedTuple):
    """A format that is imported.

    Attributes:
        module: of this package, with `recognises` and `read`.
        brings: the table of a run that it has rows of, or ``results`` of benchmarks.
    """

    module: str
    brings: str


FORMATS: dict[str, Format] = {
    "nccl-tests": Format("nccl_tests", "results"),
    "kineto": Format("kineto", "exchange"),
    "nccl-inspector": Format("nccl_inspector", "exchange"),
    "osu": Format("osu", "results"),
    "sglang": Format("sglang", "routing"),
    "vllm": Format("vllm", "routing"),
    "tensorrt-llm": Format("tensorrt_llm", "routing"),
    "megatron": Format("megatron", "routing"),
    "nvidia-smi": Format("nvidia_smi", "power"),
    "dcgm": Format("prometheus", "power"),
    "clustercockpit": Format("line_protocol", "power"),
    "zeus": Format("zeus", "power"),
    "counts": Format("counts", "routing"),
}
_MOST_FILES = 4096


def import_files(
    form: str, paths: Sequence[Path], out: Path, options: ImportOptions, *, overwrite: bool = False
) -> tuple[str, Written]:
    """Import files of one format.

    Args:
        form: one of `FORMATS`, or ``auto``.
        paths: the files: of one run, or of one kind of benchmark.
        out: run directory, or folder of results, to make.
        options: what the user states where files do not.
        overwrite: replace a run or results that are there.

    Returns:
        The format, and what was written.

    Raises:
        InterchangeError: no such format, or the files cannot be read or lack what is needed.
        RunError: the run cannot be written.
    """
    if not 0 < len(paths) <= _MOST_FILES:
        raise InterchangeError(f"{len(paths)} files cannot be imported", expected=f"1 to {_MOST_FILES}")
    sources = [Source(path) for path in paths]
    name = _recognised(sources) if form == "auto" else form
    if name not in FORMATS:
        raise InterchangeError(
            f"import format {name!r} does not exist",
            expected=listing(["auto", *FORMATS], most=len(FORMATS) + 1, joined_by="or"),
        )
    imported = _module(name).read(sources, options)
    if isinstance(imported, ImportedRun):
        return name, write_run(imported, out, form=name, sources=sources, overwrite=overwrite)
    return name, write_results(imported, out, form=name, sources=sources, overwrite=overwrite)


def _recognised(sources: Sequence[Source]) -> str:
    found: dict[str, str] = {}
    for source in sources:
        head = source.head()
        form = next((name for name in FORMATS if _module(name).recognises(head)), None)
        if form is None and (lacking := what_is_missing(head)):
            raise source.refused(lacking)
        if form is None:
            raise source.refused(
                "is of no format that is recognised",
                remedy=f"name it if it is one of {listing(list(FORMATS), most=len(FORMATS))}",
            )
        found.setdefault(form, source.name)
    if len(found) > 1:
        named = [f"{name} ({form})" for form, name in found.items()]
        raise InterchangeError(
            f"files of several formats cannot become one run: {listing(named)}", remedy="import each alone"
        )
    return next(iter(found))


def _module(form: str) -> Any:
    return importlib.import_module(f"observatory.interchange.importers.{FORMATS[form].module}")

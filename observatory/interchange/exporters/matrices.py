"""Writes the captured traffic of a run in other tools' formats, one folder per export."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from observatory.errors import BenchmarkError
from observatory.interchange.exporters.nccl_tests import dropped_bytes, matrix_text
from observatory.interchange.exporters.ucc import pattern_lines
from observatory.run.documents.bench import Traffic
from observatory.run.documents.writing import write_json, write_text
from observatory.run.files import committed_folder, is_free

ExportFormat = Literal["nccl-tests", "ucc"]

_MAX_FILES = 100_000


def export_traffic(
    captured: Iterable[Traffic],
    out: Path,
    *,
    form: ExportFormat,
    roles: Sequence[Literal["dispatch", "combine"]] = ("dispatch", "combine"),
    run_id: str | None = None,
    placement: str | None = None,
    notes: Sequence[str] = (),
) -> list[Path]:
    """Write matrices and an ``index.json`` that says what each file holds.

    nccl-tests: one text file per step, layer and role. UCC: one pattern file per phase, layer and role with
    all steps in order.

    Args:
        captured: dispatch matrices.
        out: folder to make; it must not hold an export yet.
        form: ``nccl-tests`` or ``ucc``.
        roles: the combine is the transpose of the dispatch.
        run_id: the run they come from.
        placement: which rank has which expert in them, for the index.
        notes: what a reader of the matrices must know, for the index: that they are an estimate, for one.

    Returns:
        The files written, the index last.

    Raises:
        BenchmarkError: the folder is not empty, nothing to write, too many files, or counts too large.
    """
    if form not in ("nccl-tests", "ucc"):
        raise BenchmarkError(f"format {form!r} is unknown; expected nccl-tests or ucc")
    if not is_free(out):
        raise BenchmarkError(f"{out} is there already and not an empty folder; give another --out")
    items = [(traffic, role) for traffic in captured for role in roles]
    if not items:
        raise BenchmarkError(
            "the run has no routing rows of the phase and layers asked for: nothing to export"
        )
    texts = _nccl_tests(items) if form == "nccl-tests" else _ucc(items, run_id)
    if len(texts) > _MAX_FILES:
        raise BenchmarkError(f"{len(texts)} files would be written; choose --steps or --layer")
    index = {
        "format": form,
        "run_id": run_id,
        "ranks": items[0][0].ranks,
        "placement": placement,
        "row_bytes": items[0][0].row_bytes,
        "notes": list(notes),
        "unit": "bytes from rank i (rows) to rank j (columns)",
        "files": [{"file": name, **about} for name, (_, about) in texts.items()],
    }
    with committed_folder(out) as folder:
        for name, (text, _) in texts.items():
            write_text(folder / name, text)
        write_json(folder / "index.json", index)
    return [*(out / name for name in texts), out / "index.json"]


_Items = list[tuple[Traffic, Literal["dispatch", "combine"]]]
_Texts = dict[str, tuple[str, dict[str, object]]]


def _turned(traffic: Traffic, role: str) -> NDArray[np.int64]:
    return traffic.bytes_PP if role == "dispatch" else traffic.bytes_PP.T


def _nccl_tests(items: _Items) -> _Texts:
    return {
        f"{traffic.phase}-layer{traffic.layer:03d}-step{traffic.step:06d}-{role}.txt": (
            matrix_text(_turned(traffic, role)),
            {
                "phase": traffic.phase,
                "layer": traffic.layer,
                "step": traffic.step,
                "role": role,
                "bytes": int(traffic.bytes_PP.sum()),
                "bytes_dropped_by_rounding": dropped_bytes(traffic.bytes_PP),
            },
        )
        for traffic, role in items
    }


def _ucc(items: _Items, run_id: str | None) -> _Texts:
    by_file: dict[str, tuple[list[NDArray[np.int64]], dict[str, object]]] = {}
    for traffic, role in items:
        name = f"{traffic.phase}-layer{traffic.layer:03d}-{role}.ptini"
        steps: list[int | None] = []
        matrices, about = by_file.setdefault(
            name, ([], {"phase": traffic.phase, "layer": traffic.layer, "role": role, "steps": steps})
        )
        matrices.append(_turned(traffic, role))
        listed = about["steps"]
        assert isinstance(listed, list)
        listed.append(traffic.step)
    return {
        name: (
            "\n".join(pattern_lines(matrices, description=f"run {run_id or 'unknown'}, {name}")) + "\n",
            about,
        )
        for name, (matrices, about) in by_file.items()
    }

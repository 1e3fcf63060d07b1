"""JSON documents made from frames: what ``--json`` prints and what campaigns keep next to their runs."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from observatory.run.files import committed

if TYPE_CHECKING:
    import pandas as pd


def frame_records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of a frame as plain dictionaries; missing and non-finite numbers become None."""
    return [
        {str(name): _plain(value) for name, value in zip(frame.columns, row, strict=True)}
        for row in frame.itertuples(index=False, name=None)
    ]


def dump_json(document: dict[str, Any]) -> str:
    """One JSON document; NaN and infinities never leak into it."""
    return json.dumps(_plain(document), indent=2, allow_nan=False, ensure_ascii=False)


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a document; see `write_text`."""
    write_text(path, dump_json(document) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file through a temporary name: a reader never sees half of it, and no half is left behind."""
    with committed(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _is_missing(value: Any) -> bool:
    """Whether it is pandas' NA or NaT, which only a process that has imported pandas can have."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and (value is pandas.NA or value is pandas.NaT)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or _is_missing(value):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value

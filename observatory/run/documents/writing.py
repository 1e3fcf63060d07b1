"""JSON documents made from frames: what ``--json`` prints and what campaigns keep next to their runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from observatory.run.files import committed


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


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or value is pd.NA or value is pd.NaT:
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value

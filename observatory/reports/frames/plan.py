"""Capacity plans that a report takes in addition to its runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from observatory.run.documents.plan import load_plan


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFile:
    """One plan.

    Attributes:
        path: where it was read from.
        document: as ``observatory plan --json`` printed it.
    """

    path: Path
    document: Mapping[str, Any]


def collect_plans(paths: Sequence[str | os.PathLike[str]]) -> tuple[PlannedFile, ...]:
    """Read every plan; a file given twice is read once.

    Raises:
        PlanError: one cannot be read.
    """
    return tuple(
        PlannedFile(path=path, document=load_plan(path).model_dump(mode="json"))
        for path in dict.fromkeys(map(Path, paths))
    )

"""Measurements of ``bench route-fetch`` that a report takes in addition to its runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from observatory.advice.route_fetch import known_constants
from observatory.analysis.route_fetch.document import Question, route_fetch_document
from observatory.run.documents.route_fetch import RouteFetchResult, load_route_fetch

#: Points of the map of a figure: rows, sizes.
_STEPS = (25, 17)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteFetchFile:
    """One measurement and what follows from it.

    Attributes:
        path: where it was read from.
        result: the measurement.
        document: what ``observatory route-fetch --json`` states about it, over the measured range and for the
            most layers that were measured.
    """

    path: Path
    result: RouteFetchResult
    document: Mapping[str, Any]


def collect_route_fetch(paths: Sequence[str | os.PathLike[str]]) -> tuple[RouteFetchFile, ...]:
    """Read and fit every measurement; a file given twice is read once.

    Raises:
        BenchmarkError: one cannot be read, or cannot be fitted.
    """
    return tuple(_collected(Path(path)) for path in dict.fromkeys(map(Path, paths)))


def _collected(path: Path) -> RouteFetchFile:
    answers, notes = known_constants(str(path), ())
    domains = [constants.domain for _, constants, _ in answers]

    def ends(name: str) -> tuple[int, int]:
        return (
            int(min(domain[name][0] for domain in domains)),
            int(max(domain[name][1] for domain in domains)),
        )

    question = Question(
        rows=ends("rows"), sizes=ends("size"), layers=ends("layers")[1], uses=1.0, steps=_STEPS
    )
    return RouteFetchFile(
        path=path,
        result=load_route_fetch(path),
        document=route_fetch_document(answers, question, notes),
    )

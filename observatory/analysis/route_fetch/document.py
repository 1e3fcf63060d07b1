"""The documents and tables of ``observatory bench route-fetch`` and ``observatory route-fetch``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from observatory.analysis.columns import Column, Table
from observatory.run.documents.printed import printed_document
from observatory.run.documents.route_fetch import RouteFetchResult
from observatory.run.usable_cores import share_document, short_of_cores

MEASURED_COLUMNS = (
    Column(name="shape", title="shape", text=True, key=True),
    Column(name="option", title="option", text=True, key=True),
    Column(name="points", title="points"),
    Column(name="fastest_us", title="fastest", unit="us", digits=0),
    Column(name="median_us", title="median", unit="us", digits=0),
    Column(name="slowest_us", title="slowest", unit="us", digits=0),
    Column(
        name="transfer_share",
        title="transfer",
        unit="%",
        digits=0,
        legend="share of all time that is transfer",
    ),
    Column(
        name="worst_error",
        title="worst error",
        legend="largest difference from one rank alone, relative to the largest value",
    ),
    Column(name="correct", title="correct"),
)


def measured_document(result: RouteFetchResult) -> dict[str, Any]:
    """A measurement as ``bench route-fetch --json`` prints it (docs/json.md)."""
    return printed_document(
        "bench_route_fetch",
        {
            "backend": result.backend,
            "device": result.device,
            "ranks": len(result.node_of_P),
            "repeats": result.repeats,
            "short_of_cores": [share_document(share) for share in short_of_cores(result.cores_P or ())],
            "notes": list(result.notes),
            "rows": list(_measured_rows(result)),
            "points": [
                {
                    "shape": result.shapes[case.shape].name,
                    **case.model_dump(include={"option", "rows", "size", "layers", "suffix", "correct"}),
                    "total_us": case.total_us,
                    "transfer_us": float(np.median(case.stage_us("transfer"))),
                }
                for case in result.cases
            ],
        },
    )


def _measured_rows(result: RouteFetchResult) -> Iterator[dict[str, Any]]:
    for shape, option in dict.fromkeys((case.shape, case.option) for case in result.cases):
        cases = [case for case in result.cases if (case.shape, case.option) == (shape, option)]
        total_us_N = np.array([case.total_us for case in cases])
        transfer_us_N = np.array([np.median(case.stage_us("transfer")) for case in cases])
        yield {
            "shape": result.shapes[shape].name,
            "option": option,
            "points": len(cases),
            "fastest_us": float(total_us_N.min()),
            "median_us": float(np.median(total_us_N)),
            "slowest_us": float(total_us_N.max()),
            "transfer_share": float(transfer_us_N.sum() / total_us_N.sum()),
            "worst_error": max(case.worst_error for case in cases),
            "correct": all(case.correct for case in cases),
        }


def measured_tables(document: dict[str, Any]) -> list[Table]:
    """A row for each shape and option, and every point for programs."""
    points = document["points"]
    title = f"{document['ranks']} ranks over {document['backend']}, {document['repeats']} repeats"
    columns = tuple(Column(name=name, title=name) for name in points[0])
    return [
        Table(name="rows", columns=MEASURED_COLUMNS, rows=document["rows"], title=title),
        Table(name="points", columns=columns, rows=points),
    ]

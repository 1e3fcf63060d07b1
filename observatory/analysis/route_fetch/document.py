"""The documents and tables of ``observatory bench route-fetch`` and ``observatory route-fetch``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from observatory.analysis.columns import Column, Table
from observatory.analysis.route_fetch.choosing import (
    CERTAIN,
    DecisionMap,
    break_even_rows,
    compared_options,
    decision_map,
    edit_costs,
)
from observatory.analysis.route_fetch.costs import Constants
from observatory.analysis.route_fetch.fitting import HeldOut
from observatory.analysis.route_fetch.reuse import MeasuredPrefill
from observatory.errors import BenchmarkError
from observatory.run.documents.printed import printed_document
from observatory.run.documents.route_fetch import Option, RouteFetchResult, Shape
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


ACCURACY_COLUMNS = (
    Column(name="shape", title="shape", text=True, key=True),
    Column(name="options", title="options", text=True, key=True),
    Column(name="points", title="points"),
    Column(
        name="knee_bytes",
        title="knee",
        unit="kB",
        scale=1e-3,
        digits=1,
        legend="payload of a trip whose bytes take as long as the trip",
    ),
    Column(name="mape_above", title="error above", unit="%", digits=1, legend="mean, of held-out points"),
    Column(name="mape_below", title="below", unit="%", digits=1),
    Column(
        name="right_apart",
        title="right",
        of="apart",
        legend="picks of the faster option at held-out points whose measured costs differ by over 10 %",
    ),
    Column(name="right", title="right in all", of="points"),
    Column(name="time_lost", title="time lost", unit="%", digits=1, legend="by wrong picks, mean"),
)
BREAK_EVEN_COLUMNS = (
    Column(name="shape", title="shape", text=True, key=True),
    Column(name="size", title="size", digits=0, key=True, legend="tokens of the chunk, or inner width"),
    Column(
        name="rows",
        title="fetch from rows",
        digits=0,
        interval=("rows_low", "rows_high"),
        otherwise="never",
        legend="query rows (or tokens) from which fetching costs less, with its 90 % interval",
    ),
    Column(name="route_us", title="route at fewest", unit="us", digits=0, wide=True),
    Column(
        name="fetch_us",
        title="fetch at fewest",
        unit="us",
        digits=0,
        legend="time at the fewest rows of the map",
    ),
    Column(name="local_us", title="local", unit="us", digits=0),
    Column(name="local_mj", title="local", unit="mJ", wide=True, legend="energy of the prefill alone"),
    Column(
        name="beyond",
        title="beyond",
        unit="x",
        digits=1,
        legend="how many times the bytes and layers of that size lie beyond what was measured",
    ),
    Column(name="measured", title="measured", wide=True),
)
EDIT_COLUMNS = (
    Column(name="shape", title="shape", text=True, key=True),
    Column(name="span", title="span", digits=0, key=True, legend="tokens that half as many replace"),
    Column(name="suffix", title="suffix", digits=0, key=True, legend="tokens behind it"),
    Column(name="splice_us", title="splice", unit="us", digits=0, legend="turn and move what is cached"),
    Column(name="trim_us", title="prefill", unit="us", digits=0, legend="of all behind the prefix"),
    Column(
        name="ratio",
        title="prefill / splice",
        digits=1,
        interval=("ratio_low", "ratio_high"),
        legend="with its 90 % interval",
    ),
    Column(name="measured", title="measured", legend="whether such an edit was measured"),
)
_LETTERS: dict[Option, str] = {"route": "R", "fetch": "F", "local": "L"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a map is asked for.

    Attributes:
        rows, sizes: ends of the axes.
        layers: layers of the cache.
        uses: steps that one fetch serves.
        steps: points of the axes: rows, sizes.
    """

    rows: tuple[int, int]
    sizes: tuple[int, int]
    layers: int
    uses: float
    steps: tuple[int, int] = (10, 8)


def route_fetch_document(
    answers: Sequence[tuple[Shape, Constants, HeldOut | None]],
    question: Question,
    notes: Sequence[str] = (),
    *,
    prefill: MeasuredPrefill | None = None,
) -> dict[str, Any]:
    """Break-even points and maps, as ``route-fetch --json`` prints them (docs/json.md).

    Args:
        answers: shapes with their constants.
        question: where costs are asked for.
        notes: what a reader must know.
        prefill: cost of making a chunk here, where it was measured apart from the constants.

    Raises:
        BenchmarkError: constants with which fewer than two options can be compared.
    """
    maps = []
    for shape, constants, _ in answers:
        options = compared_options(constants, shape, is_prefill_known=prefill is not None)
        if len(options) < 2:
            raise BenchmarkError(f"{constants.source} does not say what two options of {shape.name} cost")
        maps.append(
            decision_map(
                constants,
                shape,
                rows_R=_axis(question.rows, question.steps[0]),
                size_C=_axis(question.sizes, question.steps[1]),
                layers=1 if shape.kind == "expert" else question.layers,
                uses=question.uses,
                options=options,
                prefill_us_C=None
                if prefill is None
                else prefill.us(_axis(question.sizes, question.steps[1])),
            )
        )
    first = answers[0][1]
    return printed_document(
        "route_fetch",
        {
            "grade": first.grade,
            "source": first.source,
            "backend": first.backend or None,
            "ranks": first.holders + 1,
            "layers": question.layers,
            "uses": question.uses,
            "notes": list(notes),
            "accuracy": [
                row
                for constants, held_out in {item[1].shape: item[1:] for item in answers}.values()
                if held_out is not None
                for row in accuracy_rows(held_out, constants)
            ],
            "break_even": [
                row
                for answer, item in zip(answers, maps, strict=True)
                for row in _break_even_rows(answer, item, question, prefill)
            ],
            "edits": [
                {"shape": shape.name, **row}
                for shape, constants, _ in answers
                for row in edit_costs(
                    constants,
                    shape,
                    spans=_axis(question.sizes, 3),
                    suffixes=_axis(question.sizes, 3),
                    layers=question.layers,
                )
            ],
            "map": [
                row for answer, item in zip(answers, maps, strict=True) for row in _map_rows(answer[0], item)
            ],
        },
    )


def _axis(ends: tuple[int, int], points: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Whole numbers from one end to the other, evenly spaced by ratio."""
    return np.unique(np.round(np.geomspace(*ends, points)))


def accuracy_rows(held_out: HeldOut, constants: Constants) -> Iterator[dict[str, Any]]:
    """Of the options that move data, and of those that edit a cache, for the shape that was measured."""
    pairs: tuple[tuple[Option, Option], ...] = (("route", "fetch"), ("splice", "trim"))
    for both in pairs:
        if not held_out.of(both).any():
            continue
        predicted, measured, apart, lost = held_out.winners(both)
        yield {
            "shape": None if constants.shape is None else constants.shape.name,
            "options": f"{both[0]}, {both[1]}",
            "points": len(apart),
            "knee_bytes": held_out.knee_bytes if both[0] == "route" else None,
            "mape_above": held_out.mape(both, above=True),
            "mape_below": held_out.mape(both, above=False),
            "above": int((held_out.above_N & held_out.of(both)).sum()),
            "apart": int(apart.sum()),
            "right_apart": int((predicted == measured)[apart].sum()),
            "right": int((predicted == measured).sum()),
            "time_lost": float(lost.mean()),
        }


def _break_even_rows(
    answer: tuple[Shape, Constants, HeldOut | None],
    item: DecisionMap,
    question: Question,
    prefill: MeasuredPrefill | None,
) -> Iterator[dict[str, Any]]:
    shape, constants, _ = answer
    local_mj_C = np.full(len(item.size_C), np.nan)
    if prefill is not None and shape.kind != "expert":
        local_mj_C = prefill.mj(item.size_C)
    for index, size in enumerate(item.size_C.tolist()):
        layers = 1 if shape.kind == "expert" else question.layers
        rows = break_even_rows(constants, shape, size=size, layers=layers, uses=question.uses)
        costs = {f"{option}_us": float(item.us_OCR[at, index, 0]) for at, option in enumerate(item.options)}
        yield {
            "shape": shape.name,
            "size": size,
            "rows": None if rows is None else rows.value,
            "rows_low": None if rows is None else rows.low,
            "rows_high": None if rows is None else rows.high,
            "route_us": costs.get("route_us"),
            "fetch_us": costs.get("fetch_us"),
            "local_us": costs.get("local_us"),
            "local_mj": float(local_mj_C[index]),
            "measured": constants.covers(shape, size=(size,), layers=(layers,)),
            "beyond": constants.beyond(shape, size=(size,), layers=(layers,)),
        }


def _map_rows(shape: Shape, item: DecisionMap) -> Iterator[dict[str, Any]]:
    for at_size, size in enumerate(item.size_C.tolist()):
        for at_rows, rows in enumerate(item.rows_R.tolist()):
            yield {
                "shape": shape.name,
                "size": size,
                "rows": rows,
                "option": item.options[item.best_CR[at_size, at_rows]],
                "certainty": float(item.certainty_CR[at_size, at_rows]),
                "measured": bool(item.measured_CR[at_size, at_rows]),
                **{
                    f"{option}_us": float(item.us_OCR[index, at_size, at_rows])
                    for index, option in enumerate(item.options)
                },
            }


def route_fetch_tables(document: dict[str, Any]) -> list[Table]:
    """Accuracy, break-even points, and a map for each shape."""
    has_local = any(row["local_us"] is not None for row in document["break_even"])
    shown = tuple(item for item in BREAK_EVEN_COLUMNS if has_local or not item.name.startswith("local"))
    tables = [Table(name="break_even", columns=shown, rows=document["break_even"])]
    if document["accuracy"]:
        title = f"{document['source']}: predicted by fits that did not see the point"
        accuracy = Table(name="accuracy", columns=ACCURACY_COLUMNS, rows=document["accuracy"], title=title)
        tables.insert(0, accuracy)
    if document["edits"]:
        tables.append(Table(name="edits", columns=EDIT_COLUMNS, rows=document["edits"]))
    columns = tuple(Column(name=name, title=name) for name in document["map"][0])
    return [*tables, Table(name="map", columns=columns, rows=document["map"])]


def map_tables(document: dict[str, Any]) -> list[Table]:
    """The map as people read it: a line for each size, a column for each number of rows."""
    tables = []
    for shape in dict.fromkeys(row["shape"] for row in document["map"]):
        rows = [row for row in document["map"] if row["shape"] == shape]
        heads = [f"{value:.0f}" for value in dict.fromkeys(row["rows"] for row in rows)]
        lines: dict[float, dict[str, Any]] = {}
        for row in rows:
            lines.setdefault(row["size"], {"size": row["size"]})[f"{row['rows']:.0f}"] = _mark(row)
        what = ("inner width", "tokens") if shape.startswith("expert") else ("chunk tokens", "query rows")
        tables.append(
            Table(
                name=shape,
                columns=(
                    Column(name="size", title=what[0], digits=0, key=True),
                    *(Column(name=head, title=head) for head in heads),
                ),
                rows=list(lines.values()),
                title=f"{shape}: R route, F fetch, L local by {what[1]} (columns) and {what[0]} (lines); "
                f"? in under {CERTAIN:.0%} of samples, * beyond what was measured",
            )
        )
    return tables


def _mark(row: dict[str, Any]) -> str:
    sure = "" if row["certainty"] >= CERTAIN else "?"
    return f"{_LETTERS[row['option']]}{sure}{'' if row['measured'] else '*'}"

"""Rows of spans and exchanges as events of a trace, times left to the caller."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from observatory.run import Run
from observatory.run.checks import FIXED_SCHEMAS

_PHASE, _LAYER = "phase", "moe_layer"
_LONGEST = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Which rows are wanted.

    Attributes:
        phase: only this phase; None for all.
        layers: only these, and rows of no layer; None for all.
        steps: per phase, the steps wanted; None for all.
    """

    phase: str | None = None
    layers: Collection[int] | None = None
    steps: Mapping[str, frozenset[int]] | None = None

    @property
    def narrows(self) -> bool:
        """Whether anything is left out."""
        return self.phase is not None or self.layers is not None or self.steps is not None

    def of(self, rows: pa.Table) -> pa.Table:
        """The wanted rows."""
        if self.phase is not None:
            rows = rows.filter(pc.equal(rows.column("phase"), self.phase))
        if self.layers is not None:
            layers = pa.array(sorted(self.layers), pa.int32())
            layer = rows.column("layer")
            rows = rows.filter(pc.or_(pc.is_null(layer), pc.is_in(layer, layers)))
        if self.steps is not None:
            kept = [
                step in self.steps.get(phase, ())
                for step, phase in zip(
                    rows.column("step").to_pylist(), rows.column("phase").to_pylist(), strict=True
                )
            ]
            rows = rows.filter(pa.array(kept, pa.bool_()))
        return rows


def rows_of(run: Run, table: str) -> Iterator[pa.Table]:
    """A table's rows, a row group at a time, with every column of its schema: a missing one is null."""
    schema = FIXED_SCHEMAS[table]
    for rows in run.iter_rows(table):
        complete = rows
        for place in schema:
            if place.name not in rows.column_names:
                complete = complete.append_column(place, pa.nulls(rows.num_rows, place.type))
        if rows.num_rows:
            yield complete


def choose_steps(run: Run, phase: str | None, most: int | None) -> dict[str, frozenset[int]] | None:
    """At most so many steps of each phase, evenly spread; None for all of them."""
    if most is None:
        return None
    steps_of: dict[str, set[int]] = {}
    for table in ("spans", "exchange"):
        for rows in rows_of(run, table):
            chosen_rows = Chosen(phase=phase).of(rows)
            for pair in (
                chosen_rows.select(["phase", "step"]).group_by(["phase", "step"]).aggregate([]).to_pylist()
            ):
                steps_of.setdefault(pair["phase"], set()).add(pair["step"])
    return {name: spread(steps, most) for name, steps in steps_of.items()}


def spread(steps: Collection[int], most: int) -> frozenset[int]:
    """At most so many of these, evenly spread, first and last among them."""
    ordered = np.array(sorted(steps))
    places = np.linspace(0, len(ordered) - 1, min(most, len(ordered))).round().astype(int)
    return frozenset(ordered[places].tolist())


def span_events(rows: pa.Table) -> Iterator[tuple[str, dict[str, Any]]]:
    """Track and event of each span, in the order of the rows."""
    for row in rows.select(["step", "phase", "layer", "name"]).to_pylist():
        name = row["name"]
        track = "phases" if name == _PHASE else "layers" if name == _LAYER else "inside layers"
        args = {key: row[key] for key in ("step", "phase", "layer") if row[key] is not None}
        shown = row["phase"] if name == _PHASE else name
        yield track, {"name": shown[:_LONGEST], "cat": "span", "args": args}


def exchange_events(rows: pa.Table) -> Iterator[tuple[str, dict[str, Any]]]:
    """Track and event of each exchange, in the order of the rows."""
    words = ("step", "phase", "layer", "role", "group", "sequence", "algorithm", "backend", "blocking")
    lists = ("send_bytes", "receive_bytes")
    for row in rows.select([*words, *lists]).to_pylist():
        args = {name: _short(row[name]) for name in words if row.get(name) is not None}
        for name in lists:
            if row.get(name) is not None:
                args[f"{name}_total"] = sum(value or 0 for value in row[name])
        yield "exchanges", {"name": row["role"][:_LONGEST], "cat": "exchange", "args": args}


def _short(value: Any) -> Any:
    return value[:_LONGEST] if isinstance(value, str) else value

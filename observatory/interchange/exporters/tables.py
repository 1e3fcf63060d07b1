"""The tables of a run as one tidy file each: a value in a cell, what it is about in the columns before it.

Lists become rows: loads by expert, bytes by member of the group, sampled tokens by place among their
experts. Tables are streamed: memory is that of a row group, whatever the length of the run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from html import escape
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from observatory.errors import RunError
from observatory.interchange.exporters.chrome_trace.rows import Chosen, rows_of
from observatory.run import Run
from observatory.run.checks import FIXED_SCHEMAS
from observatory.run.files import committed_folder, is_free, one_line

TableForm = Literal["csv", "parquet", "markdown"]
TABLE_FORMS: tuple[TableForm, ...] = ("csv", "parquet", "markdown")

#: Rows of a Markdown table, which people read; what lies behind is left out, and said.
MOST_MARKDOWN_ROWS = 1000
#: What a spreadsheet takes for the beginning of a formula [OWASP, CSV injection].
_FORMULA = r"^[=+\-@\t\r]"
_MARKDOWN = re.compile(r"([\\|`*_\[\]])")
_ENDINGS = {"csv": "csv", "parquet": "parquet", "markdown": "md"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TableFiles:
    """What was written.

    Attributes:
        files: one per table that has rows.
        rows: rows of all of them.
        notes: what a reader must know.
    """

    files: tuple[Path, ...]
    rows: int
    notes: tuple[str, ...]


def write_tables(
    run: Run,
    out: Path,
    *,
    form: TableForm,
    phase: str | None = None,
    layers: Collection[int] | None = None,
) -> TableFiles:
    """Write a folder of tables.

    Args:
        run: the run.
        out: a new folder.
        form: csv (UTF-8; text that a spreadsheet would take for a formula gets an apostrophe in front),
            parquet, or markdown (of each table the first rows).
        phase: only this phase; samples of devices have none and are all written.
        layers: only these layers, and what belongs to none.

    Raises:
        RunError: the folder is there, or the run has no such rows.
        LoadError, RunFormatError: rows that cannot be true.
    """
    if not is_free(out):
        raise RunError(f"{out} is there already and not an empty folder", remedy="give another --out")
    chosen = Chosen(phase=phase, layers=layers)
    names: list[str] = []
    notes: list[str] = []
    count = 0
    with committed_folder(out) as folder:
        for name, make in _TABLES.items():
            pieces = (rows for rows in make(run, chosen) if rows.num_rows)
            first = next(pieces, None)
            if first is None:
                continue
            names.append(f"{name}.{_ENDINGS[form]}")
            written = _WRITERS[form](folder / names[-1], first, pieces)
            if form == "markdown" and written > MOST_MARKDOWN_ROWS:
                notes.append(f"{names[-1]} has the first {MOST_MARKDOWN_ROWS} of {written} rows")
            count += written
        if not names:
            raise RunError(
                f"run {run.path} has no rows of what was asked for", remedy="leave out --phase and --layer"
            )
    return TableFiles(files=tuple(out / name for name in names), rows=count, notes=(*notes, *run.problems))


def _loads(run: Run, chosen: Chosen) -> Iterator[pa.Table]:
    for block in run.iter_loads(phase=chosen.phase, layers=chosen.layers):
        s, p = np.nonzero(block.present_SP)
        yield pa.table(
            {
                "step": np.repeat(block.step_S[s], block.experts),
                "phase": pa.array(np.full(s.size * block.experts, block.phase, object), pa.string()),
                "layer": np.full(s.size * block.experts, block.layer),
                "source_rank": np.repeat(block.source_rank_P[p], block.experts),
                "window_steps": np.repeat(block.window_steps_S[s], block.experts),
                "expert": np.tile(np.arange(block.experts), s.size),
                "load": block.load_SPE[s, p].reshape(-1),
            }
        )


def _tokens(run: Run, chosen: Chosen) -> Iterator[pa.Table]:
    for block in run.iter_loads(phase=chosen.phase, layers=chosen.layers):
        s, p = np.nonzero(block.present_SP)
        yield pa.table(
            {
                "step": block.step_S[s],
                "phase": pa.array(np.full(s.size, block.phase, object), pa.string()),
                "layer": np.full(s.size, block.layer),
                "source_rank": block.source_rank_P[p],
                "window_steps": block.window_steps_S[s],
                "tokens": block.tokens_SP[s, p],
                "assignments": block.assignments_SP[s, p],
            }
        )


def _plain(table: str) -> Callable[[Run, Chosen], Iterator[pa.Table]]:
    """Rows of a table of the run without its lists."""

    def make(run: Run, chosen: Chosen) -> Iterator[pa.Table]:
        names = [field.name for field in FIXED_SCHEMAS[table] if not pa.types.is_list(field.type)]
        for rows in rows_of(run, table):
            yield _chosen(rows, chosen).select(list(dict.fromkeys((*names, "source_rank"))))

    return make


def _listed(table: str, column: str, *, item: str, value: str) -> Callable[[Run, Chosen], Iterator[pa.Table]]:
    """Rows of a table of the run, one for each item of a list of it."""

    def make(run: Run, chosen: Chosen) -> Iterator[pa.Table]:
        schema = FIXED_SCHEMAS[table]
        for rows in run.iter_rows(table):
            own = _chosen(rows, chosen)
            keys = [
                name for name in own.column_names if name in (*_KEYS, "position") and name in schema.names
            ]
            yield _exploded(own, keys, column, item=item, value=value)

    return make


def _bytes(run: Run, chosen: Chosen) -> Iterator[pa.Table]:
    """Bytes to and from each member of the group."""
    for rows in rows_of(run, "exchange"):
        own = _chosen(rows, chosen)
        for direction in ("send", "receive"):
            made = _exploded(own, list(_KEYS), f"{direction}_bytes", item="member", value="bytes")
            said = pa.array(np.full(made.num_rows, direction, object), pa.string())
            yield made.add_column(made.num_columns - 2, "direction", said)


def _exploded(rows: pa.Table, keys: list[str], column: str, *, item: str, value: str) -> pa.Table:
    listed = rows.column(column).combine_chunks()
    length_N = pc.fill_null(pc.list_value_length(listed), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    parent = np.repeat(np.arange(rows.num_rows), length_N)
    place = np.arange(parent.size) - np.repeat(np.cumsum(length_N) - length_N, length_N)
    made = rows.select(keys).take(pa.array(parent))
    return made.append_column(item, pa.array(place)).append_column(value, pc.list_flatten(listed))


def _chosen(rows: pa.Table, chosen: Chosen) -> pa.Table:
    """The wanted rows; a table without phases or layers is about all of them."""
    return Chosen(
        phase=chosen.phase if "phase" in rows.column_names else None,
        layers=chosen.layers if "layer" in rows.column_names else None,
    ).of(rows)


def _write_csv(path: Path, first: pa.Table, rest: Iterator[pa.Table]) -> int:
    with pyarrow.csv.CSVWriter(path, first.schema) as writer:
        count = 0
        for rows in chain((first,), rest):
            writer.write_table(_harmless(rows.cast(first.schema)))
            count += rows.num_rows
    return count


def _harmless(rows: pa.Table) -> pa.Table:
    """Text that a spreadsheet would take for a formula gets an apostrophe in front."""
    for at, field in enumerate(rows.schema):
        if pa.types.is_string(field.type):
            text = rows.column(at)
            guarded = pc.if_else(
                pc.match_substring_regex(text, _FORMULA), pc.binary_join_element_wise("'", text, ""), text
            )
            rows = rows.set_column(at, field, guarded)
    return rows


def _write_parquet(path: Path, first: pa.Table, rest: Iterator[pa.Table]) -> int:
    with pyarrow.parquet.ParquetWriter(path, first.schema, compression="zstd") as writer:
        count = 0
        for rows in chain((first,), rest):
            writer.write_table(rows.cast(first.schema))
            count += rows.num_rows
    return count


def _write_markdown(path: Path, first: pa.Table, rest: Iterator[pa.Table]) -> int:
    with path.open("w", encoding="utf-8") as file:
        file.write(f"| {' | '.join(first.column_names)} |\n|{'---|' * first.num_columns}\n")
        count = 0
        for rows in chain((first,), rest):
            for row in rows.slice(0, max(MOST_MARKDOWN_ROWS - count, 0)).to_pylist():
                file.write(f"| {' | '.join(map(_cell, row.values()))} |\n")
            count += rows.num_rows
    return count


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return _MARKDOWN.sub(r"\\\1", escape(one_line(value))) if isinstance(value, str) else str(value)


#: Columns that say which exchange, token or bias a value is of.
_KEYS = ("step", "phase", "layer", "source_rank", "role", "group", "sequence")
_TABLES: dict[str, Callable[[Run, Chosen], Iterator[pa.Table]]] = {
    "tokens": _tokens,
    "loads": _loads,
    "exchanges": _plain("exchange"),
    "exchange_bytes": _bytes,
    "spans": _plain("spans"),
    "power": _plain("power"),
    "token_experts": _listed("tokens", "expert_ids", item="place", value="expert"),
    "router_biases": _listed("router_bias", "bias", item="expert", value="bias"),
    "auxiliary_losses": _plain("auxiliary_loss"),
}
_WRITERS: dict[TableForm, Callable[[Path, pa.Table, Iterator[pa.Table]], int]] = {
    "csv": _write_csv,
    "parquet": _write_parquet,
    "markdown": _write_markdown,
}

"""Checks that every table's rows pass before they are written and after they are read."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from observatory.errors import LoadError, RunFormatError
from observatory.run.files import one_line
from observatory.run.manifest import PHASES
from observatory.run.rows import MAX_EXPERTS, experts_of, routing_columns
from observatory.run.tables import (
    AUXILIARY_LOSS_SCHEMA,
    EXCHANGE_SCHEMA,
    POWER_SCHEMA,
    ROUTER_BIAS_SCHEMA,
    SPAN_SCHEMA,
    TOKENS_SCHEMA,
    routing_schema,
)

#: Schemas of the tables whose columns do not depend on the model.
FIXED_SCHEMAS: dict[str, pa.Schema] = {
    "exchange": EXCHANGE_SCHEMA,
    "spans": SPAN_SCHEMA,
    "power": POWER_SCHEMA,
    "tokens": TOKENS_SCHEMA,
    "router_bias": ROUTER_BIAS_SCHEMA,
    "auxiliary_loss": AUXILIARY_LOSS_SCHEMA,
}

#: Times to 73 years, so that the sum of two fits 64 bits; steps that a double holds exactly; bytes of
#: 4,096 ranks add up to 64 bits.
_TIME, _COUNT, _BYTES = (-(1 << 61), 1 << 61), (0, 1 << 53), (0, 1 << 50)
_RANGES = {
    "step": _COUNT, "sequence": _COUNT, "position": _COUNT,
    "layer": (0, (1 << 31) - 1), "calls": (1, (1 << 31) - 1),
    "backend_sequence": (-1, (1 << 63) - 1),
    "start_ns": _TIME, "end_ns": _TIME, "time_ns": _TIME, "recorder_start_ns": _TIME,
    "recorder_duration_ns": _TIME, "power_cap_ns": _TIME, "thermal_ns": _TIME, "read_ns": _TIME,
    "late_ns": _TIME, "send_bytes": _BYTES, "receive_bytes": _BYTES,
    "power_mw": (0, 1 << 40), "average_power_mw": (0, 1 << 40), "enforced_limit_mw": (0, 1 << 40),
    "energy_mj": (0, 1 << 61), "sm_clock_mhz": (0, 1 << 20), "memory_clock_mhz": (0, 1 << 20),
    "temperature_c": (-273, 1 << 20), "memory_temperature_c": (-273, 1 << 20),
}  # fmt: skip


def checked_rows(table: str, rows: pa.Table | pa.RecordBatch, *, rank: int) -> pa.Table:
    """Rows cast to the table's schema and checked, ready to be written.

    Columns that the schema does not know are kept behind the known ones.

    Raises:
        RunFormatError: columns are missing or of a type that does not fit.
        LoadError: impossible loads or expert ids.
    """
    where = f"rows appended to {table} by rank {rank}"
    given = pa.Table.from_batches([rows]) if isinstance(rows, pa.RecordBatch) else rows
    if table == "routing":
        schema = routing_schema(_experts_of_list(given, where), gate_mass=True)
    else:
        schema = FIXED_SCHEMAS[table]
    fields: list[pa.Field] = []
    columns: list[pa.ChunkedArray] = []
    for field in schema:
        indices = given.schema.get_all_field_indices(field.name)
        if not indices and field.nullable:
            continue
        if len(indices) != 1:
            raise RunFormatError(
                f"{where}: column {field.name} is there {len(indices)} times", expected="once"
            )
        try:
            column = given.column(indices[0]).cast(field.type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise RunFormatError(
                f"{where}: column {field.name} is {given.column(indices[0]).type}", expected=f"{field.type}"
            ) from error
        if field.nullable and column.null_count == len(column):
            continue  # a column of nulls says nothing and costs space: readers take a missing one as null
        fields.append(field)
        columns.append(column)
    for field in given.schema:
        if field.name not in schema.names:
            fields.append(field)
            columns.append(given.column(field.name))
    table_rows = pa.Table.from_arrays(columns, schema=pa.schema(fields))
    check_rows(table, table_rows, rank=rank, where=where)
    return table_rows


def _experts_of_list(rows: pa.Table, where: str) -> int:
    """E of rows that are about to be written."""
    index = rows.schema.get_field_index("load")
    if index < 0 or not pa.types.is_fixed_size_list(rows.schema.field(index).type):
        raise RunFormatError(
            f"{where}: no fixed-size list column load", remedy="build the rows with routing_rows()"
        )
    return int(rows.schema.field(index).type.list_size)


def check_schema(table: str, schema: pa.Schema, *, where: str) -> None:
    """Check that a part has the columns of its table; more of numbers, texts or lists of them are allowed.

    Raises:
        RunFormatError: a column is missing, there twice, or of another type.
    """
    for field in schema:
        lists = pa.types.is_list(field.type) or pa.types.is_fixed_size_list(field.type)
        kind = field.type.value_type if lists or pa.types.is_dictionary(field.type) else field.type
        if not (pa.types.is_primitive(kind) or pa.types.is_string(kind)):
            raise RunFormatError(
                f"{where}: column {one_line(field.name, 80)} is {one_line(field.type, 60)}",
                expected="numbers, texts, or lists of them",
            )
    if table == "routing":
        experts_of(schema, where)
        return
    for field in FIXED_SCHEMAS[table]:
        indices = schema.get_all_field_indices(field.name)
        if not indices and field.nullable:
            continue
        kind = schema.field(indices[0]).type if len(indices) == 1 else None
        if kind is None or not _fits(kind, field.type):
            raise RunFormatError(
                f"{where}: column {field.name} is {one_line(kind, 60)}", expected=f"{field.type}"
            )


def _fits(given: pa.DataType, expected: pa.DataType) -> bool:
    if pa.types.is_list(expected):
        return bool(pa.types.is_list(given) and given.value_type == expected.value_type)
    return bool(given == expected)


def _check_range(column: pa.ChunkedArray, name: str, where: str) -> None:
    """Numbers of known columns stay so small that sums and differences fit 64 bits."""
    lists = pa.types.is_list(column.type)
    least, most = _RANGES.get(name, (0, 0))
    if name not in _RANGES or not len(column):
        return
    extremes = pc.min_max(pc.list_flatten(column) if lists else column).as_py()
    for extreme in (extremes["min"], extremes["max"]):
        if extreme is not None and not least <= extreme <= most:
            raise RunFormatError(f"{where}: column {name} holds {extreme}", expected=f"{least} to {most}")


def check_rows(table: str, rows: pa.Table, *, rank: int, where: str) -> None:
    """Check the values of rows whose schema fits.

    Raises:
        RunFormatError: nulls where there must be none, unknown phase, another rank's rows.
        LoadError: impossible loads, expert ids or biases.
    """
    if table == "routing":
        routing_columns(rows, rank=rank, where=where)
        return
    names = rows.column_names
    for field in FIXED_SCHEMAS[table]:
        if field.name in names and not field.nullable and rows.column(field.name).null_count:
            raise RunFormatError(f"{where}: column {field.name} holds nulls", expected="a value in every row")
    for name in names:
        _check_range(rows.column(name), name, where)
    if "source_rank" in names and pc.any(pc.not_equal(rows.column("source_rank"), rank)).as_py():
        raise RunFormatError(
            f"{where}: holds rows of another source_rank", expected=f"only those of rank {rank}"
        )
    if (
        "phase" in names
        and not pc.all(pc.is_in(rows.column("phase"), pa.array(PHASES))).as_py()
        and rows.num_rows
    ):
        raise RunFormatError(f"{where}: holds an unknown phase", expected=f"one of {', '.join(PHASES)}")
    if rows.num_rows:
        _check_values(table, rows, where)


def _check_values(table: str, rows: pa.Table, where: str) -> None:
    """Values of one table alone; there are rows."""
    if table == "tokens":
        ids = pc.list_flatten(rows.column("expert_ids"))
        lowest, highest = pc.min(ids).as_py(), pc.max(ids).as_py()
        if ids.null_count or (lowest is not None and not 0 <= lowest <= highest < MAX_EXPERTS):
            raise LoadError(
                f"{where}: expert ids range from {lowest} to {highest}",
                expected=f"0 to {MAX_EXPERTS - 1}, with padding and masked tokens left out",
            )
    if table == "router_bias":
        lengths = pc.min_max(pc.list_value_length(rows.column("bias"))).as_py()
        values = pc.list_flatten(rows.column("bias"))
        if not 1 <= lengths["min"] <= lengths["max"] <= MAX_EXPERTS:
            raise RunFormatError(
                f"{where}: column bias holds {lengths['min']} to {lengths['max']} values in a row",
                expected=f"1 to {MAX_EXPERTS}, one for each expert",
            )
        if values.null_count or not pc.all(pc.is_finite(values)).as_py():
            raise LoadError(f"{where}: column bias holds nulls, NaN or infinity", expected="finite numbers")
    is_stated = table == "auxiliary_loss" and "value" in rows.column_names
    if is_stated and pc.all(pc.is_finite(rows.column("value"))).as_py() is False:
        raise LoadError(f"{where}: column value holds NaN or infinity", expected="finite numbers or nulls")

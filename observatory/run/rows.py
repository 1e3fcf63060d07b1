"""Routing rows as arrays: built for the writer, checked for both writer and reader.

Shape legend: N rows, E experts of the layer. Writer and reader apply the same checks, so that what
was accepted at capture can be read back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from observatory.errors import LoadError, RunFormatError
from observatory.run.files import one_line
from observatory.run.manifest import PHASES
from observatory.run.tables import routing_schema

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

#: More experts in one layer than any known model by two orders of magnitude; also ``MoeLayerSpec``'s bound.
MAX_EXPERTS = 65536

#: Tokens, and assignments to one expert, in one row stay below this, so that sums over E experts and 2^7 rows
#: cannot overflow (sums over a run are checked while it is read); steps that a double holds exactly.
MAX_LOAD = 2**40
MAX_STEP = 2**53


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RoutingColumns:
    """Checked rows of one routing part.

    Attributes:
        step_N: first step of each row's window.
        window_steps_N: steps folded into the row.
        phase_N: index into ``PHASES``.
        layer_N: layer numbers.
        tokens_N: tokens routed in the window.
        assignments_N: assignments made, the sum of ``load_NE`` over E.
        load_NE: assignments per expert, (N, E).
        gate_mass_NE: summed gate weights, NaN where null; None when the part has none.
        step_max_over_mean_N: largest per-step max/mean, NaN where null; None when the part has none.
        partial_N: calls of the window were made that are not counted, or ended in the middle; None when the
            part has no such row.
    """

    step_N: Int64
    window_steps_N: Int64
    phase_N: npt.NDArray[np.int8]
    layer_N: Int64
    tokens_N: Int64
    assignments_N: Int64
    load_NE: Int64
    gate_mass_NE: Float64 | None
    step_max_over_mean_N: Float64 | None
    partial_N: npt.NDArray[np.bool_] | None = None

    @property
    def nbytes(self) -> int:
        """Size of all arrays."""
        arrays = (getattr(self, name) for name in self.__slots__)
        return sum(array.nbytes for array in arrays if array is not None)

    def take(self, rows: npt.NDArray[np.intp] | slice) -> RoutingColumns:
        """The given rows; a slice shares memory."""
        return RoutingColumns(
            step_N=self.step_N[rows],
            window_steps_N=self.window_steps_N[rows],
            phase_N=self.phase_N[rows],
            layer_N=self.layer_N[rows],
            tokens_N=self.tokens_N[rows],
            assignments_N=self.assignments_N[rows],
            load_NE=self.load_NE[rows],
            gate_mass_NE=None if self.gate_mass_NE is None else self.gate_mass_NE[rows],
            step_max_over_mean_N=None
            if self.step_max_over_mean_N is None
            else self.step_max_over_mean_N[rows],
            partial_N=None if self.partial_N is None else self.partial_N[rows],
        )


def routing_rows(
    *,
    step_N: npt.ArrayLike,
    phase_N: str | Iterable[str],
    layer_N: npt.ArrayLike,
    source_rank: int,
    tokens_N: npt.ArrayLike,
    load_NE: npt.ArrayLike,
    window_steps: int | npt.ArrayLike = 1,
    gate_mass_NE: npt.ArrayLike | None = None,
    step_load_min_NE: npt.ArrayLike | None = None,
    step_load_max_NE: npt.ArrayLike | None = None,
    step_max_over_mean_N: npt.ArrayLike | None = None,
    partial_N: npt.ArrayLike | None = None,
) -> pa.RecordBatch:
    """Build routing rows for :meth:`RunWriter.append` from arrays; ``assignments`` is the sum of the loads.

    The arrays are copied.

    Args:
        step_N: first step of each row's window; one number serves all rows, as for ``tokens_N``.
        phase_N: one of ``PHASES``, for all rows or one per row.
        layer_N: layer of each row.
        source_rank: rank whose tokens these are.
        tokens_N: tokens routed in the window.
        load_NE: assignments per expert, integers, (N, E).
        window_steps: steps folded into each row.
        gate_mass_NE: summed gate weights per expert; a row of NaN becomes null.
        step_load_min_NE: smallest per-step load of the window per expert.
        step_load_max_NE: largest per-step load of the window per expert.
        step_max_over_mean_N: largest per-step max/mean of the window.
        partial_N: calls of the window were made that are not counted, or ended in the middle.

    Raises:
        LoadError: loads are no integers, or the shapes do not fit together. Whether the values can be true is
            checked when the rows are appended.
    """
    loads = _integers(load_NE, "load_NE")
    if loads.ndim != 2 or not 1 <= loads.shape[1] <= MAX_EXPERTS:
        raise LoadError(
            f"load_NE has shape {loads.shape}", expected=f"(rows, experts) with 1 to {MAX_EXPERTS} experts"
        )
    rows, experts = loads.shape
    schema = routing_schema(experts, gate_mass=True)

    def per_row(values: npt.ArrayLike, name: str) -> pa.Array:
        array = _integers(values, name)
        if array.shape not in ((), (rows,)):
            raise LoadError(f"{name} has shape {array.shape}", expected=f"({rows},) like the rows of load_NE")
        return pa.array(np.ascontiguousarray(np.broadcast_to(array, (rows,))))

    def per_expert(values: npt.ArrayLike, name: str) -> pa.Array:
        is_mass = name == "gate_mass_NE"
        array = np.array(values, dtype=np.float64) if is_mass else _integers(values, name)
        if array.shape != loads.shape:
            raise LoadError(f"{name} has shape {array.shape}", expected=f"{loads.shape} like load_NE")
        values = pa.array(np.ascontiguousarray(array).reshape(-1))
        unknown = pa.array(np.isnan(array).all(axis=1)) if is_mass else None
        return pa.FixedSizeListArray.from_arrays(values, experts, mask=unknown)

    phases = [phase_N] * rows if isinstance(phase_N, str) else list(phase_N)
    if len(phases) != rows:
        raise LoadError(f"phase_N has {len(phases)} entries", expected=f"{rows} like the rows of load_NE")
    columns: dict[str, pa.Array] = {
        "step": per_row(step_N, "step_N"),
        "window_steps": per_row(window_steps, "window_steps"),
        "phase": pa.array(phases, pa.string()),
        "layer": per_row(layer_N, "layer_N"),
        "source_rank": per_row(source_rank, "source_rank"),
        "tokens": per_row(tokens_N, "tokens_N"),
        "assignments": pa.array(loads.sum(axis=1)),
        "load": per_expert(loads, "load_NE"),
    }
    if step_load_min_NE is not None:
        columns["step_load_min"] = per_expert(step_load_min_NE, "step_load_min_NE")
    if step_load_max_NE is not None:
        columns["step_load_max"] = per_expert(step_load_max_NE, "step_load_max_NE")
    if step_max_over_mean_N is not None:
        extremes = np.asarray(step_max_over_mean_N, dtype=np.float64)
        if extremes.shape not in ((), (rows,)):
            raise LoadError(
                f"step_max_over_mean_N has shape {extremes.shape}", expected=f"({rows},) like load_NE"
            )
        columns["step_max_over_mean"] = pa.array(np.full(rows, extremes), from_pandas=True)
    if gate_mass_NE is not None:
        columns["gate_mass"] = per_expert(gate_mass_NE, "gate_mass_NE")
    if partial_N is not None:
        partial = np.broadcast_to(np.asarray(partial_N, dtype=bool), (rows,))
        columns["partial"] = pa.array(partial, mask=~partial)
    fields = [field for field in schema if field.name in columns]
    try:
        arrays = [columns[field.name].cast(field.type) for field in fields]
    except pa.ArrowInvalid as error:
        raise LoadError(f"numbers do not fit the routing schema: {one_line(error)}") from error
    return pa.record_batch(arrays, schema=pa.schema(fields))


def _integers(values: npt.ArrayLike, name: str) -> Int64:
    array = np.asarray(values)
    if array.size == 0:
        return array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise LoadError(f"{name} has dtype {array.dtype}", expected="integers, as loads are counts")
    if array.dtype.kind == "u" and array.max() > np.iinfo(np.int64).max:
        raise LoadError(f"{name} holds {array.max()}, which does not fit int64")
    return array.astype(np.int64)  # a copy: Arrow shares memory, and callers reuse their buffers


def experts_of(schema: pa.Schema, where: str) -> int:
    """E of a routing part, from the type of its ``load`` column.

    Raises:
        RunFormatError: a column is missing or of another type than :func:`routing_schema` says.
    """
    index = schema.get_field_index("load")
    kind: Any = schema.field(index).type if index >= 0 else None
    if not (pa.types.is_fixed_size_list(kind) if kind is not None else False):
        raise RunFormatError(f"{where}: column load is {kind}", expected="a fixed-size list of int64")
    experts = int(kind.list_size)
    if not 1 <= experts <= MAX_EXPERTS:
        raise RunFormatError(f"{where}: column load has {experts} experts", expected=f"1 to {MAX_EXPERTS}")
    for field in routing_schema(experts, gate_mass=True):
        indices = schema.get_all_field_indices(field.name)
        if not indices and field.nullable:
            continue
        if len(indices) != 1 or not _same_type(schema.field(indices[0]).type, field.type):
            kinds = ", ".join(str(schema.field(i).type) for i in indices) or "missing"
            raise RunFormatError(
                f"{where}: column {field.name} is {one_line(kinds, 80)}", expected=f"{field.type}"
            )
    return experts


def _same_type(given: pa.DataType, expected: pa.DataType) -> bool:
    """Equal up to the name and nullability of list items, which other writers choose differently."""
    if pa.types.is_fixed_size_list(expected):
        return bool(
            pa.types.is_fixed_size_list(given)
            and given.list_size == expected.list_size
            and given.value_type == expected.value_type
        )
    if pa.types.is_dictionary(given):
        return bool(given.value_type == expected)
    return bool(given == expected)


def routing_columns(rows: pa.Table | pa.RecordBatch, *, rank: int, where: str) -> RoutingColumns:
    """Check routing rows and give them as arrays that share memory where they can.

    Args:
        rows: rows of one E; nullable columns may be missing.
        rank: the rank whose folder the rows belong to.
        where: name of the part for messages.

    Raises:
        RunFormatError: wrong types, nulls, unknown phase, another rank's rows, impossible step or layer.
        LoadError: negative or impossibly large loads, or loads that do not sum to ``assignments``.
    """
    experts = experts_of(rows.schema, where)
    table = pa.Table.from_batches([rows]) if isinstance(rows, pa.RecordBatch) else rows

    def column(name: str) -> pa.Array:
        array = table.column(name).combine_chunks()
        if isinstance(array, pa.ChunkedArray):
            array = array.chunk(0) if array.num_chunks else pa.array([], array.type)
        return array

    def numbers(name: str, least: int, most: int = MAX_LOAD) -> Int64:
        array = column(name)
        if array.null_count:
            raise RunFormatError(f"{where}: column {name} holds nulls", expected="a number in every row")
        values: Int64 = array.to_numpy(zero_copy_only=False).astype(np.int64, copy=False)
        if values.size and values.min() < least:
            raise RunFormatError(f"{where}: column {name} holds {values.min()}", expected=f"at least {least}")
        if values.size and values.max() > most:
            raise RunFormatError(f"{where}: column {name} holds {values.max()}", expected=f"at most {most}")
        return values

    def lists(name: str) -> Int64:
        array = column(name)
        items = array.flatten()
        if array.null_count or items.null_count or len(items) != len(array) * experts:
            raise LoadError(f"{where}: column {name} holds nulls", expected=f"{experts} counts in every row")
        values: Int64 = items.to_numpy(zero_copy_only=True).reshape(-1, experts)
        # One pass finds both faults: seen as unsigned, a negative number is huge.
        if values.size and values.view(np.uint64).max() > MAX_LOAD:
            worst = values.min() if values.min() < 0 else values.max()
            raise LoadError(f"{where}: column {name} holds {worst}", expected="counts from 0 to 2**40")
        return values

    source_rank = numbers("source_rank", 0)
    if source_rank.size and (source_rank != rank).any():
        other = int(source_rank[source_rank != rank][0])
        raise RunFormatError(
            f"{where}: holds rows of source_rank {other}", expected=f"only those of rank {rank}"
        )
    load_NE = lists("load")
    assignments_N = numbers("assignments", 0, MAX_LOAD * MAX_EXPERTS)
    wrong = np.flatnonzero(load_NE.sum(axis=1) != assignments_N)
    if wrong.size:
        raise LoadError(
            f"{where}: row {wrong[0]} says {assignments_N[wrong[0]]} assignments but its loads sum to "
            f"{load_NE[wrong[0]].sum()}; the part is damaged or its writer wrong"
        )
    names = set(table.column_names)
    _check_window_extremes(table, lists, where, names)
    return RoutingColumns(
        step_N=numbers("step", 0, MAX_STEP),
        window_steps_N=numbers("window_steps", 1),
        phase_N=_phases(column("phase"), where),
        layer_N=numbers("layer", 0),
        tokens_N=numbers("tokens", 0),
        assignments_N=assignments_N,
        load_NE=load_NE,
        gate_mass_NE=_gate_mass(column("gate_mass"), experts, where) if "gate_mass" in names else None,
        step_max_over_mean_N=(
            _finite(column("step_max_over_mean"), "step_max_over_mean", where)
            if "step_max_over_mean" in names
            else None
        ),
        partial_N=_partial(column("partial")) if "partial" in names else None,
    )


def _partial(array: pa.Array) -> npt.NDArray[np.bool_] | None:
    partial_N: npt.NDArray[np.bool_] = pc.fill_null(array, False).to_numpy(zero_copy_only=False).astype(bool)
    return partial_N if partial_N.any() else None


def _check_window_extremes(table: pa.Table, lists: Any, where: str, names: set[str]) -> None:
    """Both extremes, where a part has them for every row, must enclose: 0 <= min <= max."""
    pair = ("step_load_min", "step_load_max")
    if names.issuperset(pair) and not any(table.column(name).null_count for name in pair):
        low, high = lists(pair[0]), lists(pair[1])
        if (low > high).any():
            raise LoadError(f"{where}: step_load_min exceeds step_load_max; the part's writer is wrong")


def _phases(array: pa.Array, where: str) -> npt.NDArray[np.int8]:
    encoded = array if pa.types.is_dictionary(array.type) else pc.dictionary_encode(array)
    if encoded.null_count:
        raise RunFormatError(f"{where}: column phase holds nulls", expected=f"one of {', '.join(PHASES)}")
    index = {phase: code for code, phase in enumerate(PHASES)}
    codes = np.full(len(encoded.dictionary), -1, dtype=np.int8)
    for i, name in enumerate(encoded.dictionary.to_pylist()):
        codes[i] = index.get(name, -1)
    phase_N = codes[encoded.indices.to_numpy(zero_copy_only=False)] if len(encoded) else np.zeros(0, np.int8)
    if phase_N.size and phase_N.min() < 0:
        row = int(np.argmin(phase_N))
        name = one_line(encoded[row].as_py(), 40)
        raise RunFormatError(f"{where}: phase {name!r} is unknown", expected=f"one of {', '.join(PHASES)}")
    return phase_N


def _finite(array: pa.Array, name: str, where: str) -> Float64:
    values: Float64 = array.to_numpy(zero_copy_only=False).astype(np.float64, copy=False)
    stated = ~pc.is_null(array).to_numpy(zero_copy_only=False)
    if not np.isfinite(values[stated]).all():
        raise LoadError(f"{where}: column {name} holds NaN or infinity", expected="finite numbers or null")
    return values


def _gate_mass(array: pa.Array, experts: int, where: str) -> Float64:
    mass_NE = np.full((len(array), experts), np.nan)
    stated = ~pc.is_null(array).to_numpy(zero_copy_only=False)
    items = array.flatten()
    if items.null_count:
        raise LoadError(
            f"{where}: column gate_mass holds nulls inside a row", expected=f"{experts} finite numbers"
        )
    mass_NE[stated] = _finite(items, "gate_mass", where).reshape(-1, experts)
    return mass_NE

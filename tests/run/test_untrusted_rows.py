"""Rows that cannot be true are errors when they are written and when they are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from observatory.errors import LoadError, ObservatoryError, RunFormatError
from observatory.run import RunWriter, open_run, routing_rows
from observatory.run.tables import AUXILIARY_LOSS_SCHEMA, ROUTER_BIAS_SCHEMA
from tests.run.conftest import WriteRun, manifest_of, one_step

Change = Callable[[dict[str, Any]], None]


def put(name: str, value: pa.Array) -> Change:
    return lambda columns: columns.__setitem__(name, value)


def lists(values: list[list[Any] | None], kind: pa.DataType, size: int = 4) -> pa.Array:
    return pa.array(values, pa.list_(kind, size))


GOOD = [[1, 2, 3, 4], [0, 0, 5, 5]]
# fmt: off
# ruff: noqa: E501
FAULTS: dict[str, tuple[Change, type[ObservatoryError], str]] = {
    "negative load": (put("load", lists([[1, 2, -3, 10], GOOD[1]], pa.int64())), LoadError, "holds -3; expected counts"),
    "huge load": (put("load", lists([[2**62] * 4, GOOD[1]], pa.int64())), LoadError, f"holds {2**62}"),
    "sum differs": (put("assignments", pa.array([10, 11])), LoadError, "row 1 says 11 assignments but its loads sum to 10"),
    "null load": (put("load", lists([None, GOOD[1]], pa.int64())), LoadError, "column load holds nulls"),
    "null count": (put("load", lists([[1, None, 5, 4], GOOD[1]], pa.int64())), LoadError, "column load holds nulls"),
    "null step": (put("step", pa.array([None, 1])), RunFormatError, "column step holds nulls"),
    "negative step": (put("step", pa.array([-1, 1])), RunFormatError, "column step holds -1; expected at least 0"),
    "no window": (put("window_steps", pa.array([1, 0], pa.int32())), RunFormatError, "window_steps holds 0; expected at least 1"),
    "negative layer": (put("layer", pa.array([0, -2], pa.int32())), RunFormatError, "column layer holds -2"),
    "negative tokens": (put("tokens", pa.array([0, -2])), RunFormatError, "column tokens holds -2"),
    "unknown phase": (put("phase", pa.array(["prefill", "warm\nup"])), RunFormatError, "phase 'warm up' is unknown"),
    "other rank": (put("source_rank", pa.array([0, 1], pa.int32())), RunFormatError, "rows of source_rank 1; expected only those of rank 0"),
    "infinite mean": (put("step_max_over_mean", pa.array([1.0, np.inf])), LoadError, "NaN or infinity"),
    "NaN mass": (put("gate_mass", lists([[np.nan] * 4, [1.0] * 4], pa.float64())), LoadError, "NaN or infinity"),
    "crossed extremes": (
        lambda columns: columns.update(
            step_load_min=lists([[1, 1, 1, 1]] * 2, pa.int64()), step_load_max=lists([[0, 1, 1, 1]] * 2, pa.int64())
        ),
        LoadError, "step_load_min exceeds step_load_max",
    ),
}
# fmt: on
TYPE_FAULTS: dict[str, tuple[Change, str]] = {
    "float load": (
        put("load", lists([[np.nan] * 4] * 2, pa.float64())),
        "column load is .*double.*; expected",
    ),
    "ragged load": (
        put("load", pa.array([[1, 2, 3, 4], [1]], pa.list_(pa.int64()))),
        "expected a fixed-size list",
    ),
    "text load": (
        put("load", pa.array(["x", "y"])),
        "column load is string; expected a fixed-size list of int64",
    ),
    "no load": (lambda columns: columns.pop("load"), "column load is None"),
    "no step": (lambda columns: columns.pop("step"), "column step is missing; expected int64"),
    "text layer": (put("layer", pa.array(["0", "1"])), "column layer is string; expected int32"),
    "short mass": (put("gate_mass", lists([[1.0]] * 2, pa.float64(), 1)), "column gate_mass is .*; expected"),
}


def faulty(change: Change) -> pa.Table:
    rows = routing_rows(
        step_N=[0, 1], phase_N="prefill", layer_N=0, source_rank=0, tokens_N=5, load_NE=np.array(GOOD)
    )
    columns = {name: rows.column(name) for name in rows.schema.names}
    change(columns)
    return pa.table(columns)


def planted(path: Path, rows: pa.Table) -> Path:
    """A closed run into which somebody put a part by hand."""
    RunWriter.create(path, manifest_of()).close()
    (path / "routing/rank-00000").mkdir(parents=True)
    pq.write_table(rows, path / "routing/rank-00000/part-000000.parquet")
    return path


@pytest.mark.parametrize("name", FAULTS)
def test_impossible_rows_are_refused_by_reader_and_writer(tmp_path: Path, name: str) -> None:
    change, kind, message = FAULTS[name]
    rows = faulty(change)
    run = open_run(planted(tmp_path / "planted", rows))
    # Blocks do not hold the extremes of windows, so only the stream of rows reads and checks them.
    stream = run.iter_rows("routing") if name == "crossed extremes" else run.iter_loads()
    with pytest.raises(kind) as caught:
        list(stream)
    assert message in str(caught.value)
    assert "part-000000.parquet" in str(caught.value)
    with RunWriter.create(tmp_path / "written", manifest_of()) as writer:
        with pytest.raises(ObservatoryError):
            writer.append("routing", rows)
        writer.append("routing", one_step(0))
    assert open_run(tmp_path / "written").row_count("routing") == 2


@pytest.mark.parametrize("name", TYPE_FAULTS)
def test_columns_of_wrong_type_are_refused_when_the_run_is_opened(tmp_path: Path, name: str) -> None:
    change, message = TYPE_FAULTS[name]
    with pytest.raises(RunFormatError, match=message):
        open_run(planted(tmp_path / "run", faulty(change)))


def test_two_rows_for_one_step_are_refused(tmp_path: Path) -> None:
    rows = one_step(3)
    path = planted(tmp_path / "run", pa.Table.from_batches([rows, rows]))
    with pytest.raises(RunFormatError, match="layer 0 in prefill has two rows of one rank for one step"):
        list(open_run(path).iter_loads())


def test_rows_of_another_model_are_refused(write_run: WriteRun) -> None:
    path = write_run()
    manifest = (path / "run.json").read_text()
    layer = '"moe_layers": [{"layer": 1, "module": "m", "experts": 8}]'
    for empty in ('"moe_layers": []', '"moe_layers":[]'):
        manifest = manifest.replace(empty, layer)
    (path / "run.json").write_text(manifest)
    with pytest.raises(RunFormatError, match="layer 1 has 4 experts, 8 in the manifest"):
        list(open_run(path).iter_loads())


@pytest.mark.parametrize("ids", [[-1], [0, 70000], [None]])
def test_expert_ids_out_of_range_are_refused(tmp_path: Path, ids: list[int | None]) -> None:
    rows = pa.table(
        {
            "step": [0], "phase": ["decode"], "layer": pa.array([0], pa.int32()),
            "source_rank": pa.array([0], pa.int32()), "position": [0],
            "expert_ids": pa.array([ids], pa.list_(pa.int32())),
        }
    )  # fmt: skip
    with (
        RunWriter.create(tmp_path / "run", manifest_of()) as writer,
        pytest.raises(LoadError, match="expert ids"),
    ):
        writer.append("tokens", rows)
    (tmp_path / "run/tokens/rank-00000").mkdir(parents=True)
    pq.write_table(rows, tmp_path / "run/tokens/rank-00000/part-000000.parquet")
    with pytest.raises(LoadError, match="expert ids range from"):
        open_run(tmp_path / "run").token_samples()


@pytest.mark.parametrize(
    ("bias", "problem"),
    [
        ([0.5, float("nan")], "nulls, NaN or infinity"),
        ([float("inf")], "nulls, NaN or infinity"),
        ([0.5, None], "nulls, NaN or infinity"),
        ([], "holds 0 to 0 values in a row; expected 1 to 65536"),
        ([0.0] * 65537, "holds 65537 to 65537 values in a row"),
    ],
)
def test_router_biases_that_no_router_can_have_are_refused(
    tmp_path: Path, bias: list[float | None], problem: str
) -> None:
    rows = pa.table([[0], [1], [0], [bias]], schema=ROUTER_BIAS_SCHEMA)
    with (
        RunWriter.create(tmp_path / "run", manifest_of()) as writer,
        pytest.raises(ObservatoryError, match=problem),
    ):
        writer.append("router_bias", rows)
    (tmp_path / "run/router_bias/rank-00000").mkdir(parents=True)
    pq.write_table(rows, tmp_path / "run/router_bias/rank-00000/part-000000.parquet")
    with pytest.raises(ObservatoryError, match=problem):
        open_run(tmp_path / "run").router_biases()


@pytest.mark.parametrize(
    ("value", "calls", "problem"),
    [
        (float("nan"), 1, "column value holds NaN or infinity"),
        (float("inf"), 1, "column value holds NaN or infinity"),
        (0.5, 0, "column calls holds 0; expected 1 to"),
    ],
)
def test_auxiliary_losses_that_no_model_states_are_refused(
    tmp_path: Path, value: float, calls: int, problem: str
) -> None:
    rows = pa.table([[0], ["train_forward"], [0], [value], [calls]], schema=AUXILIARY_LOSS_SCHEMA)
    with (
        RunWriter.create(tmp_path / "run", manifest_of()) as writer,
        pytest.raises(ObservatoryError, match=problem),
    ):
        writer.append("auxiliary_loss", rows)
    (tmp_path / "run/auxiliary_loss/rank-00000").mkdir(parents=True)
    pq.write_table(rows, tmp_path / "run/auxiliary_loss/rank-00000/part-000000.parquet")
    with pytest.raises(ObservatoryError, match=problem):
        open_run(tmp_path / "run").auxiliary_losses()


def test_built_rows_do_not_share_memory_with_reused_buffers() -> None:
    load_NE, mass_NE, most_N = np.array([[1, 2]]), np.array([[0.5, 1.5]]), np.array([1.5])
    rows = routing_rows(
        step_N=0, phase_N="decode", layer_N=0, source_rank=0, tokens_N=3, load_NE=load_NE,
        gate_mass_NE=mass_NE, step_load_max_NE=load_NE, step_max_over_mean_N=most_N,
    )  # fmt: skip
    load_NE[:], mass_NE[:], most_N[:] = 9, 9, 9
    assert rows.column("load").to_pylist() == [[1, 2]]
    assert rows.column("step_load_max").to_pylist() == [[1, 2]]
    assert rows.column("gate_mass").to_pylist() == [[0.5, 1.5]]
    assert rows.column("step_max_over_mean").to_pylist() == [1.5]


@pytest.mark.parametrize(
    ("loads", "message"),
    [
        (np.array([1, 2]), r"load_NE has shape \(2,\)"),
        (np.array([[1.5, 2.0]]), "load_NE has dtype float64; expected integers"),
        (np.array([[np.nan, 2.0]]), "load_NE has dtype float64"),
        (np.array([[2**63, 0]], dtype=np.uint64), "does not fit int64"),
        (np.zeros((2, 3), np.int64), r"layer_N has shape \(3,\); expected \(2,\)"),
        (np.zeros((3, 0), np.int64), r"load_NE has shape \(3, 0\)"),
    ],
)
def test_arrays_that_are_no_loads_are_refused_by_the_builder(loads: np.ndarray, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        routing_rows(step_N=0, phase_N="decode", layer_N=[0, 1, 2], source_rank=0, tokens_N=1, load_NE=loads)


def test_a_layer_number_beyond_the_schema_is_refused_by_the_builder() -> None:
    with pytest.raises(LoadError, match=r"numbers do not fit the routing schema: .*2199023255552"):
        routing_rows(
            step_N=0, phase_N="decode", layer_N=2**41, source_rank=0, tokens_N=1, load_NE=np.ones((1, 2), int)
        )


def test_rows_of_more_layers_than_a_model_has_are_refused(tmp_path: Path) -> None:
    with RunWriter.create(tmp_path / "run", manifest_of()) as writer:
        for first in (0, 600):
            layers = np.arange(first, first + 600)
            rows = routing_rows(
                step_N=0, phase_N="decode", layer_N=layers, source_rank=0, tokens_N=1, load_NE=[[1]] * 600
            )
            writer.append("routing", rows)
    with pytest.raises(RunFormatError, match=r"column layer holds over 1024 different layers"):
        list(open_run(tmp_path / "run").iter_loads())


def test_more_devices_layers_or_groups_than_a_rank_has_are_refused(tmp_path: Path) -> None:
    with RunWriter.create(tmp_path / "run", manifest_of()) as writer:
        names = [f"GPU-{number}" for number in range(129)]
        writer.append("power", pa.table({"time_ns": [0] * 129, "device_uuid": names, "power_mw": [1] * 129}))
        count = 1025
        same = {"step": [0] * count, "phase": ["decode"] * count, "source_rank": [0] * count}
        layers = {**same, "layer": range(count), "position": [0] * count, "expert_ids": [[1]] * count}
        writer.append("tokens", pa.table(layers))
        groups = [f"g{number}" for number in range(count)]
        times = {"start_ns": range(count), "end_ns": range(1, count + 1)}
        exchanges = {**same, **times, "sequence": range(count), "role": ["dispatch"] * count, "group": groups}
        writer.append("exchange", pa.table(exchanges))
    run = open_run(tmp_path / "run")
    for read, table, holds in (
        (run.power, "power", "device_uuid holds 129"),
        (run.token_samples, "tokens", "layer holds 1025"),
        (run.exchanges, "exchange", "group holds 1025"),
    ):
        with pytest.raises(RunFormatError, match=rf"{table}/rank-00000: column {holds} different values"):
            read()

"""What is written is read back: windows, gate mass, several ranks, several E, other tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from observatory.errors import RunError
from observatory.run import RunWriter, open_run, routing_rows
from observatory.run.manifest import SCHEMA_VERSION
from tests.run.conftest import WriteRun, expected_load, manifest_of, one_step


def test_loads_of_all_ranks_meet_in_one_block(write_run: WriteRun) -> None:
    run = open_run(write_run(steps=5, ranks=3))
    assert run.problems == ()
    blocks = {block.layer: block for block in run.iter_loads()}
    assert sorted(blocks) == [0, 1]
    for layer, block in blocks.items():
        assert block.phase == "prefill"
        assert block.step_S.tolist() == [0, 1, 2, 3, 4]
        assert block.source_rank_P.tolist() == [0, 1, 2]
        assert block.present_SP.all()
        for step in range(5):
            for rank in range(3):
                expected = expected_load(step, rank)[layer]
                assert block.load_SPE[step, rank].tolist() == expected.tolist()
                assert block.assignments_SP[step, rank] == expected.sum()
        assert block.tokens_S.tolist() == [3, 6, 9, 12, 15]
        assert np.array_equal(
            block.load_SE, block.load_SPE[:, 0] + block.load_SPE[:, 1] + block.load_SPE[:, 2]
        )
        assert block.gate_mass_SPE is None
        assert block.step_max_over_mean_S is None


def test_windows_keep_their_extremes_and_gate_mass(tmp_path: Path) -> None:
    with RunWriter.create(tmp_path / "run", manifest_of(window_steps=4)) as writer:
        writer.append(
            "routing",
            routing_rows(
                step_N=[0, 4],
                phase_N="decode",
                layer_N=7,
                source_rank=0,
                tokens_N=[4, 2],
                load_NE=[[5, 3], [4, 0]],
                window_steps=[4, 2],
                gate_mass_NE=[[2.5, 1.25], [2.0, 0.0]],
                step_load_min_NE=[[1, 0], [2, 0]],
                step_load_max_NE=[[2, 1], [2, 0]],
                step_max_over_mean_N=[1.5, 2.0],
            ),
        )
    run = open_run(tmp_path / "run")
    (block,) = run.iter_loads()
    assert block.window_steps_S.tolist() == [4, 2]
    assert block.gate_mass_SPE is not None
    assert block.gate_mass_SPE[:, 0].tolist() == [[2.5, 1.25], [2.0, 0.0]]
    assert block.step_max_over_mean_S is not None
    assert block.step_max_over_mean_S.tolist() == [1.5, 2.0]
    (rows,) = run.iter_rows("routing")
    assert rows.column("step_load_min").to_pylist() == [[1, 0], [2, 0]]
    assert rows.column("step_load_max").to_pylist() == [[2, 1], [2, 0]]
    frame = run.expert_load()
    assert frame["window_steps"].tolist() == [4, 4, 2, 2]


def test_layers_of_different_experts_and_phases_share_a_run(tmp_path: Path) -> None:
    with RunWriter.create(tmp_path / "run", manifest_of()) as writer:
        for layer, experts, phase in ((0, 4, "prefill"), (1, 8, "decode"), (2, 4, "decode")):
            load = np.full((1, experts), layer + 1)
            writer.append(
                "routing",
                routing_rows(step_N=0, phase_N=phase, layer_N=layer, source_rank=0, tokens_N=1, load_NE=load),
            )
    run = open_run(tmp_path / "run")
    found = {(block.phase, block.layer): block.load_SPE.tolist() for block in run.iter_loads()}
    assert found == {("prefill", 0): [[[1] * 4]], ("decode", 1): [[[2] * 8]], ("decode", 2): [[[3] * 4]]}
    assert [block.layer for block in run.iter_loads(phase="decode", layers=[2])] == [2]
    assert list(run.iter_loads(phase="train_forward")) == []
    with pytest.raises(RunError, match="phase 'warmup' is unknown; expected one of prefill"):
        list(run.iter_loads(phase="warmup"))


def test_the_tidy_frame_has_one_row_per_expert(write_run: WriteRun) -> None:
    frame = open_run(write_run(steps=2, ranks=2)).expert_load()
    assert list(frame.columns) == ["step", "phase", "layer", "source_rank", "expert", "load"]
    assert len(frame) == 2 * 2 * 2 * 4
    one = frame[(frame.step == 1) & (frame.layer == 1) & (frame.source_rank == 1)].sort_values("expert")
    assert one["load"].tolist() == expected_load(1, 1)[1].tolist()
    assert set(frame["phase"]) == {"prefill"}


def test_a_rank_without_a_step_is_absent_not_zero(tmp_path: Path) -> None:
    first = RunWriter.create(tmp_path / "run", manifest_of(2))
    second = RunWriter.join(tmp_path / "run", rank=1)
    for step in range(4):
        first.append("routing", one_step(step, 0))
        if step != 2:
            second.append("routing", one_step(step, 1))
    second.close()
    first.close()
    block = next(open_run(tmp_path / "run").iter_loads(layers=[0]))
    assert block.present_SP.tolist() == [[True, True], [True, True], [True, False], [True, True]]
    assert block.load_SPE[2, 1].tolist() == [0, 0, 0, 0]


def test_blocks_are_cut_to_the_bound_and_stay_in_step_order(write_run: WriteRun) -> None:
    run = open_run(write_run(steps=7, ranks=2))
    bytes_per_step = 2 * 4 * 8
    blocks = [block for block in run.iter_loads(max_block_bytes=3 * bytes_per_step) if block.layer == 1]
    assert [block.step_S.tolist() for block in blocks] == [[0, 1, 2], [3, 4, 5], [6]]


def test_a_window_cut_short_on_one_rank_stands_apart(tmp_path: Path) -> None:
    writers = [RunWriter.create(tmp_path / "run", manifest_of(2)), RunWriter.join(tmp_path / "run", rank=1)]
    for writer, window in zip(writers, (10, 7), strict=True):
        rows = routing_rows(
            step_N=40, phase_N="decode", layer_N=0, source_rank=writer.rank, tokens_N=1, load_NE=[[1, 2]],
            window_steps=window,
        )  # fmt: skip
        writer.append("routing", rows)
    for writer in reversed(writers):
        writer.close()
    (block,) = open_run(tmp_path / "run").iter_loads()
    assert block.step_S.tolist() == [40, 40]
    assert block.window_steps_S.tolist() == [7, 10]
    assert block.present_SP.tolist() == [[False, True], [True, False]]


def test_other_tables_come_back_as_frames_with_their_rank(tmp_path: Path) -> None:
    with RunWriter.create(tmp_path / "run", manifest_of()) as writer:
        writer.append("power", pa.table({"time_ns": [5], "device_uuid": ["GPU-1"], "power_mw": [137000]}))
        writer.append(
            "exchange",
            pa.table(
                {
                    "step": [0], "phase": ["decode"], "layer": [3], "source_rank": [0], "role": ["dispatch"],
                    "group": ["ep"], "sequence": [9], "start_ns": [100], "end_ns": [250],
                    "send_bytes": [[10, 20]], "receive_bytes": [[10, 5]],
                }
            ),
        )  # fmt: skip
        writer.append(
            "tokens",
            pa.table(
                {
                    "step": [0, 0], "phase": ["decode"] * 2, "layer": [3, 3], "source_rank": [0, 0],
                    "position": [0, 1], "expert_ids": [[1, 2], [3]],
                }
            ),
        )  # fmt: skip
    run = open_run(tmp_path / "run")
    power = run.power()
    assert power["power_mw"].tolist() == [137000]
    assert power["source_rank"].tolist() == [0]
    exchange = run.exchanges().iloc[0]
    assert exchange["send_bytes"].tolist() == [10, 20]
    assert exchange["end_ns"] - exchange["start_ns"] == 150
    assert [ids.tolist() for ids in run.token_samples()["expert_ids"]] == [[1, 2], [3]]
    assert run.spans().empty
    assert "start_ns" in run.spans().columns


def test_columns_of_a_newer_minor_schema_are_carried_along(write_run: WriteRun) -> None:
    path = write_run(steps=2, steps_per_part=2)
    part = path / "routing/rank-00000/part-000000.parquet"
    rows = pq.read_table(part)
    pq.write_table(rows.append_column("spilled", pa.array([1.5] * rows.num_rows)), part)
    manifest = (path / "run.json").read_text().replace(f'"{SCHEMA_VERSION}"', '"1.8"')
    (path / "run.json").write_text(manifest.replace('"argv"', '"moon_phase": "full", "argv"'))
    run = open_run(path)
    assert run.problems == ()
    assert run.manifest.model_extra == {"moon_phase": "full"}
    assert [rows.column("spilled").to_pylist() for rows in run.iter_rows("routing")] == [[1.5] * 4]
    assert sum(block.load_SPE.sum() for block in run.iter_loads()) == sum(
        expected_load(s, 0).sum() for s in (0, 1)
    )


def test_columns_full_of_nulls_cost_nothing_on_disk(write_run: WriteRun) -> None:
    path = write_run(steps=1, steps_per_part=1)
    schema = pq.read_schema(path / "routing/rank-00000/part-000000.parquet")
    assert "step_load_min" not in schema.names
    assert schema.field("load").type.list_size == 4

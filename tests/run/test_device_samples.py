"""Samples of one device at a time are those of the whole table, however they were written and gathered."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from observatory.errors import RunError, RunFormatError
from observatory.run import RunWriter, TableAppender, device_samples, open_run
from observatory.run.manifest import Manifest
from tests.reports.sample_runs import manifest

COLUMNS = ["time_ns", "power_mw", "energy_mj", "temperature_c"]


def write_samples(path: Path, *, devices: int = 3, flushes: int = 5, instants: int = 40) -> Path:
    """Two ranks that sample devices of the same names; readings are missing, of the third device all."""
    about: Manifest = manifest(ranks=2)
    writers = [RunWriter.create(path, about), RunWriter.join(path, rank=1)]
    generator = np.random.default_rng(3)
    for rank in range(2):
        appender = TableAppender(path, rank=rank, ranks=2)
        for flush in range(flushes):
            time_ns = np.repeat(np.arange(instants) + flush * instants, devices) * 1000
            number = np.tile(np.arange(devices), instants)
            power = pd.array(generator.integers(0, 700_000, len(time_ns)), "Int64")
            power[(number == 2) | (generator.random(len(time_ns)) < 0.1)] = pd.NA
            rows = pd.DataFrame(
                {
                    "time_ns": generator.permutation(time_ns) if flush == 2 else time_ns,
                    "device_uuid": [f"GPU-{one}" for one in number],
                    "power_mw": power,
                    "energy_mj": np.arange(len(time_ns)),
                }
            )
            appender.append("power", pa.Table.from_pandas(rows, preserve_index=False))
            appender.flush()
        appender.close()
    for writer in reversed(writers):
        writer.close()
    return path


@pytest.mark.parametrize("pass_bytes", [1, 16_000, 1 << 30])
def test_samples_by_device_are_those_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pass_bytes: int
) -> None:
    monkeypatch.setattr(device_samples, "_PASS_BYTES", pass_bytes)
    monkeypatch.setattr(device_samples, "_MOST_BATCHES", 2)
    run = open_run(write_samples(tmp_path / "run"))
    table = run.power()
    sampled = device_samples.sampled_devices(run)
    assert [(one.rank, one.uuid) for one in sampled] == [(r, f"GPU-{d}") for r in range(2) for d in range(3)]
    found = list(device_samples.device_samples(run, sampled, COLUMNS))
    assert [one for one, _ in found] == sampled
    for device, samples in found:
        own = table[(table["source_rank"] == device.rank) & (table["device_uuid"] == device.uuid)]
        expected = own[samples.columns].sort_values("time_ns", kind="stable").reset_index(drop=True)
        pd.testing.assert_frame_equal(samples, expected, check_dtype=False)
        assert (device.rows, device.first_ns, device.last_ns) == (
            len(own), own["time_ns"].min(), own["time_ns"].max()
        )  # fmt: skip
        assert set(samples.columns) == set(COLUMNS)


def test_small_row_groups_are_read_together_and_a_damaged_one_alone_is_left_out(tmp_path: Path) -> None:
    path = write_samples(tmp_path / "run", flushes=8)
    run = open_run(path)
    whole = list(run.iter_rows("power", columns=["time_ns"], batch_bytes=1 << 20))
    assert [len(rows) for rows in whole] == [8 * 40 * 3] * 2, "the row groups of a part at once"
    file = path / "power" / "rank-00000" / "part-000000.parquet"
    content = bytearray(file.read_bytes())
    column = pq.read_metadata(file).row_group(3).column(0)
    content[column.dictionary_page_offset + column.total_compressed_size - 1] ^= 0xFF
    file.write_bytes(content)
    damaged = open_run(path)
    left = damaged.power()
    assert len(left) == 2 * 8 * 40 * 3 - 40 * 3
    assert any("row group 3" in problem and "left out" in problem for problem in damaged.problems)
    assert sum(one.rows for one in device_samples.sampled_devices(open_run(path))) == len(left)


def test_more_devices_than_a_node_can_have_are_refused(tmp_path: Path) -> None:
    run = open_run(write_samples(tmp_path / "run", devices=129, flushes=1, instants=2))
    with pytest.raises(RunFormatError, match="device_uuid holds over 128"):
        device_samples.sampled_devices(run)


def test_a_device_with_more_samples_than_are_held_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_samples, "_MOST_BYTES", 100)
    run = open_run(write_samples(tmp_path / "run"))
    with pytest.raises(RunError, match="of samples"):
        next(device_samples.device_samples(run, device_samples.sampled_devices(run), COLUMNS))

"""Recordings played as devices: their pace, their holes, their end; and files that are no recordings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from observatory.devices import replay
from observatory.devices.replay import ReplayDevice
from observatory.errors import DeviceError, DeviceLostError
from observatory.run import RunWriter
from observatory.run.manifest import DeviceSpec, Manifest, ModelSpec, RankPower
from tests.devices.recordings import UUID, recorded_rows, write_recording

PERIOD_NS = 50_000_000


class Clock:
    def __init__(self, now_ns: int = 999_000_000_000) -> None:
        self.now_ns = now_ns

    def __call__(self) -> int:
        return self.now_ns


def write(path: Path, rows: pa.Table) -> Path:
    pq.write_table(rows, path)
    return path


def test_at_the_recorded_pace_every_row_comes_once_with_its_own_time(tmp_path: Path) -> None:
    recording = write_recording(tmp_path / "a.parquet", samples=4)
    with ReplayDevice(recording, pace="recorded") as device:
        assert device.samples == 4
        samples = [device.read() for _ in range(4)]
        with pytest.raises(DeviceLostError, match="has ended after 4 samples"):
            device.read()
    assert [sample.time_ns for sample in samples] == [7_000_000_000 + n * PERIOD_NS for n in range(4)]
    assert [sample.power_mw for sample in samples] == [300_000, 301_000, 302_000, 303_000]
    assert samples[0].read_ns == 1_200_000
    assert set(device.unavailable) == {"memory_temperature_c", "power_cap_ns", "thermal_ns"}


def test_played_now_it_starts_at_the_first_reading_and_holds_each_row(tmp_path: Path) -> None:
    clock = Clock()
    with ReplayDevice(write_recording(tmp_path / "a.parquet", samples=4), clock_ns=clock) as device:
        clock.now_ns += 77_000_000_000  # waiting before the first reading costs nothing
        outcome = []
        for ahead_ns in (0, 49_999_999, 50_000_000, 149_999_999, 150_000_000, 200_000_000):
            clock.now_ns = 1_076_000_000_000 + ahead_ns
            sample = device.read()
            assert sample.time_ns == clock.now_ns
            outcome.append(sample.power_mw)
        assert outcome == [300_000, 300_000, 301_000, 302_000, 303_000, 303_000]
        clock.now_ns += 1
        for _ in range(2):
            with pytest.raises(DeviceLostError):
                device.read()


def test_a_hole_in_the_recording_is_no_reading(tmp_path: Path) -> None:
    rows = recorded_rows(samples=5)
    time_ns = rows.column("time_ns").to_numpy() + np.array([0, 0, 0, 10**9, 10**9])
    recording = write(tmp_path / "a.parquet", rows.set_column(0, "time_ns", pa.array(time_ns)))
    clock = Clock()
    with ReplayDevice(recording, clock_ns=clock) as device:
        device.read()
        outcome = []
        for ahead_ms in (100, 250, 251, 900, 1149, 1150):
            clock.now_ns = 999_000_000_000 + ahead_ms * 1_000_000
            outcome.append(device.read().power_mw)
    assert outcome == [302_000, 302_000, None, None, None, 303_000]


def test_rows_out_of_order_are_played_in_order(tmp_path: Path) -> None:
    rows = recorded_rows(samples=6)
    recording = write(tmp_path / "a.parquet", rows.take([5, 0, 3, 1, 4, 2]))
    with ReplayDevice(recording, pace="recorded") as device:
        assert [device.read().power_mw for _ in range(6)] == list(range(300_000, 306_000, 1000))


def test_single_nulls_stay_missing(tmp_path: Path) -> None:
    rows = recorded_rows(samples=3)
    power = pa.array([300_000, None, 302_000], pa.int64())
    recording = write(
        tmp_path / "a.parquet", rows.set_column(rows.column_names.index("power_mw"), "power_mw", power)
    )
    with ReplayDevice(recording, pace="recorded") as device:
        assert [device.read().power_mw for _ in range(3)] == [300_000, None, 302_000]
        assert "power_mw" not in device.unavailable


def write_run(path: Path, rows: pa.Table) -> Path:
    manifest = Manifest(
        run_id="recorded", created_unix_s=1.0, model=ModelSpec(name="m"),
        devices=(DeviceSpec(kind="nvidia", name="NVIDIA H100", uuid=UUID, driver="999"),),
    )  # fmt: skip
    with RunWriter.create(path, manifest) as writer:
        writer.append("power", rows)
        writer.set_power(RankPower(unavailable={UUID: {"thermal_ns": "field 269 returned 3", "x": "1"}}))
    return path


def test_a_run_is_played_with_the_name_and_the_reasons_that_it_keeps(tmp_path: Path) -> None:
    with ReplayDevice(write_run(tmp_path / "run", recorded_rows())) as device:
        assert device.spec.kind == "replay"
        assert device.spec.name == "NVIDIA H100"
        assert device.spec.recorded_kind == "nvidia"
        assert device.unavailable["thermal_ns"] == "field 269 returned 3 (as recorded)"
        assert device.unavailable["power_cap_ns"] == "the recording holds no power_cap_ns"


def test_several_devices_need_a_name(tmp_path: Path) -> None:
    both = pa.concat_tables([recorded_rows(), recorded_rows(uuid="GPU-2", samples=3)])
    recording = write(tmp_path / "a.parquet", both)
    with pytest.raises(DeviceError, match="holds 2 devices; name one of them"):
        ReplayDevice(recording)
    with ReplayDevice(recording, "GPU-2") as device:
        assert device.samples == 3


def test_files_that_are_no_recordings_are_one_sentence_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = recorded_rows()
    (tmp_path / "text.parquet").write_text("time_ns,power_mw\n")
    whole = write_recording(tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "folder").mkdir()
    write(tmp_path / "empty.parquet", rows.slice(0, 0))
    write(tmp_path / "no_time.parquet", rows.drop_columns("time_ns"))
    write(tmp_path / "watts.parquet", rows.set_column(2, "power_mw", pa.array([300.5] * 10)))
    write(tmp_path / "negative.parquet", rows.set_column(2, "power_mw", pa.array([-1] * 10, pa.int64())))
    write(tmp_path / "future.parquet", rows.set_column(0, "time_ns", pa.array([1 << 62] * 10, pa.int64())))
    write(tmp_path / "bomb.parquet", rows.set_column(1, "device_uuid", pa.array(["GPU-\x1b[2J"] * 10)))
    write(tmp_path / "long.parquet", rows.set_column(1, "device_uuid", pa.array(["G" * 5000] * 10)))
    expected = {
        "text.parquet": "cannot be read", "cut.parquet": "cannot be read", "folder": "run.json",
        "missing": "neither a run directory nor a file", "empty.parquet": "holds no power samples",
        "no_time.parquet": "time_ns", "watts.parquet": "power_mw is double",
        "bomb.parquet": "names that are none",
        "negative.parquet": "column power_mw holds -1", "future.parquet": "column time_ns holds",
        "long.parquet": "names that are none",
    }  # fmt: skip
    for name, why in expected.items():
        with pytest.raises(DeviceError, match=why) as caught:
            ReplayDevice(tmp_path / name)
        assert str(caught.value).isprintable(), name
    monkeypatch.setattr(replay, "_MAX_ROWS", 9)
    with pytest.raises(DeviceError, match="too large"):
        ReplayDevice(tmp_path / "whole.parquet")
    run = write_run(tmp_path / "run", rows)
    with pytest.raises(DeviceError, match="too large"):
        ReplayDevice(run)


def test_a_device_that_another_node_sampled_keeps_its_name(tmp_path: Path) -> None:
    manifest = Manifest(run_id="recorded", created_unix_s=1.0, model=ModelSpec(name="m"))
    with RunWriter.create(tmp_path / "run", manifest) as writer:
        writer.append("power", recorded_rows())
        writer.set_power(RankPower(sampled=(DeviceSpec(kind="nvidia", name="NVIDIA H100", uuid=UUID),)))
    with ReplayDevice(tmp_path / "run") as device:
        assert (device.spec.name, device.spec.recorded_kind) == ("NVIDIA H100", "nvidia")

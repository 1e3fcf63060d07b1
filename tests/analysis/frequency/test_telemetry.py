"""What power samples alone say about caps, clocks and waiting."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from observatory.analysis.frequency.telemetry import DeviceTelemetry, telemetry_advice
from observatory.errors import ClockError
from observatory.run import RunWriter, open_run
from observatory.run.manifest import DeviceCalibration, DeviceSpec, Manifest, ModelSpec, RankPower
from observatory.run.tables import POWER_SCHEMA, SPAN_SCHEMA
from tests.analysis.energy.runs import write_energy_run

UUID = "GPU-5ea1ed00-0000-4000-8000-000000000000"
PERIOD_NS = 50_000_000


def write_run(
    path: Path, power: dict[str, object] | None, *, samples: int = 200, phases: bool = False
) -> Path:
    """A run of one device; ``power`` gives columns, numbers for all rows or arrays."""
    manifest = Manifest(
        run_id="telemetry",
        created_unix_s=1.0,
        model=ModelSpec(name="none"),
        devices=(DeviceSpec(kind="gpu", name="Fake", uuid=UUID, max_sm_clock_mhz=1980),),
    )
    idle = DeviceCalibration(duration_s=1.2, idle_power_mw=75_000)
    with RunWriter.create(path, manifest) as writer:
        writer.set_power(RankPower(period_s=0.05, calibration={UUID: idle}))
        if power is not None:
            rows = {
                "time_ns": np.arange(samples) * PERIOD_NS,
                "device_uuid": [UUID] * samples,
                **{
                    name: np.full(samples, value) if np.isscalar(value) else value
                    for name, value in power.items()
                },
            }
            fields = [field for field in POWER_SCHEMA if field.name in rows]
            arrays = [pa.array(rows[field.name]).cast(field.type) for field in fields]
            writer.append("power", pa.RecordBatch.from_arrays(arrays, schema=pa.schema(fields)))
        if phases:
            half = samples // 2 * PERIOD_NS
            spans = {
                "step": [0, 0],
                "phase": ["prefill", "decode"],
                "layer": [None, None],
                "source_rank": [0, 0],
                "name": ["phase", "phase"],
                "start_ns": [0, half],
                "end_ns": [half, 2 * half],
            }
            arrays = [pa.array(spans[field.name], field.type) for field in SPAN_SCHEMA]
            writer.append("spans", pa.RecordBatch.from_arrays(arrays, schema=SPAN_SCHEMA))
    return path


def first(path: Path) -> DeviceTelemetry:
    return telemetry_advice(open_run(path)).devices[0]


def test_a_cap_that_does_not_bind_is_told_from_power_and_reasons(tmp_path: Path) -> None:
    found = first(
        write_run(
            tmp_path / "run",
            {
                "power_mw": 210_000,
                "sm_clock_mhz": 1830,
                "enforced_limit_mw": 700_000,
                "event_reasons": 0,
                "power_cap_ns": 0,
            },
        )
    )
    assert found.cap == "does not bind"
    assert found.power_over_limit == pytest.approx(0.3)
    assert found.power_cap_share == 0.0
    assert found.duration_s == pytest.approx(199 * 0.05)
    text = " ".join(found.findings)
    assert "the power limit of 700 W does not bind" in text
    assert "30 % of it" in text
    assert "stood at 1830 MHz, below the highest of 1980" in text


def test_a_limit_that_was_changed_is_named_so_and_power_is_held_against_the_one_in_force(
    tmp_path: Path,
) -> None:
    half = np.arange(200) < 100
    columns: dict[str, object] = {
        "power_mw": np.where(half, 210_000, 350_000),
        "enforced_limit_mw": np.where(half, 220_000, 700_000),
        "event_reasons": np.where(half, 0x4, 0),
        "sm_clock_mhz": 1500,
    }
    found = first(write_run(tmp_path / "run", columns))
    assert (found.limit_mw, found.highest_limit_mw) == (220_000, 700_000)
    assert found.power_over_limit == pytest.approx(210 / 220)
    text = " ".join(found.findings)
    assert "the power limit, which was changed between 220 and 700 W, binds" in text
    assert "stay below 350 W, 95 % of the limit in force" in text


def test_a_cap_that_binds_is_told_from_the_counter_rather_than_the_samples(tmp_path: Path) -> None:
    columns: dict[str, object] = {
        "power_mw": 400_000,
        "sm_clock_mhz": 1500 + 15 * (np.arange(200) % 9),
        "enforced_limit_mw": 400_000,
        "event_reasons": 0,  # the samples missed what the counter counted
        "power_cap_ns": np.arange(200) * (PERIOD_NS // 4),
    }
    found = first(write_run(tmp_path / "run", columns))
    assert found.cap == "binds"
    assert found.power_cap_share == pytest.approx(0.25)
    text = " ".join(found.findings)
    assert "holds the clock down for 25 % of the time" in text
    assert "moved between 1500 and 1620 MHz" in text
    del columns["power_cap_ns"]
    columns["event_reasons"] = np.where(np.arange(200) % 2, 0x4, 0)
    assert first(write_run(tmp_path / "bits", columns)).power_cap_share == pytest.approx(0.5)


def test_waiting_for_the_host_shows_in_the_idle_bit_or_in_the_power(tmp_path: Path) -> None:
    usual: dict[str, object] = {"power_mw": 200_000, "enforced_limit_mw": 700_000, "sm_clock_mhz": 1830}
    idle = first(write_run(tmp_path / "a", {**usual, "event_reasons": np.where(np.arange(200) % 4, 0, 0x1)}))
    assert idle.idle_share == pytest.approx(0.25)
    assert any("idled in 25 % of the samples" in item for item in idle.findings)
    little = first(write_run(tmp_path / "b", {**usual, "power_mw": 120_000, "event_reasons": 0}))
    assert any("little more than the 75 W of an idle device" in item for item in little.findings)
    busy = first(write_run(tmp_path / "c", {**usual, "event_reasons": 0}))
    assert not any("idle" in item for item in busy.findings)


def test_heat_and_brake_are_to_be_mended_first(tmp_path: Path) -> None:
    found = first(
        write_run(
            tmp_path / "run",
            {
                "power_mw": 300_000,
                "enforced_limit_mw": 700_000,
                "thermal_ns": np.arange(200) * (PERIOD_NS // 10),
                "event_reasons": 0x80,
            },
        )
    )
    assert found.thermal_share == pytest.approx(0.1)
    assert {"slowed by heat", "slowed by the brake"} <= set(found.finding_codes)


def test_phases_are_distinguished_where_the_run_has_their_spans(tmp_path: Path) -> None:
    path = write_run(
        tmp_path / "run",
        {
            "power_mw": np.repeat([600_000, 200_000], 100),
            "sm_clock_mhz": 1830,
            "enforced_limit_mw": 600_000,
            "event_reasons": np.repeat([0x4, 0], 100),
        },
        phases=True,
    )
    devices = telemetry_advice(open_run(path)).devices
    assert [(item.phase, item.cap) for item in devices] == [
        (None, "binds"),
        ("decode", "does not bind"),
        ("prefill", "binds"),
    ]
    assert devices[1].power_median_mw == 200_000
    assert devices[2].samples == 100


def test_power_of_a_phase_is_not_that_of_the_one_before_which_the_sensor_still_tells(
    tmp_path: Path,
) -> None:
    # Spans change at sample 30; the sensor, renewed every 100 ms, tells the old power in two samples more.
    power = np.repeat([600_000, 200_000], [32, 28])
    path = write_run(
        tmp_path / "run", {"power_mw": power, "enforced_limit_mw": 700_000}, samples=60, phases=True
    )
    decode = telemetry_advice(open_run(path)).devices[1]
    assert (decode.phase, decode.samples) == ("decode", 30)
    assert decode.power_p95_mw == 200_000
    assert decode.power_median_mw == 200_000


def test_what_was_not_sampled_is_said_and_not_guessed(tmp_path: Path) -> None:
    found = first(write_run(tmp_path / "run", {}))
    assert found.cap is None
    assert (found.power_median_mw, found.sm_clock_mhz, found.limit_mw) == (None, None, None)
    text = " ".join(found.findings)
    assert found.missing == ("event reasons", "power", "power limit", "SM clock")
    assert "no sample has a valid reading of event reasons, instant power or the power limit" in text
    assert "the SM clock was not sampled" in text


def test_counters_that_run_backwards_and_impossible_readings_are_passed_over(tmp_path: Path) -> None:
    counter = np.arange(200) * 1000
    counter[100:] = 0
    found = first(
        write_run(
            tmp_path / "run",
            {
                "power_mw": np.where(np.arange(200) % 2, None, 200_000),
                "sm_clock_mhz": 1830,
                "enforced_limit_mw": 0,
                "power_cap_ns": counter,
                "event_reasons": 0x4,
            },
        )
    )
    assert found.power_cap_share == 1.0  # the bits, since the counter cannot be believed
    assert found.power_median_mw == 200_000
    assert found.limit_mw is None
    assert found.power_over_limit is None


def test_a_run_without_samples_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ClockError, match="holds no power samples; capture some"):
        telemetry_advice(open_run(write_run(tmp_path / "run", None)))


def test_the_advice_names_what_only_a_sweep_can_tell(tmp_path: Path) -> None:
    advice = telemetry_advice(open_run(write_run(tmp_path / "run", {"power_mw": 200_000})))
    assert "which clock saves energy cannot be determined" in advice.cannot
    assert any("clocks sweep" in step for step in advice.next_steps)


def test_one_name_on_two_nodes_is_two_devices(tmp_path: Path) -> None:
    """Every node has a package-0, and each node's clock counts from its own boot."""
    frames = []
    for rank, (watts, start_ns) in enumerate(((100, 10**12), (300, 10**12 + 25_000_000))):
        frames.append(
            pd.DataFrame(
                {
                    "time_ns": start_ns + np.arange(40) * 50_000_000, "device_uuid": "shared name",
                    "power_mw": watts * 1000, "source_rank": rank,
                }
            )
        )  # fmt: skip
    spans = pd.DataFrame(
        {
            "step": [0], "phase": ["decode"], "layer": [None], "source_rank": np.int32(0), "name": ["phase"],
            "start_ns": [10**12], "end_ns": [10**12 + 2 * 10**9],
        }
    ).astype({"layer": "Int32"})  # fmt: skip
    run = write_energy_run(
        tmp_path / "run",
        power=pd.concat(frames),
        spans=[spans, spans],
        topology={"ranks": 2, "node_of_rank": (0, 1)},
    )
    whole = [item for item in telemetry_advice(open_run(run)).devices if item.phase is None]
    assert [(item.samples, item.power_median_mw) for item in whole] == [(40, 100e3), (40, 300e3)]

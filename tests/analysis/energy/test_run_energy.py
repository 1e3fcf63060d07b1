"""A whole run: written, read back, attributed; and the command that prints it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from observatory.analysis.energy import energy_summary
from observatory.cli import main
from observatory.errors import EnergyError
from observatory.run import open_run
from observatory.run.manifest import DataSpec, DeviceCalibration, DeviceSpec
from tests.analysis.energy.runs import codes, write_energy_run
from tests.analysis.energy.served import DEVICE, numbered, served
from tests.analysis.energy.test_prefix_cache import measured
from tests.conftest import MakeRun
from tests.devices.sensor import SimulatedSensor, steps

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def served_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    load = served()
    return write_energy_run(
        tmp_path_factory.mktemp("energy") / "run",
        power=SimulatedSensor().sample(load, poll_ms=53.0),
        spans=[numbered(load)],
        tokens={"prefill": 2048, "decode": 16},
        devices=(DEVICE,),
    )


def test_energy_per_phase_and_token_of_a_run_is_the_loads(served_run: Path) -> None:
    load, summary = served(), energy_summary(open_run(served_run))
    (device,) = summary.devices.to_dict("records")
    assert device["energy_mj"] == pytest.approx(load.energy_mj(load.start_ns, load.end_ns), rel=0.01)
    assert device["source_rank"] == 0
    assert device["flag"] is None
    assert device["attributed_share"] == pytest.approx(1.0, abs=0.01)
    phases = summary.phases.set_index("phase")
    for name, (watts, seconds) in load.truth().items():
        row = phases.loc[name or "idle"]
        assert row["seconds"] == pytest.approx(seconds, abs=0.02)
        assert row["energy_mj"] == pytest.approx(watts * seconds * 1e3, rel=0.01)
        assert row["energy_low_mj"] <= row["energy_mj"] <= row["energy_high_mj"]
        assert row["idle_mj"] + row["above_idle_mj"] == pytest.approx(row["energy_mj"])
    assert phases.loc["prefill", "method"] == "least squares"
    assert phases.loc["decode", "method"] == "repetition"
    assert phases.loc["decode", "idle_mj"] == pytest.approx(80e3 * phases.loc["decode", "seconds"], rel=0.02)
    tokens = summary.tokens.set_index("phase")
    for name, per_step, length_ms, watts in (("prefill", 2048, 150.0, 650.0), ("decode", 16, 10.0, 310.0)):
        assert tokens.loc[name, "mj_per_token"] == pytest.approx(watts * length_ms / per_step, rel=0.02)
        assert tokens.loc[name, "idle_mj_per_token"] == pytest.approx(80 * length_ms / per_step, rel=0.03)
        assert tokens.loc[name, "reason"] is None
    assert tokens.loc["prefill", "kind"] == "input"
    assert tokens.loc["decode", "kind"] == "output"


def test_the_command_prints_the_summary_and_one_json_document(
    served_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["energy", str(served_run)]) == 0
    shown = capsys.readouterr().out
    assert "least squares" in shown
    assert "mJ/token" in shown
    assert main(["energy", str(served_run), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    summary = energy_summary(open_run(served_run))
    assert document["problems"] == []
    for name in ("devices", "phases", "tokens", "totals", "aliasing"):
        assert len(document[name]) == len(getattr(summary, name))
    assert document["phases"][0]["power_mw"] == pytest.approx(summary.phases["power_mw"][0])


def test_a_run_without_power_is_one_clear_line(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run()
    with pytest.raises(EnergyError, match="no power samples"):
        energy_summary(open_run(run))
    assert main(["energy", str(run)]) == 1
    captured = capsys.readouterr()
    assert "observatory doctor" in captured.err
    assert captured.out == ""


def test_a_run_without_power_says_why_as_it_was_captured(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run()
    status = next((run / "ranks").glob("rank-*.json"))
    document = json.loads(status.read_text())
    document["power"] = {"notes": ["power was not sampled: NVML said no permission"]}
    status.write_text(json.dumps(document))
    assert main(["energy", str(run)]) == 1
    assert "no power samples: power was not sampled: NVML said no permission;" in capsys.readouterr().err


def test_energy_of_a_played_recording_is_not_passed_off_as_the_runs(tmp_path: Path) -> None:
    load = served()
    power = SimulatedSensor().sample(load, poll_ms=53.0)
    played = DeviceSpec(**{**DEVICE.model_dump(), "kind": "replay"})
    for device, outcome in ((DEVICE, False), (played, True)):
        run = write_energy_run(tmp_path / device.kind, power=power, spans=[numbered(load)], devices=(device,))
        problems = energy_summary(open_run(run)).problems
        assert ("replayed" in codes(*problems)) is outcome


def test_a_leap_of_the_counter_is_in_no_phase(tmp_path: Path) -> None:
    load = served()
    rows = SimulatedSensor().sample(load, poll_ms=53.0)
    leapt = rows.assign(energy_mj=rows["energy_mj"] + 20_000_000 * (rows.index >= 200))
    power = []
    for name, table in (("whole", rows), ("leapt", leapt)):
        run = write_energy_run(tmp_path / name, power=table, spans=[numbered(load)], devices=(DEVICE,))
        phases = energy_summary(open_run(run)).phases
        power.append(phases[phases["span"].isna()].set_index("phase")["power_mw"].dropna())
    common = power[0].index.intersection(power[1].index)
    assert len(common)
    assert power[1][common].to_numpy() == pytest.approx(power[0][common].to_numpy(), rel=0.03)


def test_telemetry_without_phases_gives_the_devices_energy_and_says_why_no_more(tmp_path: Path) -> None:
    load = steps([("prefill", 100.0, 500.0)], seconds=4)
    run = write_energy_run(
        tmp_path / "run",
        power=SimulatedSensor().sample(load),
        spans=[numbered(load).assign(name="experts")],
        devices=(DEVICE,),
    )
    summary = energy_summary(open_run(run))
    assert summary.phases.empty
    assert summary.tokens.empty
    (device,) = summary.devices.to_dict("records")
    # 1.5 s of idle on both sides, which the samples cover but for a poll
    assert device["energy_mj"] == pytest.approx(4 * 500e3 + 3 * 80e3, rel=0.03)
    assert device["reason_code"] == "no phases of rank"
    assert "no phase spans" in codes(*summary.problems)


def test_locked_steps_without_a_counter_have_no_energy_and_say_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load = steps([("decode", 100.0, 400.0)], seconds=6)
    run = write_energy_run(
        tmp_path / "run",
        power=SimulatedSensor(counter_ms=None).sample(load),
        spans=[numbered(load)],
        devices=(DEVICE,),
        data=DataSpec(condition="prose", batch_size=8),
    )
    summary = energy_summary(open_run(run))
    (row,), (device,) = summary.phases.to_dict("records"), summary.devices.to_dict("records")
    for found in (row, device):
        assert np.isnan(found["power_mw"])
        assert np.isnan(found["energy_mj"])
        assert "move in time with the power sensor, which may be off by" in found["reason"]
    assert np.isnan(device["attributed_share"])
    (alias,) = summary.aliasing.to_dict("records")
    assert alias["step_period_ms"] == pytest.approx(100.0)
    assert alias["error"] > 0.7  # of a load that draws nothing for half of its step
    assert summary.tokens["tokens"].tolist() == [60 * 8]
    assert summary.tokens["tokens_source"].tolist() == ["manifest"]
    assert np.isnan(summary.tokens["mj_per_token"][0])
    assert "move in time with the power sensor" in summary.tokens["reason"][0]
    for frame in (summary.devices, summary.phases, summary.tokens):
        assert frame["energy_flag"][0] == "in time with the sensor"
    assert main(["energy", str(run)]) == 0
    assert "steps of decode (100.0 ms) move in time with the power sensor" in capsys.readouterr().err


def test_a_warning_about_integrated_power_stands_on_every_number_made_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load = steps([("decode", 60.0, 400.0)], seconds=6)
    plain, aliased = (
        write_energy_run(
            tmp_path / name,
            power=SimulatedSensor(counter_ms=counter_ms).sample(load),
            spans=[numbered(load)],
            devices=(DEVICE,),
            data=DataSpec(condition="prose", batch_size=8),
        )
        for name, counter_ms in (("counter", 100.0), ("power", None))
    )
    outcome = energy_summary(open_run(aliased))
    (error,) = outcome.aliasing["error"]
    assert 0.02 < error < 0.15
    for frame in (outcome.devices, outcome.phases, outcome.tokens):
        assert "move in time with the power sensor" in frame["flag"][0]
        assert frame["energy_flag"][0] == "in time with the sensor"
    (row,), (token,) = outcome.phases.to_dict("records"), outcome.tokens.to_dict("records")
    assert row["power_low_mw"] < row["power_mw"] * (1 - error)
    assert row["power_high_mw"] > row["power_mw"] * (1 + error)
    assert token["mj_per_token_low"] < token["mj_per_token"] * (1 - error)
    assert outcome.devices["error"][0] > error
    assert main(["energy", str(aliased), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert "move in time" in document["tokens"][0]["flag"]
    for name in ("devices", "phases", "tokens"):
        assert document[name][0]["energy_flag"] == "in time with the sensor"
    # The counter sees all of it.
    known = energy_summary(open_run(plain))
    assert known.phases["flag"][0] is None
    assert known.tokens["flag"][0] is None
    assert known.tokens["energy_flag"][0] is None


def test_what_was_calibrated_is_used_and_nonsense_in_it_is_not(tmp_path: Path) -> None:
    load = steps([("decode", 21.0, 400.0)], seconds=6, jitter=0.1)

    def summary(name: str, **measured: Any) -> Any:
        run = write_energy_run(
            tmp_path / name,
            power=SimulatedSensor(counter_gain=1.09).sample(load),
            spans=[numbered(load)],
            devices=(DEVICE,),
            calibration=DeviceCalibration(duration_s=1.2, **measured),
        )
        return energy_summary(open_run(run))

    outcome = summary("outcome", counter_over_integral=1.09, idle_power_mw=75000)
    assert outcome.devices["flag"][0] is None
    assert outcome.devices["idle_power_mw"][0] == 75000
    odd = summary("odd", counter_over_integral=50.0, idle_power_mw=1 << 60)
    assert odd.devices["flag_code"][0] == "sensors disagree"
    assert odd.devices["idle_power_mw"].isna().all()


def test_reuse_measurements_are_printed_next_to_the_published_number(
    served_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "reuse.json"
    path.write_text(measured((37e3, 45e3, 18e3)).model_dump_json())
    assert main(["energy", str(served_run), "--reuse", str(path)]) == 0
    captured = capsys.readouterr()
    assert "EXACT_HIT" in captured.out
    assert "arXiv 2605.05696 states 63 %" in captured.err
    assert main(["energy", str(served_run), "--reuse", str(path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["reuse"]["saved"] == pytest.approx(0.63, abs=0.01)
    assert document["reuse"]["published"] == {"saved": 0.63, "source": "arXiv 2605.05696"}


def test_names_of_a_run_are_escaped_and_damage_is_stated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load = steps([("decode", 21.0, 400.0)], seconds=3, jitter=0.1)
    evil = "[red]\x1b[31m</script>"
    run = write_energy_run(
        tmp_path / "run",
        power=SimulatedSensor(device_uuid=evil).sample(load),
        spans=[numbered(load)],
        devices=(DeviceSpec(kind="gpu", name=evil, uuid=evil),),
    )
    part = next((run / "spans").rglob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-40])
    assert main(["energy", str(run)]) == 0
    captured = capsys.readouterr()
    assert "\x1b[31m" not in captured.out + captured.err
    assert "[red]" in captured.out
    assert "truncated or corrupt" in captured.err


def test_samples_that_cannot_be_read_are_not_called_missing(
    served_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "run"
    shutil.copytree(served_run, damaged)
    part = next((damaged / "power").rglob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-40])
    assert main(["energy", str(damaged)]) == 1
    said = capsys.readouterr().err
    assert "no power samples that can be read" in said
    assert "truncated or corrupt" in said


def test_a_clock_that_jumped_back_gives_no_energy_and_a_reset_counter_is_no_jump(tmp_path: Path) -> None:
    load = served()
    rows = SimulatedSensor().sample(load, poll_ms=53.0)
    jumped = rows.assign(time_ns=rows["time_ns"].where(rows.index < 200, rows["time_ns"] - 3_000_000_000))
    run = write_energy_run(tmp_path / "jump", power=jumped, spans=[numbered(load)], devices=(DEVICE,))
    summary = energy_summary(open_run(run))
    assert summary.devices["energy_mj"].isna().all()
    assert summary.devices["reason_code"][0] == "counter out of order"
    assert summary.phases.empty
    assert "no energy given" in codes(*summary.problems)
    reset = rows.assign(energy_mj=rows["energy_mj"] - 6_000_000 * (rows.index >= 200))
    run = write_energy_run(tmp_path / "reset", power=reset, spans=[numbered(load)], devices=(DEVICE,))
    assert energy_summary(open_run(run)).devices["energy_mj"].notna().all()


def test_a_gpu_that_several_ranks_sampled_counts_once(tmp_path: Path) -> None:
    load = served()
    power = SimulatedSensor().sample(load, poll_ms=53.0)
    again = power.iloc[5:-5].assign(source_rank=1)
    path = write_energy_run(
        tmp_path / "run", power=pd.concat([power, again]), spans=[numbered(load)] * 2, devices=(DEVICE,)
    )
    summary = energy_summary(open_run(path))
    (device,) = summary.devices.to_dict("records")
    assert device["sampled_by"] == 0
    assert device["samples"] == len(power)
    assert "sampled twice" in codes(*summary.problems)


def overlapping(spans: pd.DataFrame, how: str) -> pd.DataFrame:
    """Spans of phases, one of them over others: over its end, around them, or all of them twice."""
    first, last = spans.index[spans["phase"] == "prefill"][1:3]
    if how == "twice":
        return pd.concat([spans, spans], ignore_index=True)
    if how == "around":
        spans.loc[first, "end_ns"] = spans.loc[last, "start_ns"]
    elif how == "of one phase":
        spans.loc[first + 3, "end_ns"] += 5_000_000
    else:
        spans.loc[first, "end_ns"] += 25_000_000
    return spans


@pytest.mark.parametrize("how", ["over an end", "around", "twice", "of one phase"])
def test_phases_that_overlap_have_no_energy_and_the_device_has(how: str, tmp_path: Path) -> None:
    load = served()
    run = write_energy_run(
        tmp_path / "run",
        power=SimulatedSensor().sample(load, poll_ms=53.0),
        spans=[overlapping(numbered(load), how)],
        tokens={"prefill": 2048, "decode": 16},
        devices=(DEVICE,),
    )
    summary = energy_summary(open_run(run))
    (device,) = summary.devices.to_dict("records")
    assert device["energy_mj"] == pytest.approx(load.energy_mj(load.start_ns, load.end_ns), rel=0.01)
    assert set(summary.phases["phase"]) == {"prefill", "decode"}
    for frame, column in ((summary.phases, "energy_mj"), (summary.tokens, "mj_per_token")):
        assert frame[column].isna().all()
        for reason in (*frame["reason"], device["reason"]):
            assert "spans/rank-00000: phases " in reason
            assert "overlap by" in reason


def test_times_of_neighbouring_phases_may_be_off_by_microseconds(tmp_path: Path) -> None:
    spans = numbered(served())
    spans["end_ns"] += 50_000
    run = write_energy_run(
        tmp_path / "run",
        power=SimulatedSensor().sample(served(), poll_ms=53.0),
        spans=[spans],
        devices=(DEVICE,),
    )
    phases = energy_summary(open_run(run)).phases
    assert phases.set_index("phase").loc["decode", "energy_mj"] > 0

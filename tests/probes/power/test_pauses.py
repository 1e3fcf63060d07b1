"""Steps that move in time with the sensor, on the fake driver: measured without and with pauses."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from observatory.analysis.energy import energy_summary
from observatory.campaign.job import ProfileJob
from observatory.devices.aliasing import visited_error
from observatory.devices.sensors import SensorModel
from observatory.errors import CaptureError
from observatory.probes.power.pauses import PhaseShifts
from observatory.run import open_run
from tests.devices.driver import FakeDriver
from tests.devices.scenes import needs_driver, play

UUID = "GPU-fa4e0000-0000-4000-8000-000000000000"
PERIOD_NS = 100_000_000
STEPS = 100
#: Standard deviation of what steps are late; on an idle machine 0.1 ms.
EVEN_MS = 1.0
PART_TIME = SensorModel(update_ms=100.0, window_ms=25.0)


def _next_update_ns() -> int:
    """When the device renews its readings; its counter is still read."""
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    first = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    while pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) == first:
        time.sleep(0.0005)
    return time.monotonic_ns()


def _until(moment_ns: int) -> None:
    time.sleep(max(0.0, (moment_ns - time.monotonic_ns()) * 1e-9))


def locked_steps(driver: FakeDriver, *, shifts: bool) -> dict[str, float]:
    """Steps of 100 ms, busy for the half at whose end the sensor looks; no energy counter."""
    import torch

    import observatory
    from observatory.probes.routing.sites import RoutingDecision
    from tests.probes.tiny import ScriptedModel, scripted_adapter

    driver.name(UUID, "00000000:10:00.0", "NVIDIA H100 80GB HBM3 (played)")
    update_ns = _next_update_ns()
    for what in ("field:83", "nvmlDeviceGetTotalEnergyConsumption"):
        driver.fail(what, 3)
    model = ScriptedModel()
    decision = RoutingDecision(expert_ids=torch.zeros(4, 1, dtype=torch.int64), tokens=4)
    run = Path(os.environ["FAKE_NVML_STATE"]).with_name("run")
    truth_j = seconds = paused_ms = 0.0
    late_ms = []
    with observatory.watch(
        model, run, adapters=[scripted_adapter(3)], power=[UUID], power_shifts=shifts and STEPS
    ) as watch:
        now_ns = time.monotonic_ns()
        start_ns = (
            update_ns + ((now_ns - update_ns) // PERIOD_NS + 1) * PERIOD_NS - PERIOD_NS // 2 + 8_000_000
        )
        for _ in range(STEPS):
            _until(start_ns)
            before_j = driver.get("energy_j")
            with watch.phase("decode"):
                driver.set(busy=1)
                model([decision])
                _until(start_ns + PERIOD_NS // 2)
                driver.set(busy=0)
                _until(start_ns + PERIOD_NS)
            truth_j += driver.get("energy_j") - before_j
            seconds += 0.1
            ended_ns = time.monotonic_ns()
            late_ms.append((ended_ns - start_ns - PERIOD_NS) * 1e-6)
            watch.step()
            late_ns = time.monotonic_ns() - ended_ns
            start_ns += PERIOD_NS
            if late_ns > 3_000_000:
                start_ns += late_ns
                paused_ms += late_ns * 1e-6
    uneven_ms = float(np.std(late_ms))
    return {"mean_w": truth_j / seconds, "paused_ms": paused_ms, "uneven_ms": uneven_ms}


def without(driver: FakeDriver) -> dict[str, float]:
    return locked_steps(driver, shifts=False)


def cured(driver: FakeDriver) -> dict[str, float]:
    return locked_steps(driver, shifts=True)


def evenly(scene: Callable[[FakeDriver], dict[str, float]], folder: Path) -> dict[str, float]:
    """Play until the steps kept to their rhythm: on a busy machine they drift through the sensor."""
    for _ in range(4):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        truth = play(scene, folder)
        if truth["uneven_ms"] < EVEN_MS:
            return truth
    pytest.skip(f"this machine is too busy for steps of 100 ms: {truth['uneven_ms']:.1f} ms uneven")


def _measured(folder: Path) -> tuple[dict[str, Any], dict[str, Any], Any]:
    run = open_run(folder / "run")
    summary = energy_summary(run)
    phases = summary.phases[summary.phases["phase"] == "decode"]
    return phases.to_dict("records")[0], summary.aliasing.to_dict("records")[0], run


@needs_driver
@pytest.mark.slow
def test_a_run_whose_steps_lock_to_the_sensor_is_flagged_and_with_pauses_it_is_right(tmp_path: Path) -> None:
    truth = evenly(without, tmp_path / "a")
    phase, alias, run = _measured(tmp_path / "a")
    (device,) = energy_summary(run).devices.to_dict("records")
    off = device["integral_mj"] / device["duration_s"] / 1e3 / truth["mean_w"] - 1
    assert abs(off) > 0.25
    assert np.isnan(phase["power_mw"])
    assert "its steps move in time with the power sensor" in phase["reason"]
    assert alias["error"] > 0.25
    assert alias["shifts"] > 0
    assert "power_shifts" not in run.manifest.config

    truth = evenly(cured, tmp_path / "b")
    phase, alias, run = _measured(tmp_path / "b")
    outcome = run.manifest.config["power_shifts"]
    assert outcome["pauses"] >= 1, (outcome, truth)
    assert outcome["error_without"] > 0.25
    assert outcome["paused_s"] < 0.02 * 10
    # Sleeps of a busy machine make steps jitter; how exact the cure is, is tested on a played clock below.
    cured_off = phase["power_mw"] / 1e3 / truth["mean_w"] - 1
    assert abs(cured_off) < 0.12
    assert abs(cured_off) < 0.4 * abs(off)
    assert alias["error"] < 0.15
    # No pause is inside a span.
    spans = run.spans()
    assert (spans["end_ns"] - spans["start_ns"]).median() < 1.1 * PERIOD_NS


class Steps:
    """A clock, and steps that take time on it."""

    def __init__(self, sensor: SensorModel = PART_TIME, planned: int | None = None) -> None:
        self.now = 10**12
        self.slept: list[float] = []
        self.starts: list[int] = []
        self.waits = 0
        self.shifts = PhaseShifts(
            [sensor], synchronise=self._wait, steps=planned, now_ns=lambda: self.now, sleep=self._sleep
        )

    def _wait(self) -> None:
        self.waits += 1

    def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += round(seconds * 1e9)

    def run(self, lengths_ms: list[float]) -> None:
        for length in lengths_ms:
            self.starts.append(self.now)
            self.now += round(length * 1e6)
            self.shifts.after_step()


def test_pauses_come_after_the_device_is_done_and_take_less_than_a_hundredth() -> None:
    steps = Steps()
    steps.run([100.0] * 200)
    assert steps.slept == [pytest.approx(0.025)] * len(steps.slept)
    assert 6 <= len(steps.slept) <= 7
    assert steps.waits == len(steps.slept)
    assert sum(steps.slept) < 0.01 * 20


def _error(steps: Steps, period_ms: float) -> float:
    return visited_error(np.array(steps.starts), period_ms, update_ms=100.0, window_ms=25.0)


def test_visited_places_are_cured_in_time_and_at_once_where_the_steps_are_known() -> None:
    for period_ms, length in ((100.0, 600), (50.0, 1200), (200.0, 300)):
        untreated, free, planned = Steps(SensorModel()), Steps(), Steps(planned=length)
        short = Steps(planned=length // 6)
        for steps in (untreated, free, planned):
            steps.run([period_ms] * length)
        short.run([period_ms] * (length // 6))
        assert _error(untreated, period_ms) > 0.25
        assert _error(free, period_ms) < 0.1 * _error(untreated, period_ms)
        assert _error(planned, period_ms) < 0.03
        assert _error(short, period_ms) < 0.05
        assert len(planned.slept) <= 3


def test_a_second_phase_has_pauses_of_its_own() -> None:
    steps = Steps(planned=200)
    steps.run([100.0] * 200 + [50.0] * 200 + [37.0] * 200)
    assert steps.slept == [pytest.approx(0.025)] * 4


@pytest.mark.parametrize("late", range(16))
def test_neither_the_time_before_the_first_step_nor_a_late_one_hides_the_rhythm(late: int) -> None:
    steps = Steps(planned=200)
    steps.now += 12_000_000
    steps.run([106.0 if step == late else 100.0 for step in range(200)])
    assert len(steps.slept) >= 1


@pytest.mark.parametrize(
    ("sensor", "length_ms"),
    [
        (PART_TIME, 37.0),  # wanders by itself
        (SensorModel(update_ms=100.0, window_ms=100.0), 100.0),  # sees all the time
        (SensorModel(), 100.0),  # nobody knows
    ],
)
def test_without_anything_to_cure_there_is_no_pause(sensor: SensorModel, length_ms: float) -> None:
    steps = Steps(sensor)
    steps.run([length_ms] * 200)
    assert steps.slept == []


def test_irregular_steps_have_no_pauses_and_a_new_rhythm_is_noticed() -> None:
    steps = Steps()
    steps.run([20.0, 90.0, 45.0, 160.0, 10.0] * 30)
    assert steps.slept == []
    steps.run([50.0] * 400)
    assert steps.slept[-3:] == [pytest.approx(0.025)] * 3


def test_pauses_are_refused_where_another_rank_would_wait_for_them(tmp_path: Path) -> None:
    import observatory
    from tests.probes.tiny import ScriptedModel

    with pytest.raises(CaptureError, match="makes all others wait"):
        observatory.watch(ScriptedModel(), tmp_path / "run", power_shifts=True, rank=0, world=2)
    with pytest.raises(CaptureError, match="choose one of auto, on, off"):
        ProfileJob(model="m", power_shifts="maybe")
    with pytest.raises(CaptureError, match="power is off"):
        ProfileJob(model="m", power="off", power_shifts="on")

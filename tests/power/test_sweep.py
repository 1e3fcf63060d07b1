"""A sweep on the fake driver, from locks to advice, through the command line and the real pynvml."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from observatory.campaign.clock_sweep import SweepJob, plan_settings
from observatory.campaign.sweep_inputs import parse_clocks, parse_limits
from observatory.errors import ClockError
from tests.power.driver import FakeDriver, why_not

UUID = "GPU-fa4e0000-0000-4000-8000-000000000000"
needs_driver = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


def _run(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    driver = FakeDriver(folder / "driver")
    return subprocess.run(
        [sys.executable, "-m", "observatory", *argv],
        env={**driver.environment(), "OBSERVATORY_LEASES": str(folder / "leases")},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def _sweep(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return _run(
        folder, "clocks", "sweep", "--device", UUID, "--out", str(folder / "sweep.json"), "--cool-s", "0",
        *options, "--", sys.executable, "-m", "tests.power.iterating",
    )  # fmt: skip


@needs_driver
def test_without_apply_nothing_is_touched_and_the_plan_is_told(tmp_path: Path) -> None:
    told = _sweep(tmp_path, "--clocks", "600,1200", "--repeats", "2")
    assert told.returncode == 0
    assert "6 measurements" in told.stderr
    assert FakeDriver(tmp_path / "driver").changes() == []
    assert not (tmp_path / "sweep.json").exists()


@needs_driver
@pytest.mark.slow
def test_a_sweep_finds_time_energy_clamp_and_cap_and_leaves_nothing_locked(tmp_path: Path) -> None:
    told = _sweep(
        tmp_path, "--clocks", "600,1200,1980", "--limits", "250", "--repeats", "1", "--window-s", "2.5",
        "--settle-s", "1", "--apply",
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    document = json.loads((tmp_path / "sweep.json").read_text())
    (series,) = document["series"]
    points = {
        (point["requested_sm_clock_mhz"], point["requested_limit_mw"]): point for point in series["points"]
    }
    assert points[600, None]["label"] == "ok"
    assert points[1980, None]["label"] == "clamped"
    assert points[1980, None]["sm_clock_mhz"] == 1830
    assert points[None, 250_000]["label"] == "power-capped"
    assert points[None, 250_000]["power_cap_share"] > 0.9
    # The device's own formula, as it stands at the top of fake_nvml.c.
    for mhz in (600, 1200):
        point = points[mhz, None]
        iteration_s = 0.0005 + max(0.01, 0.004 * 1830 / mhz)
        voltage = max(0.6, mhz / 1830)
        joules = (90 + 110 * mhz / 1830 * voltage**2) * iteration_s + 0.2 * voltage**2 + 1.5
        assert point["duration_s"] / point["iterations"] == pytest.approx(iteration_s, rel=0.03)
        assert point["energy_mj"] / point["iterations"] == pytest.approx(1000 * joules, rel=0.08)
    changes = FakeDriver(tmp_path / "driver").changes()
    assert {change.what for change in changes} == {"lock", "unlock", "limit"}
    assert [change.what for change in changes][-1] in ("unlock", "limit")
    assert [change for change in changes if change.what == "limit"][-1].values[0] == 700_000
    assert list((tmp_path / "leases").glob("*.json")) == []


def test_the_order_is_random_but_the_same_for_a_seed_and_holds_every_setting() -> None:
    job = SweepJob(device_uuid=UUID, clocks_mhz=(600, 900), limits_mw=(300_000,), repeats=3)
    order = plan_settings(job, 2)
    assert order == plan_settings(job, 2)
    assert len(order) == len(set(order)) == 4 * 3 * 2
    assert order != sorted(order, key=lambda item: (item[0], item[1], str(item[2])))


@pytest.mark.parametrize("text", ["x", "600:500:3", "1:2:1", "600,,700", "1:2:9999", "-5"])
def test_clocks_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ClockError, match="is no list of clocks"):
        parse_clocks(text)


def test_clocks_and_limits_are_read() -> None:
    assert parse_clocks("600:1200:3") == (600, 900, 1200)
    assert parse_clocks("") == ()
    assert parse_limits("300,400.5") == (300_000, 400_500)
    with pytest.raises(ClockError, match="is no list of watts"):
        parse_limits("many")

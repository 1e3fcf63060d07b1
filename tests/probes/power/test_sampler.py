"""The sampling process on devices of a fake driver, with real processes and real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pandas as pd
import pytest

from observatory.devices.base import Sample
from observatory.devices.calibration import calibration_of
from observatory.run import open_run
from tests.conftest import MakeRun
from tests.devices.driver import FakeDriver, why_not

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
]

UUID = "GPU-fa4e0000-0000-4000-8000-000000000000"
SECOND = "GPU-fa4e0000-0000-4000-8000-000000000001"

#: Samples into the run named by the first argument, with what else is given; then does what BODY says.
_OWNER = """
import os, signal, sys, time
from observatory.probes.power.sampler import PowerSampler
from tests.devices.driver import FakeDriver
from pathlib import Path

driver = FakeDriver(Path(os.environ["FAKE_NVML_STATE"]))
driver.devices(2)
sampler = PowerSampler(
    sys.argv[1], rank=0, ranks=1, calibrate_s={calibrate_s}, flush_s=0.3, selectors={selectors!r}
)
sampler.start()
print(sampler._process.pid, flush=True)
{body}
"""


@pytest.fixture
def driver(tmp_path: Path) -> FakeDriver:
    return FakeDriver(tmp_path / "driver")


def _own(
    run: Path,
    driver: FakeDriver,
    body: str,
    *,
    selectors: tuple[str, ...] = (UUID,),
    calibrate_s: float = 0.0,
) -> subprocess.Popen[str]:
    code = _OWNER.format(body=textwrap.dedent(body), selectors=selectors, calibrate_s=calibrate_s)
    return subprocess.Popen(
        [sys.executable, "-c", code, str(run)],
        env=driver.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _samples(run: Path) -> pd.DataFrame:
    return open_run(run).power()


def _ended(pid: int, within_s: float = 120.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def run(make_run: MakeRun) -> Path:
    return make_run()


def test_samples_follow_the_load_and_the_lock_and_the_process_ends(run: Path, driver: FakeDriver) -> None:
    owner = _own(
        run,
        driver,
        """
        driver.set(busy=1)
        time.sleep(1.0)
        driver.set(busy=0)
        time.sleep(0.6)
        outcome = sampler.stop()
        assert outcome.notes == () and outcome.cost.samples >= 4, outcome
        """,
    )
    pid = int(owner.stdout.readline()) if owner.stdout else 0
    _, errors = owner.communicate(timeout=400)
    assert owner.returncode == 0, errors
    assert _ended(pid)
    power = _samples(run)
    assert power["sm_clock_mhz"].max() == 1830
    assert power["sm_clock_mhz"].min() == 345
    assert power["power_mw"].max() > 300_000
    assert power["energy_mj"].is_monotonic_increasing
    assert power["time_ns"].is_monotonic_increasing
    assert (power["read_ns"] > 0).all()
    # one sample every 50 ms at most: a busy machine makes one late and the next one seem early
    assert len(power) <= (power["time_ns"].max() - power["time_ns"].min()) / 50e6 + 2


def test_a_killed_owner_ends_its_sampler_and_the_samples_stay(run: Path, driver: FakeDriver) -> None:
    owner = _own(run, driver, "time.sleep(1.0)\nos.kill(os.getpid(), signal.SIGKILL)")
    pid = int(owner.stdout.readline()) if owner.stdout else 0
    owner.communicate(timeout=400)
    assert owner.returncode == -signal.SIGKILL
    assert _ended(pid)
    assert len(_samples(run)) >= 2


def test_a_forked_child_that_lives_on_does_not_keep_the_sampler_alive(run: Path, driver: FakeDriver) -> None:
    owner = _own(
        run,
        driver,
        """
        if os.fork() == 0:
            sampler.abandon()
            os.close(1), os.close(2)
            time.sleep(150)
            os._exit(0)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    pid = int(owner.stdout.readline()) if owner.stdout else 0
    owner.communicate(timeout=400)
    assert _ended(pid)


def test_ctrl_c_is_the_owners_business_and_nothing_is_lost(run: Path, driver: FakeDriver) -> None:
    owner = _own(
        run,
        driver,
        """
        os.kill(sampler._process.pid, signal.SIGINT)
        time.sleep(0.5)
        assert sampler.stop().cost.samples >= 2
        """,
    )
    _, errors = owner.communicate(timeout=400)
    assert owner.returncode == 0, errors


def test_a_lost_gpu_ends_its_own_rows_and_the_other_goes_on(run: Path, driver: FakeDriver) -> None:
    owner = _own(
        run,
        driver,
        """
        time.sleep(0.7)
        driver.set(lost=1)
        time.sleep(0.9)
        outcome = sampler.stop()
        assert len(outcome.notes) == 1 and "was lost" in outcome.notes[0], outcome
        """,
        selectors=(UUID, SECOND),
    )
    _, errors = owner.communicate(timeout=400)
    assert owner.returncode == 0, errors
    power = _samples(run)
    last_ns = power.groupby("device_uuid")["time_ns"].max()
    assert last_ns[SECOND] - last_ns[UUID] > 0.4e9


def test_a_device_that_is_not_there_is_one_sentence_and_no_process(run: Path, driver: FakeDriver) -> None:
    owner = _own(run, driver, "", selectors=("GPU-ffffffff-0000-0000-0000-000000000000",))
    _, errors = owner.communicate(timeout=400)
    assert owner.returncode != 0
    assert "DeviceError: GPU-ffffffff-0000-0000-0000-000000000000 is no GPU of this machine" in errors


def test_calibration_finds_the_update_period_of_counter_and_sensor(run: Path, driver: FakeDriver) -> None:
    owner = _own(
        run,
        driver,
        """
        outcome = sampler.stop()
        found = outcome.calibration[outcome.sampled[0].uuid]
        counter = found.fields["energy_mj"]
        assert 80 < counter.update_period_ms < 130, found
        assert found.idle_power_mw == 75000, found
        assert 0.95 < found.counter_over_integral < 1.05, found
        """,
        calibrate_s=2.0,
    )
    _, errors = owner.communicate(timeout=400)
    assert owner.returncode == 0, errors


def test_counter_and_power_are_not_compared_while_the_load_changes() -> None:
    def readings(*watts: float) -> list[Sample]:
        return [
            Sample(
                time_ns=index * 100_000_000, read_ns=0, device_uuid=UUID, power_mw=round(power * 1e3),
                energy_mj=round(1e2 * sum(watts[: index + 1])), event_reasons=0,
            )
            for index, power in enumerate(watts)
        ]  # fmt: skip

    steady = calibration_of(readings(*[300.0, 310.0] * 10), {})
    assert steady.counter_over_integral == pytest.approx(1.0, abs=0.01)
    moving = calibration_of(readings(*[100.0] * 10, *[400.0] * 10), {})
    assert moving.counter_over_integral is None
    assert "power moved between 100 and 400 W" in (moving.counter_reason or "")

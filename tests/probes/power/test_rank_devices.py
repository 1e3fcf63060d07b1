"""Which device each rank computes on: given by name, kept in the run, and used for energy per rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from observatory.analysis.energy import energy_summary
from observatory.campaign.job import ProfileJob
from observatory.errors import CaptureError
from observatory.run import open_run
from tests.devices.driver import FakeDriver
from tests.devices.scenes import needs_driver, play

pytestmark = pytest.mark.slow

UUIDS = [f"GPU-fa4e0000-0000-4000-8000-00000000000{number}" for number in range(2)]


def profile(out: Path, *options: str) -> list[str]:
    return [
        sys.executable, "-m", "observatory", "profile", "tiny-gqa", "--batch-size", "2", "--sequence-length",
        "32", "--power", "on", "--out", str(out), *options,
    ]  # fmt: skip


def two_devices(driver: FakeDriver) -> dict[str, Any]:
    driver.devices(2)
    driver.set(0, busy=1)
    driver.set(1, busy=1, mem_j=0)
    out = Path(os.environ["FAKE_NVML_STATE"]).with_name("run")
    named = f"{UUIDS[1]},{UUIDS[0]}"
    options = ("--ep", "2", "--phase", "prefill", "--steps", "300", "--rank-devices", named)
    done = subprocess.run(profile(out, *options), check=False, capture_output=True, text=True, timeout=400)
    watts = [driver.get("watts", index) for index in range(2)]
    return {"code": done.returncode, "errors": done.stderr, "run": str(out), "watts": watts}


@needs_driver
def test_two_ranks_of_a_profile_have_the_energy_of_the_devices_that_they_name(tmp_path: Path) -> None:
    outcome = play(two_devices, tmp_path)
    assert outcome["code"] == 0, outcome["errors"]
    run = open_run(outcome["run"])
    assert [status.power and status.power.own_devices for status in run.manifest.ranks] == [
        (UUIDS[1],),
        (UUIDS[0],),
    ]
    summary = energy_summary(run)
    devices = summary.devices.set_index("device_uuid")
    # The devices were named crosswise: rank 0 has the second one, which draws less.
    for rank, (uuid, watts) in enumerate(zip(reversed(UUIDS), reversed(outcome["watts"]), strict=True)):
        assert devices.loc[uuid, "source_rank"] == rank
        assert devices.loc[uuid, "power_mw"] == pytest.approx(watts * 1e3, rel=0.05)
    assert summary.tokens["mj_per_token"].notna().all(), summary.tokens["reason"].tolist()
    assert outcome["watts"][1] < 0.8 * outcome["watts"][0]
    assert summary.tokens["tokens"].tolist() == [300 * 2 * 32] * 2
    assert summary.totals["tokens"].tolist() == [2 * 300 * 2 * 32]


def one_device(driver: FakeDriver) -> dict[str, Any]:
    driver.set(0, busy=1)
    out = Path(os.environ["FAKE_NVML_STATE"]).with_name("run")
    options = ("--ep", "2", "--phase", "prefill", "--steps", "20")
    done = subprocess.run(profile(out, *options), check=False, capture_output=True, text=True, timeout=400)
    return {"code": done.returncode, "errors": done.stderr, "run": str(out)}


@needs_driver
def test_a_gpu_that_several_ranks_see_is_sampled_by_one_of_them(tmp_path: Path) -> None:
    outcome = play(one_device, tmp_path)
    assert outcome["code"] == 0, outcome["errors"]
    run = open_run(outcome["run"])
    assert run.power()["source_rank"].nunique() == 1
    samplers = [len(status.power.sampled) for status in run.manifest.ranks if status.power is not None]
    assert sorted(samplers) == [0, 1]
    assert len(energy_summary(run).devices) == 1


def killed(_driver: FakeDriver) -> dict[str, Any]:
    out = Path(os.environ["FAKE_NVML_STATE"]).with_name("run")
    command = profile(out, "--steps", "100000", "--rank-devices", UUIDS[0], "--flush-seconds", "0.2")
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list((out / "power").rglob("part-*.parquet")):
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    return {"run": str(out)}


@needs_driver
def test_a_profile_that_is_killed_leaves_its_devices_and_their_calibration(tmp_path: Path) -> None:
    run = open_run(play(killed, tmp_path)["run"])
    (status,) = run.manifest.ranks
    assert status.state == "running"
    assert status.power is not None
    assert status.power.own_devices == (UUIDS[0],)
    assert [device.uuid for device in status.power.sampled] == [UUIDS[0]]
    assert status.power.calibration[UUIDS[0]].fields
    assert energy_summary(run).devices["source_rank"].tolist() == [0]


def test_every_rank_needs_the_name_of_one_device() -> None:
    job = ProfileJob(model="m", rank_devices="GPU-a,GPU-b")
    assert job.own_devices(rank=1, ranks=2) == ("GPU-b",)
    assert ProfileJob(model="m").own_devices(rank=1, ranks=2) is None
    for names in ("GPU-a", "GPU-a,", "GPU-a,GPU-b,GPU-c"):
        with pytest.raises(CaptureError, match="one name for each rank"):
            ProfileJob(model="m", rank_devices=names).own_devices(rank=0, ranks=2)
    with pytest.raises(CaptureError, match="power is off"):
        ProfileJob(model="m", rank_devices="GPU-a", power="off")


def another_device(_driver: FakeDriver) -> dict[str, Any]:
    import observatory
    from observatory.probes.power import watched
    from tests.probes.tiny import ScriptedModel, scripted_adapter

    run = Path(os.environ["FAKE_NVML_STATE"]).with_name("run")
    watched._gpus_of = lambda _model: (UUIDS[1],)
    with (
        pytest.raises(CaptureError) as caught,
        observatory.watch(ScriptedModel(), run, adapters=[scripted_adapter(3)], own_devices=[UUIDS[0]]),
    ):
        pass
    return {"error": str(caught.value), "state": open_run(run).manifest.state}


@needs_driver
def test_a_name_that_is_not_the_device_which_torch_tells_is_refused(tmp_path: Path) -> None:
    outcome = play(another_device, tmp_path)
    assert f"names {UUIDS[0]}, but the model of this rank is on {UUIDS[1]}" in outcome["error"]
    assert outcome["state"] == "failed"


def a_partitioned_neighbour(driver: FakeDriver) -> dict[str, Any]:
    driver.devices(2)
    driver.set(0, mig=1)
    out = Path(os.environ["FAKE_NVML_STATE"]).with_name("run")
    done = subprocess.run(profile(out, "--steps", "2"), check=False, capture_output=True, timeout=400)
    return {"code": done.returncode, "run": str(out)}


@needs_driver
def test_gpus_that_are_left_out_are_named_in_the_run(tmp_path: Path) -> None:
    outcome = play(a_partitioned_neighbour, tmp_path)
    assert outcome["code"] == 0
    run = open_run(outcome["run"])
    power = run.manifest.ranks[0].power
    assert power is not None
    assert [device.uuid for device in power.sampled] == [UUIDS[1]]
    assert f"not every GPU was sampled: {UUIDS[0]} is partitioned (MIG)" in power.notes[0]

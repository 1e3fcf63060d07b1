"""Setting clocks and limits: what is set, what is refused, and that nothing is set to find that out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from observatory.errors import ClockError, DeviceError, DeviceLostError, LockRefusedError
from observatory.host.processes import descends_from, has_admin_capability
from observatory.locks.commands import limit_ways, lock_ways
from observatory.locks.control import ClockControl
from observatory.locks.status import device_report
from observatory.locks.words import LockCode, refusal_words
from observatory.reasons import Reason
from tests.devices.driver import FakeDriver
from tests.devices.scenes import needs_driver, play

UUID = "GPU-fa4e0000-0000-4000-8000-000000000000"


def locking_scene(driver: FakeDriver) -> dict[str, Any]:
    driver.set(busy=1)
    with ClockControl(UUID) as control:
        outcome: dict[str, Any] = {"free_mhz": driver.get("mhz"), "clocks": control.supported_sm_clocks_mhz}
        outcome["locked"] = [control.lock_sm_clock(777), driver.get("mhz"), driver.get("lock_max")]
        outcome["clamped"] = [control.lock_sm_clock(1980), driver.get("mhz")]
        control.lock_sm_clock(900)
    outcome["after closing"] = driver.get("mhz")  # closing undoes nothing
    with ClockControl(UUID) as control:
        control.unlock()
    outcome["unlocked"] = [driver.get("mhz"), driver.get("lock_max")]
    outcome["changes"] = [[change.what, *change.values, change.code] for change in driver.changes()]
    return outcome


@needs_driver
def test_a_lock_goes_to_a_supported_clock_and_outlives_its_setter(tmp_path: Path) -> None:
    outcome = play(locking_scene, tmp_path)
    assert outcome["clocks"] == list(range(210, 1981, 15))
    assert outcome["free_mhz"] == 1830
    assert outcome["locked"] == [780, 780, 780]
    assert outcome["clamped"] == [1980, 1830], "the driver takes the request and holds another clock"
    assert outcome["after closing"] == 900
    assert outcome["unlocked"] == [1830, 0]
    assert outcome["changes"] == [
        ["lock", 780, 780, 0], ["lock", 1980, 1980, 0], ["lock", 900, 900, 0], ["unlock", 0, 0, 0]
    ]  # fmt: skip


def snapping_scene(driver: FakeDriver) -> dict[str, Any]:
    outcome: dict[str, Any] = {}
    with ClockControl(UUID) as control:
        for asked in (210, 217, 218, 225, 232, 1979, 1980, 1995, 195):
            outcome[str(asked)] = control.snap(asked)
        for asked in (78, 194, 1996, 0, -1):
            with pytest.raises(ClockError, match="expected 210 to 1980 MHz"):
                control.lock_sm_clock(asked)
    driver.fail("nvmlDeviceGetSupportedGraphicsClocks", 3)
    with ClockControl(UUID) as control, pytest.raises(ClockError, match="lists no SM clocks"):
        control.lock_sm_clock(780)
    assert driver.changes() == []
    return outcome


@needs_driver
def test_a_clock_snaps_to_the_nearest_and_a_typing_error_is_not_snapped(tmp_path: Path) -> None:
    assert play(snapping_scene, tmp_path) == {
        "210": 210, "217": 210, "218": 225, "225": 225, "232": 225, "1979": 1980, "1980": 1980, "1995": 1980,
        "195": 210,
    }  # fmt: skip


def limit_scene(driver: FakeDriver) -> dict[str, Any]:
    outcome: dict[str, Any] = {}
    with ClockControl(UUID) as control:
        outcome["range"] = control.limit_range_mw
        outcome["set"] = [
            control.set_power_limit_mw(450_000),
            control.power_limit_mw,
            control.default_limit_mw,
        ]
        for limit_mw in (199_999, 700_001):
            with pytest.raises(ClockError, match="expected 200000 to 700000 mW"):
                control.set_power_limit_mw(limit_mw)
        # A setter that says yes and does nothing: what pynvml's _v2 setter looks like when it fails.
        import pynvml

        pynvml.nvmlDeviceSetPowerManagementLimit = lambda *_: None
        with pytest.raises(ClockError, match="accepted a power limit of 300000 mW and holds 450000 mW"):
            control.set_power_limit_mw(300_000)
    outcome["changes"] = [[change.what, change.values[0], change.code] for change in driver.changes()]
    return outcome


@needs_driver
def test_a_power_limit_is_read_back(tmp_path: Path) -> None:
    outcome = play(limit_scene, tmp_path)
    assert outcome["range"] == [200_000, 700_000]
    assert outcome["set"] == [450_000, 450_000, 700_000]
    assert outcome["changes"] == [["limit", 450_000, 0]]


def denied_scene(driver: FakeDriver) -> dict[str, Any]:
    driver.set(privileged=0)
    outcome: dict[str, Any] = {}
    with ClockControl(UUID) as control:
        for name, call in (
            ("lock", lambda: control.lock_sm_clock(780)),
            ("unlock", control.unlock),
            ("limit", lambda: control.set_power_limit_mw(450_000)),
        ):
            with pytest.raises(LockRefusedError) as caught:
                call()
            outcome[name] = str(caught.value)
        for code, kind in ((3, LockRefusedError), (13, LockRefusedError), (2, ClockError), (999, ClockError)):
            driver.fail("nvmlDeviceSetGpuLockedClocks", code)
            with pytest.raises(kind) as caught:
                control.lock_sm_clock(780)
            assert isinstance(caught.value, LockRefusedError) == (kind is LockRefusedError)
            outcome[str(code)] = str(caught.value)
        driver.fail("nvmlDeviceSetGpuLockedClocks", 15)
        with pytest.raises(DeviceLostError):
            control.lock_sm_clock(780)
    assert driver.get("lock_max") == 0
    return outcome


@needs_driver
def test_a_driver_that_does_not_permit_is_answered_with_the_commands_that_do_it(tmp_path: Path) -> None:
    outcome = play(denied_scene, tmp_path)
    for part in (
        f"nvidia-smi -i {UUID} --lock-gpu-clocks=780,780", "srun --gpu-freq=780",
        "set_gpu_locked_clocks", "wrapper", "NVML 4, no permission", "CAP_SYS_ADMIN",
        "docs/power.md#permissions",
    ):  # fmt: skip
        assert part in outcome["lock"]
    assert f"nvidia-smi -i {UUID} --reset-gpu-clocks" in outcome["unlock"]
    assert f"nvidia-smi -i {UUID} --power-limit=450" in outcome["limit"]
    assert "not supported (NVML 3" in outcome["3"]
    assert "Volta" in outcome["13"]
    assert "nvidia-smi" in outcome["999"]
    assert all(len(message) < 1200 and message.isprintable() for message in outcome.values())


def refusing_scene(driver: FakeDriver) -> dict[str, Any]:
    """MIG, and who uses the GPU: nobody, we, our child, our parent, pid 1, nobody that lives."""
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    outcome: dict[str, Any] = {"parent": os.getppid()}

    def refusal(*pids: int, owner: int | None = None) -> Any:
        driver.processes(list(pids))
        with ClockControl(UUID, owner_pid=owner) as control:
            reason = control.refusal()
            if reason is not None:
                assert reason.values["gpu"] in refusal_words(reason)
                for call in (lambda: control.lock_sm_clock(780), lambda: control.set_power_limit_mw(450_000)):
                    with pytest.raises(LockRefusedError, match="is refused: "):
                        call()
            return None if reason is None else reason.document()

    try:
        outcome["ours"] = [refusal(), refusal(os.getpid()), refusal(os.getpid(), child.pid)]
        outcome["others"] = [refusal(os.getppid()), refusal(child.pid, 1), refusal(4_200_000)]
        outcome["many"] = refusal(*range(4_200_000, 4_200_008))
        outcome["owner"] = [refusal(os.getpid(), owner=os.getppid()), refusal(os.getpid(), owner=child.pid)]
    finally:
        child.communicate()
    outcome["ended child"] = refusal(child.pid)
    driver.processes([])
    driver.set(mig=1)
    outcome["mig"] = refusal()
    driver.set(mig=0)
    driver.fail("nvmlDeviceGetMigMode", 3)
    outcome["no mig"] = refusal()
    driver.fail("nvmlDeviceGetMigMode", 4)
    outcome["unknown mig"] = refusal()
    driver.fail("nvmlDeviceGetMigMode", 0)
    driver.fail("nvmlDeviceGetComputeRunningProcesses_v3", 4)
    outcome["unknown users"] = refusal()
    outcome["changes"] = len(driver.changes())
    with ClockControl(UUID) as control:
        control.unlock()  # who may not lock may still undo
    return outcome


@needs_driver
def test_a_partitioned_or_shared_gpu_is_refused_without_asking_for_anything(tmp_path: Path) -> None:
    outcome = play(refusing_scene, tmp_path)
    assert outcome["ours"] == [None, None, None]
    assert [reason["pids"] for reason in outcome["others"]] == [[outcome["parent"]], [1], [4_200_000]]
    assert {reason["code"] for reason in outcome["others"]} == {LockCode.SHARED}
    words = refusal_words(Reason(LockCode.SHARED, outcome["many"]))
    assert words.count("420000") == 6
    assert ", ... (" in words
    assert outcome["owner"][0] is None
    assert outcome["owner"][1]["code"] == LockCode.SHARED
    assert outcome["ended child"]["code"] == LockCode.SHARED
    assert outcome["mig"]["code"] == LockCode.PARTITIONED
    assert outcome["no mig"] is None
    assert outcome["unknown mig"]["code"] == LockCode.PARTITIONS_UNKNOWN
    assert outcome["unknown users"]["code"] == LockCode.USERS_UNKNOWN
    assert outcome["changes"] == 0


def lost_scene(driver: FakeDriver) -> int:
    with ClockControl(UUID) as control:
        driver.set(lost=1)
        for call in (control.refusal, control.unlock, lambda: control.limit_range_mw):
            with pytest.raises(DeviceLostError):
                call()
        driver.set(lost=0)
    control.close()
    with pytest.raises(DeviceError, match="was closed"):
        control.unlock()
    with pytest.raises(DeviceError, match="cannot be opened"):
        ClockControl("GPU-00000000")
    return len(driver.changes())


@needs_driver
def test_a_lost_or_closed_gpu_is_not_set(tmp_path: Path) -> None:
    assert play(lost_scene, tmp_path) == 0


@pytest.mark.parametrize("uuid", ["rapl:package-0@node1", "amd:1", "none", "MIG-1", "0"])
def test_only_nvidia_gpus_have_clocks_to_lock(uuid: str) -> None:
    with pytest.raises(LockRefusedError, match="only NVIDIA GPUs"):
        ClockControl(uuid)


def report_scene(driver: FakeDriver) -> dict[str, Any]:
    """One healthy GPU, one with gaps, one partitioned, one lost."""
    driver.devices(4)
    driver.fail("field:186", 2, 1)
    driver.fail("nvmlDeviceGetCurrentClocksEventReasons", 4, 1)
    driver.fail("nvmlDeviceGetCurrentClocksThrottleReasons", 4, 1)
    driver.set(2, mig=1)
    driver.set(3, lost=1)
    report = device_report()
    assert driver.changes() == []
    return {
        "devices": [
            [status.selector, status.kind, status.state, status.document()["clocks_reason"]]
            for status in report
        ],
        "gaps": [
            [field.name, field.state, field.detail, field.remedy]
            for field in report[1].fields
            if field.state != "works"
        ],
        "works": [sum(field.state == "works" for field in status.fields) for status in report[:3]],
        "lost": [report[3].detail, report[3].remedy],
        "absent": {status.kind: status.remedy for status in report[4:]},
    }


@needs_driver
def test_the_report_lists_every_device_and_sets_nothing(tmp_path: Path) -> None:
    outcome = play(report_scene, tmp_path)
    first, second, third, lost, *_ = outcome["devices"]
    assert first[:3] == [UUID, "nvidia", "works"]
    code = LockCode.ALLOWED if has_admin_capability() else LockCode.NOT_PERMITTED
    assert first[3].items() >= {"code": code, "clocks": 119, "low_mhz": 210, "high_mhz": 1980}.items()
    assert second[2] == "works"
    assert third[3]["code"] == LockCode.PARTITIONED
    assert lost == [None, "nvidia", "failed", None]
    assert outcome["works"] == [11, 9, 11]
    (power, state, detail, remedy), (events, denied, *_) = outcome["gaps"]
    assert (power, state, remedy) == ("power_mw", "not supported", "update the driver")
    assert "only a 1 s mean" in detail
    assert (events, denied) == ("event_reasons", "not permitted")
    assert "GPU is lost" in outcome["lost"][0]
    assert "amd" in outcome["absent"]
    assert outcome["absent"]["amd"]


def test_commands_name_the_gpu_by_uuid_and_lock_both_ends() -> None:
    smi, srun, zeusd, _ = lock_ways("GPU-1", 780)
    assert "-i GPU-1 --lock-gpu-clocks=780,780" in smi
    assert srun.startswith("srun --gpu-freq=780,verbose ")
    assert "min_clock_mhz=780&max_clock_mhz=780" in zeusd
    assert "--power-limit=312.5" in limit_ways("GPU-1", 312_500)[0]


def test_descent_is_told_from_proc() -> None:
    assert descends_from(os.getpid(), os.getpid())
    assert descends_from(os.getpid(), os.getppid())
    assert not descends_from(os.getppid(), os.getpid())
    assert not descends_from(4_200_000, 4_200_000)
    assert not descends_from(0, os.getpid())

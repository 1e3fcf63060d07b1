"""Provenance is found out where it can be, and never fails."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from observatory.host import provenance
from observatory.run.manifest import Manifest, ModelSpec


def test_a_manifest_says_what_ran_where() -> None:
    manifest = provenance.new_manifest(model=ModelSpec(name="m"), config={"steps": 3})
    assert manifest.config == {"steps": 3}
    assert manifest.argv
    assert manifest.hosts[0].cpus == os.cpu_count()
    assert manifest.software["python"] == sys.version.split()[0]
    assert {"numpy", "pyarrow", "torch"} <= manifest.software.keys()
    assert manifest.run_id != provenance.new_manifest(model=ModelSpec(name="m")).run_id
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


def test_the_commit_is_marked_dirty_and_none_outside_a_checkout(tmp_path: Path) -> None:
    assert provenance.find_git_sha(tmp_path) is None
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    (tmp_path / "file").write_text("1")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    clean = provenance.find_git_sha(tmp_path)
    assert clean is not None
    assert len(clean) == 40
    (tmp_path / "file").write_text("2")
    assert provenance.find_git_sha(tmp_path) == f"{clean}-dirty"


def test_git_that_hangs_or_is_missing_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "_GIT_TIMEOUT_S", 0.2)
    (tmp_path / "git").write_text("#!/bin/sh\nexec sleep 5\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert provenance.find_git_sha() is None
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert provenance.find_git_sha() is None


def test_a_strange_environment_does_not_stop_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x" * 9000, "\udcff\n\x1b[2J", *["a"] * 5000])
    monkeypatch.setenv("SLURM_JOB_ID", "12\udcff")
    monkeypatch.setenv("GIT_DIR", "/dev/null")
    monkeypatch.setattr(importlib.metadata, "version", lambda _: 1 / 0)
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)  # another test may have loaded it
    manifest = provenance.new_manifest(model=ModelSpec(name="m"))
    assert manifest.scheduler is None
    assert manifest.git_sha is None
    assert set(manifest.software) == {"python"}
    assert len(manifest.argv) == 256
    assert len(manifest.argv[0]) == 1000
    assert manifest.argv[1] == "[2J"
    Manifest.model_validate_json(manifest.model_dump_json())


class FakeDriverError(Exception):
    """Stands for NVMLError of any return code."""


def refuse(*_: Any) -> Any:
    raise FakeDriverError("Not Supported")


def fake_driver(**answers: Any) -> SimpleNamespace:
    """A pynvml whose functions answer as given and otherwise fail."""
    names = [
        "nvmlSystemGetDriverVersion",
        "nvmlDeviceGetCount",
        "nvmlDeviceGetHandleByIndex",
        "nvmlDeviceGetName",
        "nvmlDeviceGetUUID",
        "nvmlDeviceGetEnforcedPowerLimit",
        "nvmlDeviceGetMaxClockInfo",
    ]
    driver = SimpleNamespace(**dict.fromkeys(names, refuse), NVML_CLOCK_SM=1, stopped=[])
    driver.nvmlInit = lambda: None
    driver.nvmlShutdown = lambda: driver.stopped.append(True)
    for name, value in answers.items():
        setattr(driver, name, lambda *_, value=value: value)
    return driver


def test_devices_are_named_and_refused_readings_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = fake_driver(
        nvmlDeviceGetCount=1,
        nvmlDeviceGetHandleByIndex="handle",
        nvmlDeviceGetName=b"NVIDIA H100\x00\n",
        nvmlDeviceGetUUID="GPU-1",
        nvmlDeviceGetEnforcedPowerLimit=700_000,
    )
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    (device,) = provenance.driver_devices()
    assert (device.name, device.uuid, device.enforced_limit_mw) == ("NVIDIA H100", "GPU-1", 700_000)
    assert device.driver is None
    assert device.max_sm_clock_mhz is None
    assert driver.stopped == [True]


def test_a_lost_device_keeps_its_place_and_a_broken_driver_is_no_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(
        sys.modules, "pynvml", fake_driver(nvmlDeviceGetCount=2, nvmlSystemGetDriverVersion="580")
    )
    assert [(device.name, device.driver) for device in provenance.driver_devices()] == [(None, "580")] * 2
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(nvmlInit=refuse))
    assert provenance.driver_devices() == ()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert provenance.driver_devices() == ()


def test_torch_is_not_imported_for_its_version() -> None:
    code = """
import sys
from observatory.host.provenance import collect_provenance
collect_provenance()
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

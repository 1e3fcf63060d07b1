"""A sweep on the fake driver, from locks to advice, through the command line and the real pynvml."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from observatory.campaign.sweep.document import recover_sweep
from observatory.campaign.sweep.inputs import parse_clocks, parse_limits
from observatory.campaign.sweep.journal import claimed
from observatory.campaign.sweep.settings import Setting, SweepJob, plan_settings
from observatory.errors import ClockError
from observatory.host.processes import has_admin_capability
from observatory.locks.lease import ProcessId
from observatory.run.documents.clock_sweep import load_sweep
from tests.devices.driver import FakeDriver, why_not

pytestmark = pytest.mark.slow

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
        *options, "--", sys.executable, "-m", "tests.campaign.sweep.iterating",
    )  # fmt: skip


def _seconds(mhz: float) -> float:
    """An iteration of the device's own, as it stands at the top of fake_nvml.c."""
    return 0.0005 + max(0.01, 0.004 * 1830 / mhz)


def _joules(mhz: float) -> float:
    voltage = max(0.6, mhz / 1830)
    return (90 + 110 * mhz / 1830 * voltage**2) * _seconds(mhz) + 0.2 * voltage**2 + 1.5


@needs_driver
def test_without_apply_nothing_is_touched_and_the_plan_is_told(tmp_path: Path) -> None:
    outcome = _sweep(tmp_path, "--clocks", "600,1200", "--repeats", "2")
    assert outcome.returncode == 0
    assert "6 measurements" in outcome.stderr
    assert FakeDriver(tmp_path / "driver").changes() == []
    assert not (tmp_path / "sweep.json").exists()


def _play(folder: Path, *statements: str) -> None:
    """Do something to the driver in a process of its own; ``driver`` and ``lock(MHZ)`` are there."""
    code = """
        import os, pynvml
        from pathlib import Path
        from tests.devices.driver import FakeDriver
        driver = FakeDriver(Path(os.environ["FAKE_NVML_STATE"]))
        driver.load()
        def lock(mhz):
            driver.set(privileged=1)
            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(0)
            pynvml.nvmlDeviceResetGpuLockedClocks(handle)
            if mhz:
                pynvml.nvmlDeviceSetGpuLockedClocks(handle, mhz, mhz)
            driver.set(privileged=0)
    """
    subprocess.run(
        [sys.executable, "-c", "\n".join([textwrap.dedent(code), *statements])],
        env=FakeDriver(folder / "driver").environment(), check=True, timeout=400,
    )  # fmt: skip


@needs_driver
def test_the_plan_says_whether_clocks_may_be_locked_and_sets_nothing(tmp_path: Path) -> None:
    able = has_admin_capability()
    outcome = _sweep(tmp_path, "--clocks", "603", "--limits", "300")
    assert ("may be locked: 119 clocks" in outcome.stderr) == bool(able)
    assert "locked to 600 MHz, limited to 300 W" in outcome.stderr  # snapped, as it would be
    assert ("--lock-gpu-clocks=600,600" in outcome.stdout) != bool(able)
    outcome = _sweep(tmp_path, "--clocks", "600,900", "--wrapper", "sudo site {uuid} {clock_mhz}", "--json")
    document = json.loads(outcome.stdout)
    assert document["clocks_mhz"] == [600, 900]
    assert f"sudo site {UUID} 900" in document["commands"]["clocks with the site's wrapper"]
    for statement, words in (
        ("driver.set(mig=1)", "MIG"),
        ("driver.set(mig=0); driver.processes([1])", "used by"),
    ):
        _play(tmp_path, statement)
        outcome = _sweep(tmp_path, "--clocks", "600")
        assert "clocks: refused: " in outcome.stderr
        assert words in outcome.stderr
        assert outcome.stdout == ""
    assert FakeDriver(tmp_path / "driver").changes() == []


@needs_driver
def test_a_driver_that_refuses_does_so_before_anything_runs_and_every_clock_is_told(tmp_path: Path) -> None:
    _play(tmp_path, "driver.set(privileged=0)")
    kept = tmp_path / "sweep.run" / "kept"
    kept.parent.mkdir()
    kept.touch()
    ran = tmp_path / "ran"
    outcome = _run(
        tmp_path, "clocks", "sweep", "--device", UUID, "--out", str(tmp_path / "sweep.json"), "--clocks",
        "600,900,1200", "--repeats", "2", "--apply", "--force", "--", "touch", str(ran),
    )  # fmt: skip
    assert outcome.returncode == 1
    assert "is not permitted (NVML 4" in outcome.stderr
    assert "now: 345 MHz; 75 W; power limit 700 W" in outcome.stderr
    assert not ran.exists()
    assert kept.exists()
    for mhz in (600, 900, 1200):
        for way in (
            "--lock-gpu-clocks={0},{0}",
            "srun --gpu-freq={0},",
            "min_clock_mhz={0}&max_clock_mhz={0}",
        ):
            assert way.format(mhz) in outcome.stdout
        assert (
            f"--set-outside --clocks {mhz} --out {tmp_path}/sweep-{mhz}.json -- touch {ran}" in outcome.stdout
        )
    changes = FakeDriver(tmp_path / "driver").changes()
    assert [(change.what, change.code) for change in changes] == [("lock", 4)]
    assert list((tmp_path / "leases").glob("*.json")) == []


@needs_driver
def test_clocks_set_outside_are_fitted_together_like_an_own_sweep(tmp_path: Path) -> None:
    files = []
    for mhz in (0, 480, 600, 780, 900, 1350):
        _play(tmp_path, f"lock({mhz})")
        files.append(str(tmp_path / f"{mhz}.json"))
        outcome = _run(
            tmp_path, "clocks", "sweep", "--device", UUID, "--out", files[-1], "--set-outside", "--clocks",
            str(mhz or "none"), "--cool-s", "0", "--repeats", "1", "--window-s", "1.5", "--settle-s", "0.3",
            "--", sys.executable, "-m", "tests.campaign.sweep.iterating",
        )  # fmt: skip
        assert outcome.returncode == 0, outcome.stderr
        (point,) = load_sweep(files[-1]).series[0].points
        assert (point.label, point.requested_sm_clock_mhz) == ("ok", mhz or None)
    pid_of_locks = {change.pid for change in FakeDriver(tmp_path / "driver").changes()}
    assert len(pid_of_locks) == 6  # this test's own: no sweep has set anything
    outcome = _run(tmp_path, "clocks", "fit", *files, "--out", str(tmp_path / "model.json"))
    assert outcome.returncode == 0, outcome.stderr
    (series,) = json.loads((tmp_path / "model.json").read_text())["series"]
    assert len(series["clock_mhz_K"]) == 6
    assert (series["reference"]["how"], series["reference"]["sm_clock_mhz"]) == ("unlocked", 1830)
    # 1830 MHz * 4 ms / 10 ms, as it stands at the top of fake_nvml.c.
    assert series["critical"]["mhz"] == pytest.approx(732, rel=0.03)
    outcome = _run(tmp_path, "clocks", "recommend", str(tmp_path / "model.json"), "--json")
    (advice,) = json.loads(outcome.stdout)["series"]
    assert advice["choice"]["sm_clock_mhz"] == 780  # the lowest that was measured above 732 MHz
    joules = {mhz: _joules(mhz) for mhz in (1830, advice["choice"]["sm_clock_mhz"])}
    saving = 1 - joules[advice["choice"]["sm_clock_mhz"]] / joules[1830]
    assert advice["choice"]["saving"]["value"] == pytest.approx(saving, abs=0.04)
    # What was said and what is: the sampled clock decides.
    outcome = _run(
        tmp_path, "clocks", "sweep", "--device", UUID, "--out", str(tmp_path / "wrong.json"), "--set-outside",
        "--clocks", "600", "--cool-s", "0", "--repeats", "1", "--window-s", "0.5", "--settle-s", "0.1", "--",
        sys.executable, "-m", "tests.campaign.sweep.iterating",
    )  # fmt: skip
    (point,) = load_sweep(tmp_path / "wrong.json").series[0].points
    assert (point.label, point.sm_clock_mhz) == ("clamped", 1350)
    assert "600 said to be set outside" in outcome.stderr


@needs_driver
def test_what_cannot_have_been_set_outside_is_refused(tmp_path: Path) -> None:
    for options, said in (
        ((), "requires what was set"),
        (("--clocks", "600,900"), "2 clocks and 0 limits"),
        (("--clocks", "600", "--apply"), "give one of them"),
        (("--clocks", "none", "--limits", "300"), "700 W are in force"),
    ):
        outcome = _sweep(tmp_path, "--set-outside", *options)
        assert outcome.returncode == 1
        assert said in outcome.stderr
    assert not (tmp_path / "sweep.run").exists()
    assert FakeDriver(tmp_path / "driver").changes() == []


@needs_driver
def test_points_slowed_by_heat_are_labelled_left_out_and_named_in_the_advice(tmp_path: Path) -> None:
    # Above some 1000 MHz the chip gets too hot, within a fraction of a second.
    _play(tmp_path, "driver.set(ambient_c=60, tau_s=0.05, temperature_limit_c=76)")
    outcome = _sweep(
        tmp_path, "--clocks", "480,600,720,900,1695", "--repeats", "1", "--window-s", "1", "--settle-s",
        "0.5", "--apply",
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr
    labels = {
        point.requested_sm_clock_mhz: point.label
        for point in load_sweep(tmp_path / "sweep.json").series[0].points
    }
    assert labels == {None: "thermal", 480: "ok", 600: "ok", 720: "ok", 900: "ok", 1695: "thermal"}
    assert _run(
        tmp_path, "clocks", "fit", str(tmp_path / "sweep.json"), "--out", str(tmp_path / "model.json")
    ).returncode == 0  # fmt: skip
    model = json.loads((tmp_path / "model.json").read_text())["series"][0]
    assert model["points"] == 4
    assert model["reference"]["how"] == "highest clock"
    outcome = _run(tmp_path, "clocks", "recommend", str(tmp_path / "model.json"))
    assert "held the clock at 2 points (unlocked, at the lock of 1695 MHz)" in outcome.stdout
    assert "the advice holds for the other clocks only" in outcome.stdout
    assert "900 MHz of the highest clock measured" in outcome.stdout
    assert "clamped without a word" not in outcome.stdout


@needs_driver
def test_a_sweep_finds_time_energy_clamp_and_cap_and_leaves_nothing_locked(tmp_path: Path) -> None:
    outcome = _sweep(
        tmp_path, "--clocks", "600,1200,1980", "--limits", "250", "--repeats", "1", "--window-s", "2.5",
        "--settle-s", "1", "--apply",
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr
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
    for mhz in (600, 1200):
        point = points[mhz, None]
        assert point["duration_s"] / point["iterations"] == pytest.approx(_seconds(mhz), rel=0.03)
        assert point["energy_mj"] / point["iterations"] == pytest.approx(1000 * _joules(mhz), rel=0.08)
    changes = FakeDriver(tmp_path / "driver").changes()
    assert {change.what for change in changes} == {"lock", "unlock", "limit"}
    assert [change.what for change in changes][-1] in ("unlock", "limit")
    assert [change for change in changes if change.what == "limit"][-1].values[0] == 700_000
    assert list((tmp_path / "leases").glob("*.json")) == []


SHORT = ("--clocks", "600,900,1200", "--repeats", "60", "--window-s", "0.5", "--settle-s", "0.1", "--apply")


@contextlib.contextmanager
def _begun(folder: Path, points: int) -> Iterator[subprocess.Popen[str]]:
    """A sweep that has measured so many points; ended with the block, if it has not ended itself."""
    driver = FakeDriver(folder / "driver")
    process = subprocess.Popen(
        [sys.executable, "-m", "observatory", "clocks", "sweep", "--device", UUID, "--out",
         str(folder / "sweep.json"), "--cool-s", "0", *SHORT, "--", sys.executable, "-m",
         "tests.campaign.sweep.iterating"],
        env={**driver.environment(), "OBSERVATORY_LEASES": str(folder / "leases")},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    journal, deadline = folder / "sweep.points.jsonl", time.monotonic() + 120
    try:
        while not journal.exists() or len(journal.read_text().splitlines()) <= points:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate(timeout=400)


def _unlocked(folder: Path, within_s: float = 20.0) -> bool:
    """Whether the last lock was undone, sooner or later."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        changes = [item.what for item in FakeDriver(folder / "driver").changes() if item.code == 0]
        if "lock" not in changes or "unlock" in changes[len(changes) - 1 - changes[::-1].index("lock") :]:
            return True
        time.sleep(0.1)
    return False


@needs_driver
def test_a_killed_sweep_is_unlocked_and_can_be_recovered_and_no_other_runs_next_to_it(tmp_path: Path) -> None:
    with _begun(tmp_path, 6):
        beside = _run(
            tmp_path, "clocks", "sweep", "--device", UUID, "--out",
            str(tmp_path / "other.json"), *SHORT, "--",
            sys.executable, "-m", "tests.campaign.sweep.iterating",
        )  # fmt: skip
        assert beside.returncode == 1, beside.stderr
        assert "is leased by process" in beside.stderr
        assert not (tmp_path / "other.run").exists()  # nothing is made, nor replaced, before the lease is had
    assert _unlocked(tmp_path)
    again = _sweep(tmp_path, *SHORT)
    assert again.returncode == 1
    assert "observatory clocks recover" in again.stderr
    journal = tmp_path / "sweep.points.jsonl"
    with journal.open("a") as handle:
        handle.write('{"order": 99, "cut o')
    outcome = _run(tmp_path, "clocks", "recover", str(journal), "--out", str(tmp_path / "kept.json"))
    assert outcome.returncode == 0, outcome.stderr
    sweep = load_sweep(tmp_path / "kept.json")
    assert len(sweep.series[0].points) >= 6
    assert any("was killed" in note for note in sweep.notes)
    # The last samples went with the process; windows before have their energy.
    assert any(point.energy_mj for point in sweep.series[0].points)


@needs_driver
def test_a_program_that_rests_ends_with_a_sweep_that_is_killed(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    # A script and what it has started: both are stopped, and neither gets a signal at the end.
    program = f"echo $$ > {pids}; while :; do sleep 0.05; echo; done & echo $! >> {pids}; echo; wait"
    driver = FakeDriver(tmp_path / "driver")
    process = subprocess.Popen(
        [sys.executable, "-c",
         "import sys, time\n"
         "from observatory.campaign.workloads import CommandWorkload, WorkloadFacts\n"
         "CommandWorkload(['sh', '-c', sys.argv[1]], WorkloadFacts(name='x'))\n"
         "print('rests', flush=True); time.sleep(60)", program],
        env=driver.environment(), stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"rests\n"
    started = [int(pid) for pid in pids.read_text().split()]
    assert len(started) == 2
    process.kill()
    process.communicate(timeout=10)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(ProcessId.of(pid) for pid in started):
        time.sleep(0.1)
    assert not any(ProcessId.of(pid) for pid in started)


@needs_driver
def test_a_program_that_ends_at_once_leaves_nothing_in_the_way_of_the_next_try(tmp_path: Path) -> None:
    outcome = _run(
        tmp_path, "clocks", "sweep", "--device", UUID, "--out", str(tmp_path / "sweep.json"), "--clocks",
        "600", "--window-s", "0.5", "--settle-s", "0.1", "--apply", "--", "sh", "-c", "echo; exit 3",
    )  # fmt: skip
    assert outcome.returncode == 1
    assert "ended with exit code 3 before the sweep was over" in outcome.stderr
    assert [path.name for path in tmp_path.glob("sweep*")] == []
    assert _unlocked(tmp_path)


@needs_driver
def test_ctrl_c_and_a_lost_gpu_keep_what_was_measured(tmp_path: Path) -> None:
    for name in ("interrupted", "lost"):
        folder = tmp_path / name
        folder.mkdir()
        with _begun(folder, 3) as process:
            if name == "lost":
                _play(folder, "driver.set(lost=1)")
            else:
                process.send_signal(signal.SIGINT)
            assert process.wait(timeout=400) == (1 if name == "lost" else 130)
            # Where the GPU did not answer, the watchdog goes on trying for a while.
            if name == "lost":
                _play(folder, "driver.set(lost=0)")
            process.communicate(timeout=400)
        sweep = load_sweep(folder / "sweep.json")
        assert len(sweep.series[0].points) >= 3
        assert any("ended early" in note for note in sweep.notes)
        assert not (folder / "sweep.points.jsonl").exists()
        assert _unlocked(folder)


@needs_driver
def test_what_cannot_be_set_is_refused_before_anything_is_measured_or_replaced(tmp_path: Path) -> None:
    for options, said in (
        (("--clocks", "600", "--limits", "5000"), "5000 W is no power limit"),
        (("--clocks", "90000"), "is no SM clock"),
    ):
        outcome = _sweep(tmp_path, *options, "--apply")
        assert outcome.returncode == 1
        assert said in outcome.stderr
        assert not (tmp_path / "sweep.run").exists()
    assert FakeDriver(tmp_path / "driver").changes() == []


def test_two_sweeps_do_not_write_one_result(tmp_path: Path) -> None:
    path = tmp_path / "a.points.jsonl"
    with claimed(path):
        with pytest.raises(ClockError, match="is being written by a sweep that runs"), claimed(path):
            pass
        assert path.exists()
    assert not path.exists()  # nothing was measured
    with claimed(path):
        path.write_text("head\npoint\n")
    assert path.exists()
    with pytest.raises(ClockError, match="cannot be written"), claimed(tmp_path / "nowhere" / "b"):
        pass


@pytest.mark.parametrize("content", ["", "\n", "{}\n", "\xff\n", '{"device": {"kind": "x"}}\n{"order": 1}\n'])
def test_what_is_no_journal_is_one_clear_sentence(content: str, tmp_path: Path) -> None:
    path = tmp_path / "a.points.jsonl"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ClockError, match=r"is no journal|no finished window"):
        recover_sweep(path, tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_the_order_is_random_but_the_same_for_a_seed_and_holds_every_setting() -> None:
    job = SweepJob(device_uuid=UUID, clocks_mhz=(600, 900), limits_mw=(300_000,), repeats=3)
    order = plan_settings(job, 2)
    assert order == plan_settings(job, 2)
    assert len(order) == len(set(order)) == 4 * 3 * 2
    # A driver that refuses does so before anything has run.
    assert all(plan_settings(replace(job, seed=seed), 2)[0][2] != Setting() for seed in range(20))
    # A lock replaces one that somebody had left; no unlocked point runs at it.
    assert all(plan_settings(replace(job, seed=seed), 2)[0][2].sm_clock_mhz for seed in range(20))
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

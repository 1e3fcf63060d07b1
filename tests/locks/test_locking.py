"""Locks leave nothing behind: owners killed at many points, refused, late, or without their watchdog.

``python -m benchmarks.kill_points`` kills owner, watchdog and ``clocks unlock`` at every point.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from tests.devices.driver import FakeDriver, why_not

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
]

UUID = "GPU-fa4e0000-0000-4000-8000-000000000000"
#: Lines at which an owner is killed in the suite; benchmarks/kill_points.py takes all of them.
POINTS = 14


class Host:
    """A machine with one GPU and a folder of leases."""

    def __init__(self, folder: Path) -> None:
        self.driver = FakeDriver(folder / "driver")
        self.leases = folder / "leases"
        self.environment = {**self.driver.environment(), "OBSERVATORY_LEASES": str(self.leases)}

    def run(self, *argv: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, *argv],
            check=False,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert code is None or done.returncode == code, done.stderr
        return done

    def script(self, body: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        head = "import os, signal, sys, time\nfrom observatory.locks.locking import ClockLease\n"
        head += f"from observatory.errors import *\nUUID = {UUID!r}\n"
        return self.run("-c", head + textwrap.dedent(body), code=code)

    def state(self) -> dict[str, float]:
        """Lock and limit as the driver holds them; asked in a process that dies with the answer."""
        outcome = self.run(
            "-c",
            "import json, os; from pathlib import Path; from tests.devices.driver import FakeDriver\n"
            "d = FakeDriver(Path(os.environ['FAKE_NVML_STATE']))\n"
            "print(json.dumps({'lock': d.get('lock_max'), 'limit': d.get('limit_w')}))",
        )
        return dict(json.loads(outcome.stdout))

    def files(self) -> list[str]:
        return sorted(path.name for path in self.leases.glob("gpu-*.json"))

    def settles(self, within_s: float = 30.0) -> dict[str, float]:
        """The state once no lease that changed anything is left, or the time is up."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            touched = [
                path for path in self.leases.glob("gpu-*.json") if json.loads(path.read_text())["touched"]
            ]
            if not touched:
                break
            time.sleep(0.1)
        return self.state()


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_an_owner_killed_at_any_point_leaves_nothing_locked(host: Host) -> None:
    host.leases.mkdir(mode=0o700)  # or the first run has more points than the others
    lines = int(host.run("-m", "tests.locks.lock_owner", UUID, "0").stdout)
    assert host.state() == {"lock": 0.0, "limit": 700.0}
    assert lines > 200
    for point in range(POINTS):
        kill_at = 1 + point * (lines - 1) // (POINTS - 1)
        done = host.run("-m", "tests.locks.lock_owner", UUID, str(kill_at), code=None)
        assert done.returncode == -signal.SIGKILL, (kill_at, done.stderr)
        assert host.settles() == {"lock": 0.0, "limit": 700.0}, f"killed at line {kill_at} of {lines}"
    host.run("-m", "observatory", "clocks", "unlock")
    assert host.files() == []


def test_the_watchdog_loads_no_tables_and_so_watches_soon(host: Host) -> None:
    outcome = host.run("-c", "import observatory.locks.watchdog, sys; print('pandas' in sys.modules)")
    assert outcome.stdout.strip() == "False"


def test_a_lease_that_expires_is_undone_under_a_living_owner(host: Host) -> None:
    outcome = host.script("""
        held = ClockLease.acquire(UUID, duration_s=4)
        held.lock(780)
        time.sleep(6)
        try:
            held.lock(900)
        except LockRefusedError as error:
            print(error)
        held.release()
    """)
    assert "is over, and what it changed is undone" in outcome.stdout
    assert host.state()["lock"] == 0.0


def test_without_permission_nothing_is_changed_and_other_ways_are_named(host: Host) -> None:
    outcome = host.script("""
        from pathlib import Path
        from tests.devices.driver import FakeDriver
        FakeDriver(Path(os.environ["FAKE_NVML_STATE"])).set(privileged=0)
        try:
            with ClockLease.acquire(UUID, duration_s=60) as held:
                held.lock(780)
        except LockRefusedError as error:
            print(error)
    """)
    assert "nvidia-smi" in outcome.stdout
    assert "srun --gpu-freq" in outcome.stdout
    changes = host.driver.changes()
    assert [(change.what, change.code) for change in changes] == [("lock", 4)]
    assert host.files() == []


@pytest.mark.parametrize(
    ("setting", "words"),
    [("driver.set(mig=1)", "MIG"), ("driver.processes([1])", "used by processes other than process")],
)
def test_partitioned_and_shared_gpus_are_refused_before_anything_is_set(
    host: Host, setting: str, words: str
) -> None:
    outcome = host.script(f"""
        from pathlib import Path
        from tests.devices.driver import FakeDriver
        driver = FakeDriver(Path(os.environ["FAKE_NVML_STATE"]))
        {setting}
        try:
            ClockLease.acquire(UUID, duration_s=60)
        except LockRefusedError as error:
            print(error)
    """)
    assert words in outcome.stdout
    assert host.driver.changes() == []
    assert host.files() == []


def test_a_second_owner_is_refused_while_the_first_lives(host: Host) -> None:
    outcome = host.script("""
        import subprocess
        with ClockLease.acquire(UUID, duration_s=60) as held:
            held.lock(780)
            code = "from observatory.locks.locking import ClockLease as L; L.acquire(%r, duration_s=9)" % UUID
            print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr)
    """)
    assert "is leased by process" in outcome.stdout
    assert host.state()["lock"] == 0.0


def test_a_dead_watchdog_stops_further_changes_and_the_owner_undoes(host: Host) -> None:
    outcome = host.script("""
        with ClockLease.acquire(UUID, duration_s=60) as held:
            held.lock(780)
            held._watchdog.kill()
            held._watchdog.wait()
            try:
                held.lock(900)
            except LockRefusedError as error:
                print(error)
    """)
    assert "the watchdog that would undo the lock has died" in outcome.stdout
    assert host.state()["lock"] == 0.0
    assert host.files() == []


def test_when_owner_and_watchdog_are_killed_at_once_unlock_undoes(host: Host) -> None:
    done = host.script(
        """
        held = ClockLease.acquire(UUID, duration_s=60)
        held.lock(780)
        held.limit(400_000)
        held._watchdog.kill()
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        code=None,
    )
    assert done.returncode == -signal.SIGKILL
    assert host.state() == {"lock": 780.0, "limit": 400.0}
    shown = json.loads(host.run("-m", "observatory", "clocks", "status", "--json").stdout)
    assert "is gone" in shown["leases"][0]["state"]
    outcome = json.loads(host.run("-m", "observatory", "clocks", "unlock", "--json").stdout)
    assert [lease["undone"] for lease in outcome["leases"]] == [True]
    assert host.state() == {"lock": 0.0, "limit": 700.0}


def test_unlock_touches_no_lock_that_is_not_ours(host: Host) -> None:
    host.script("""
        import pynvml
        pynvml.nvmlInit()
        pynvml.nvmlDeviceSetGpuLockedClocks(pynvml.nvmlDeviceGetHandleByIndex(0), 900, 900)
    """)
    outcome = host.run("-m", "observatory", "clocks", "unlock")
    assert "nothing of ours is locked" in outcome.stderr
    assert host.state()["lock"] == 900.0


def test_a_lease_of_limits_alone_takes_no_lock_away(host: Host) -> None:
    host.script("""
        import pynvml
        pynvml.nvmlInit()
        pynvml.nvmlDeviceSetGpuLockedClocks(pynvml.nvmlDeviceGetHandleByIndex(0), 900, 900)
        with ClockLease.acquire(UUID, duration_s=60) as held:
            held.limit(400_000)
            held.unlock()
            held.restore_limit()
            held.limit(500_000)
    """)
    assert host.state() == {"lock": 900.0, "limit": 700.0}
    host.script(
        """
        held = ClockLease.acquire(UUID, duration_s=60)
        held.limit(400_000)
        held._watchdog.kill()
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        code=None,
    )
    host.run("-m", "observatory", "clocks", "unlock")
    assert host.state() == {"lock": 900.0, "limit": 700.0}


def test_unlock_fails_when_it_cannot_undo_and_not_for_an_owner_that_lives(host: Host) -> None:
    host.run("-m", "tests.locks.lock_owner", UUID, "middle", "everybody", code=None)
    play = "from pathlib import Path; from tests.devices.driver import FakeDriver; import os;"
    play += "FakeDriver(Path(os.environ['FAKE_NVML_STATE']))."
    host.run("-c", play + "set(privileged=0)")
    outcome = host.run("-m", "observatory", "clocks", "unlock", code=1)
    assert "not permitted" in " ".join(outcome.stdout.split())
    assert host.state()["lock"] == 1200.0
    other = "GPU-fa4e0000-0000-4000-8000-000000000001"
    outcome = host.run("-m", "observatory", "clocks", "unlock", "--device", other)
    assert f"no lease of {other}" in " ".join(outcome.stderr.split())
    host.run("-c", play + "set(privileged=1)")
    outcome = host.script("""
        import subprocess
        with ClockLease.acquire(UUID, duration_s=60) as held:
            held.lock(780)
            code = [sys.executable, "-m", "observatory", "clocks", "unlock"]
            print(subprocess.run(code, capture_output=True).returncode)
    """)
    assert outcome.stdout.strip() == "0"
    assert host.state() == {"lock": 0.0, "limit": 700.0}


@pytest.mark.parametrize("content", [b"x" * 70_000, None])
def test_a_lease_that_is_too_large_or_of_another_gpu_is_damaged_and_stays(
    host: Host, content: bytes | None
) -> None:
    host.run("-m", "tests.locks.lock_owner", UUID, "middle", "everybody", code=None)
    path = host.leases / f"{UUID.lower()}.json"
    damaged = path if content else path.with_name("gpu-bb.json")
    damaged.write_bytes(content or path.read_bytes())
    if content is None:
        path.unlink()
    outcome = json.loads(host.run("-m", "observatory", "clocks", "unlock", "--json", code=1).stdout)
    assert [lease["undone"] for lease in outcome["leases"]] == [False]
    assert "cannot be read" in outcome["leases"][0]["reason"]
    assert damaged.exists()
    assert host.state()["lock"] == 1200.0


def test_a_damaged_lease_is_one_sentence_and_exit_code_1(host: Host) -> None:
    host.leases.mkdir(mode=0o700)
    (host.leases / f"{UUID.lower()}.json").write_text('{"lease_id": "')
    outcome = host.run("-m", "observatory", "clocks", "unlock", code=1)
    assert "cannot be read" in outcome.stdout
    assert host.driver.changes() == []


def test_a_folder_that_others_may_write_to_is_not_trusted(host: Host) -> None:
    host.leases.mkdir()
    host.leases.chmod(0o777)
    outcome = host.run("-m", "observatory", "clocks", "unlock", code=1)
    assert "is not ours alone" in outcome.stderr


def test_the_driver_of_a_lost_gpu_is_left_alone(host: Host) -> None:
    outcome = host.script(
        """
        from pathlib import Path
        from tests.devices.driver import FakeDriver
        FakeDriver(Path(os.environ["FAKE_NVML_STATE"])).set(lost=1)
        ClockLease.acquire(UUID, duration_s=60)
        """,
        code=1,
    )
    assert "Error" in outcome.stderr
    assert os.path.exists(host.driver.state)
    assert host.driver.changes() == []


def test_a_watchdog_that_cannot_undo_holds_no_terminal_and_keeps_a_log(host: Host) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-m", "tests.locks.lock_owner", UUID, "middle"],
        env=host.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    owner.communicate(timeout=400)  # the pipe ends with its owner, who is killed while the clock is locked
    assert owner.returncode == -signal.SIGKILL
    play = "from pathlib import Path; from tests.devices.driver import FakeDriver; import os;"
    play += "FakeDriver(Path(os.environ['FAKE_NVML_STATE']))."
    host.settles()
    assert "is gone: undid its changes" in host.run("-m", "observatory", "clocks", "status").stderr

    host.run("-c", play + "fail('nvmlDeviceResetGpuLockedClocks', 4)")
    begun = time.monotonic()
    owner = subprocess.Popen(
        [sys.executable, "-m", "tests.locks.lock_owner", UUID, "middle"],
        env=host.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    owner.communicate(timeout=400)
    assert time.monotonic() - begun < 30
    deadline = time.monotonic() + 20
    status: dict[str, Any] = {}
    while time.monotonic() < deadline and "undoing fails" not in str(status):
        time.sleep(0.2)
        status = json.loads(host.run("-m", "observatory", "clocks", "status", "--json").stdout)
    assert "undoing fails, tried again" in next(iter(status["watchdogs"].values()))
    assert "NVML 4" in str(status["watchdogs"])
    assert status["leases"][0]["watchdog"] == "watches"
    host.run("-c", play + "fail('nvmlDeviceResetGpuLockedClocks', 0)")
    assert host.settles() == {"lock": 0.0, "limit": 700.0}

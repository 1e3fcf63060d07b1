"""Owners and watchdogs that were stopped while their lease ended and another process took the GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.devices.driver import why_not
from tests.locks.owners import CLEAN, Owner, eventually, owners
from tests.locks.test_locking import UUID, Host
from tests.paths import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
]

SECOND = {"lock": 1200.0, "limit": 500.0}
CALLS = ("held.unlock()", "held.restore_limit()", "held.lock(900)", "held.limit(450_000)")

#: Stops the process in its next call that locks a clock, just before the driver gets it.
STOP_IN_DRIVER = """
import pynvml
real = pynvml.nvmlDeviceSetGpuLockedClocks
def slow(*arguments):
    pynvml.nvmlDeviceSetGpuLockedClocks = real
    os.kill(os.getpid(), signal.SIGSTOP)
    return real(*arguments)
pynvml.nvmlDeviceSetGpuLockedClocks = slow
"""


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def hold_second(owner: Owner) -> None:
    owner.acquire()
    owner.ask("held.lock(1200); held.limit(500_000)")


def test_an_owner_continued_after_its_lease_expired_undoes_nothing_of_the_next(host: Host) -> None:
    with owners(host, 2) as (a, b):
        a.hold_short("held.lock(780)", "held.limit(400_000)")
        a.stop()
        assert eventually(lambda: host.files() == [])
        assert host.state() == CLEAN
        hold_second(b)
        a.begin(CALLS[0])
        a.go_on()
        answers = [a.answer(), *(a.try_(call) for call in CALLS[1:])]
        assert host.state() == SECOND
        for error, text in answers:
            assert error == "LockRefusedError"
            assert "is over" in text
        a.ask("held.release(); held.release()")
        assert host.state() == SECOND
        b.ask("held.release()")
        assert host.state() == CLEAN
    assert not list(host.leases.glob("*.over"))


DIRECT = (
    "held.control.unlock()",
    "held.control.lock_sm_clock(900)",
    "held.control.set_power_limit_mw(450_000)",
    "held.control.restore_power_limit_mw(450_000)",
)


def test_nothing_is_changed_past_the_lease_of_an_owner(host: Host) -> None:
    """Neither while it holds, nor when it has expired and another owner has the GPU."""
    with owners(host, 2) as (a, b):
        a.hold_short("held.lock(780)", "held.limit(400_000)", f"for call in {DIRECT!r}:\n  refused(call)")
        a.stop()
        assert eventually(lambda: host.files() == [])
        assert host.state() == CLEAN
        hold_second(b)
        a.go_on()
        for call in DIRECT:
            error, text = a.try_(call)
            assert (error, "outside of the lease" in text) == ("LockRefusedError", True)
        assert host.state() == SECOND
        b.ask("held.release()")
        assert host.state() == CLEAN


def test_of_two_owners_in_one_process_the_first_undoes_nothing_of_the_second(host: Host) -> None:
    with owners(host, 1) as (a,):
        a.acquire()
        a.ask("held.lock(780); held.limit(400_000); first = held")
        host.run("-m", "observatory", "clocks", "unlock", "--force")
        hold_second(a)
        for call in CALLS:
            assert a.try_(call.replace("held", "first"))[0] == "LockRefusedError"
        a.ask("first.release()")
        assert host.state() == SECOND
        a.ask("held.release()")
    assert host.state() == CLEAN


def test_an_owner_stopped_in_the_call_of_the_driver_refuses_others_in_time_and_undoes(host: Host) -> None:
    with owners(host, 2) as (a, b):
        a.ask(STOP_IN_DRIVER)
        a.hold_short("held.limit(400_000)")
        a.begin("held.lock(780)")
        a.wait_stopped()
        lease = json.loads(next(host.leases.glob("*.json")).read_text())
        assert eventually(lambda: time.monotonic_ns() > lease["expires_ns"])
        begun = time.monotonic()
        error, text = b.try_("held = ClockLease.acquire(UUID, duration_s=60)")
        assert error == "LeaseBusyError"
        assert f"process {a.pid} is changing" in text
        outcome = json.loads(host.run("-m", "observatory", "clocks", "unlock", "--json", code=1).stdout)
        assert f"process {a.pid} is changing" in outcome["leases"][0]["reason"]
        assert time.monotonic() - begun < 100
        status = json.loads(host.run("-m", "observatory", "clocks", "status", "--json").stdout)
        assert f"process {a.pid} is changing" in status["watchdogs"][UUID.lower()]
        a.go_on()
        error, text = a.answer()
        assert error == "LockRefusedError", text
        assert "is over" in text
        assert eventually(lambda: host.files() == [])
        assert host.state() == CLEAN
        hold_second(b)
        assert host.state() == SECOND
        b.ask("held.release()")


def test_an_owner_killed_while_it_is_stopped_in_a_change_is_undone(host: Host) -> None:
    with owners(host, 1) as (a,):
        a.acquire()
        a.ask("held.lock(780)")
        a.ask(STOP_IN_DRIVER)
        a.begin("held.lock(900)")
        a.wait_stopped()
        a.kill()
        assert eventually(lambda: host.files() == [])
    assert host.state() == CLEAN


def test_an_owner_stopped_while_it_acquires_does_not_take_the_next_ones_lease_for_its_own(host: Host) -> None:
    stopping = """
real = locking._start_watchdog
def slow(*arguments):
    found = real(*arguments)
    os.kill(os.getpid(), signal.SIGSTOP)
    return found
locking._start_watchdog = slow
"""
    with owners(host, 2) as (a, b):
        a.ask(stopping)
        a.begin("held = ClockLease.acquire(UUID, duration_s=1)\nheld.unlock()")
        a.wait_stopped()
        assert eventually(lambda: host.files() == [])
        hold_second(b)
        a.go_on()
        error, text = a.answer()
        assert host.state() == SECOND
        assert error == "LockRefusedError", text
        b.ask("held.release()")
    assert host.state() == CLEAN


def test_a_watchdog_continued_after_its_lease_was_taken_over_undoes_nothing(host: Host) -> None:
    with owners(host, 2) as (a, b):
        watchdog = a.acquire()
        a.ask("held.lock(780)")
        os.kill(watchdog, signal.SIGSTOP)
        a.kill()
        hold_second(b)
        os.kill(watchdog, signal.SIGCONT)
        assert eventually(lambda: not _runs(watchdog))
        assert host.state() == SECOND
        b.ask("held.release()")
    assert host.state() == CLEAN
    assert not list(host.leases.glob("*.over"))


def test_a_release_ends_a_watchdog_that_is_stopped(host: Host) -> None:
    with owners(host, 1) as (a,):
        watchdog = a.acquire()
        a.ask("held.lock(780)")
        os.kill(watchdog, signal.SIGSTOP)
        a.ask("held.release()")
        assert not _runs(watchdog)
    assert host.state() == CLEAN


@pytest.mark.parametrize("way", ["held.release()", "held.__exit__(None, None, None)", *CALLS])
def test_a_fork_changes_nothing_of_its_parents_lease(host: Host, way: str) -> None:
    fork = f"""
child = os.fork()
if child == 0:
    try:
        {way}
    except LockRefusedError as error:
        os._exit(3 if "this process" in str(error) else 4)
    os._exit(0)
outcome = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""
    with owners(host, 1) as (a,):
        a.acquire()
        a.ask("held.lock(780); held.limit(400_000)")
        assert a.ask(fork) == ("3" if way in CALLS else "0")
        assert host.state() == {"lock": 780.0, "limit": 400.0}
        a.ask("held.lock(900); held.release()")
    assert host.state() == CLEAN


def test_a_fork_does_not_keep_its_parents_guard(host: Host) -> None:
    """As a loader's worker that is forked while another thread changes a clock."""
    with owners(host, 2) as (a, b):
        a.acquire()
        fork = "pid = os.fork()\nif not pid: time.sleep(300); os._exit(0)\noutcome = pid"
        child = int(a.ask(f"guard = locking.guarded(held._path); guard.__enter__()\n{fork}"))
        try:
            a.kill()
            assert eventually(lambda: b.try_("held = ClockLease.acquire(UUID, duration_s=60)")[0] is None, 20)
        finally:
            os.kill(child, signal.SIGKILL)


def test_threads_of_one_owner_take_turns(host: Host) -> None:
    turns = """
problems = []
def turn(mhz):
    try:
        for _ in range(10):
            held.lock(mhz); held.limit(400_000); held.restore_limit(); held.unlock()
    except Exception as error:
        problems.append(error)
threads = [threading.Thread(target=turn, args=(mhz,)) for mhz in (600, 900, 1200)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
outcome = problems
"""
    with owners(host, 1) as (a,):
        a.acquire()
        assert a.ask(turns) == "[]"
        a.ask("held.release()")
    assert host.state() == CLEAN


def test_a_lease_whose_file_vanished_is_undone_and_not_taken_for_given_back(host: Host) -> None:
    with owners(host, 1) as (a,):
        a.acquire()
        a.ask("held.lock(780); held.limit(400_000)")
        path = next(host.leases.glob("*.json"))
        path.unlink()
        assert eventually(lambda: host.state() == CLEAN)
        for call in CALLS:
            assert a.try_(call)[0] == "LockRefusedError", call
        a.ask("held.release()")
        assert "has vanished without being given back: undid" in host.run(
            "-m", "observatory", "clocks", "status"
        ).stderr.replace("\n", " ")
    assert host.state() == CLEAN


def test_a_lease_whose_file_vanished_is_undone_by_its_owner_when_the_watchdog_is_dead(host: Host) -> None:
    with owners(host, 1) as (a,):
        watchdog = a.acquire()
        a.ask("held.lock(780); held.limit(400_000)")
        os.kill(watchdog, signal.SIGKILL)
        next(host.leases.glob("*.json")).unlink()
        error, text = a.try_("held.unlock()")
        assert (error, "has vanished" in text) == ("LockRefusedError", True)
        a.ask("held.release()")
    assert host.state() == CLEAN


@pytest.mark.parametrize("way", ["file", "folder", "damage"])
def test_the_watchdog_knows_what_to_undo_when_file_and_owner_are_gone(host: Host, way: str) -> None:
    with owners(host, 1) as (a,):
        watchdog = a.acquire()
        os.kill(watchdog, signal.SIGSTOP)
        a.ask("held.lock(780); held.limit(400_000)")
        for path in list(host.leases.iterdir()) if way == "folder" else host.leases.glob("*.json"):
            path.write_text("{") if way == "damage" else path.unlink()
        if way == "folder":
            host.leases.rmdir()
        a.kill()
        os.kill(watchdog, signal.SIGCONT)
        assert eventually(lambda: host.state() == CLEAN)


def test_a_lease_whose_place_another_took_is_undone_after_that_one(host: Host) -> None:
    with owners(host, 2) as (a, b):
        watchdog = a.acquire()
        a.ask("held.lock(780); held.limit(400_000)")
        os.kill(watchdog, signal.SIGSTOP)
        next(host.leases.glob("*.json")).unlink()
        hold_second(b)
        error, text = a.try_("held.release()")
        assert error == "ClockError"
        assert "another has its place" in text
        os.kill(watchdog, signal.SIGCONT)
        log = host.leases / f"{UUID.lower()}.log"
        assert eventually(lambda: "another lease of the GPU is there" in log.read_text())
        assert host.state() == SECOND
        b.ask("held.release()")
        assert eventually(lambda: host.state() == CLEAN)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_points_at_which_an_owner_or_a_watchdog_is_stopped_disturb_no_second_owner() -> None:
    """A few of the points that ``python -m benchmarks.kill_points`` takes all of."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kill_points", "--jobs", "1", "--every", "97", "--only", "stopped"],
        check=False, capture_output=True, text=True, timeout=600, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if "stopped" in line]
    assert len(rows) == 3
    leased = sum(int(row[4]) for row in rows)
    assert leased >= 3

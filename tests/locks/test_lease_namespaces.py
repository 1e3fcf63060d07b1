"""Leases of other PID and time namespaces, as of containers that share the folder of leases."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.devices.driver import why_not
from tests.locks.owners import CLEAN, Owner, eventually, owners
from tests.locks.test_locking import UUID, Host

CONTAINER = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
HELD = {"lock": 780.0, "limit": 400.0}


def works(prefix: list[str]) -> bool:
    try:
        return subprocess.run([*prefix, "true"], check=False, capture_output=True).returncode == 0
    except OSError:
        return False


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
    pytest.mark.skipif(not works(CONTAINER), reason="namespaces cannot be made here"),
]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def clocks(host: Host, *argv: str) -> dict[str, Any]:
    return dict(json.loads(host.run("-m", "observatory", "clocks", *argv, "--json").stdout))


def left_alone(host: Host, outside: Owner) -> None:
    """Status, unlock and acquire from outside leave the lease as it is, and say why."""
    (lease,) = clocks(host, "status")["leases"]
    assert "another PID namespace, judged by its expiry" in lease["state"]
    assert 0 < lease["expires_in_s"] <= 60
    (lease,) = clocks(host, "unlock")["leases"]
    assert not lease["undone"]
    assert "another PID namespace, judged by its expiry" in lease["reason"]
    error, text = outside.try_("ClockLease.acquire(UUID, duration_s=60)")
    assert error == "LockRefusedError"
    assert "of another PID namespace" in text
    assert outside.try_("locking.refuse_leased(UUID)")[0] == "LockRefusedError"
    assert host.state() == HELD


def test_a_lease_of_a_container_is_left_alone_while_it_holds(host: Host) -> None:
    with owners(host, 1, CONTAINER) as (inside,), owners(host, 1) as (outside,):
        inside.acquire()
        inside.ask("held.lock(780); held.limit(400_000)")
        left_alone(host, outside)
        inside.ask("held.release()")
        assert host.state() == CLEAN
        outside.acquire()
        outside.ask("held.lock(780); held.limit(400_000)")
        error, text = inside.try_("ClockLease.acquire(UUID, duration_s=60)")
        assert error == "LockRefusedError"
        assert "of another PID namespace" in text
        outside.ask("held.release()")


def test_a_lease_of_a_container_that_ended_holds_until_it_expires_or_is_undone_by_force(host: Host) -> None:
    with owners(host, 1, CONTAINER) as (inside,), owners(host, 1) as (outside,):
        inside.acquire()
        inside.ask("held.lock(780); held.limit(400_000)")
        inside.kill()  # the container, its watchdog included
        left_alone(host, outside)
        assert clocks(host, "status")["leases"][0]["watchdog"] == "not known"
        assert clocks(host, "unlock", "--force")["leases"][0]["undone"]
        assert host.state() == CLEAN
    with owners(host, 1, CONTAINER) as (inside,):
        inside.hold_short("held.lock(780)", "held.limit(400_000)")
        inside.kill()
    assert eventually(lambda: bool(clocks(host, "unlock")["leases"][0]["undone"]))
    assert host.state() == CLEAN


def test_a_watchdog_in_a_container_undoes_for_its_owner(host: Host) -> None:
    with owners(host, 1, CONTAINER) as (inside,):
        inside.ask("""
import subprocess
code = f"import os; from observatory.locks.locking import ClockLease; "
code += f"ClockLease.acquire({UUID!r}, duration_s=60).lock(780); os.kill(os.getpid(), 9)"
subprocess.run([sys.executable, "-c", code])
""")
        assert eventually(lambda: host.files() == [])
        assert host.state() == CLEAN
        assert [change.what for change in host.driver.changes()] == ["lock", "unlock"]


def test_a_lease_without_a_namespace_is_left_until_it_expires(host: Host) -> None:
    with owners(host, 1) as (outside,):
        host.run("-m", "tests.locks.lock_owner", UUID, "middle", "everybody", code=None)
        path = next(host.leases.glob("*.json"))
        lease = json.loads(path.read_text())
        for process in (lease["owner"], lease["watchdog"]):
            del process["namespace"]
        path.write_text(json.dumps(lease))
        assert outside.try_("ClockLease.acquire(UUID, duration_s=60)")[0] == "LockRefusedError"
        assert not clocks(host, "unlock")["leases"][0]["undone"]
        path.write_text(json.dumps(lease | {"expires_ns": 1}))
        outside.acquire()
        assert host.state() == CLEAN
        outside.ask("held.release()")


@pytest.mark.parametrize("offset_s", [100_000, -1])
def test_expiry_is_the_same_moment_in_every_time_namespace(host: Host, offset_s: int) -> None:
    prefix = ["unshare", "--time", "--monotonic", str(offset_s), "--boottime", str(offset_s), "--fork"]
    if not works(prefix):
        pytest.skip("time namespaces cannot be made here")
    with owners(host, 1, [*prefix, "--kill-child"]) as (inside,), owners(host, 1) as (outside,):
        inside.acquire()
        inside.ask("held.lock(780); held.limit(400_000)")
        left_alone(host, outside)
        inside.ask("held.release()")
        inside.hold_short("held.lock(780)", "held.limit(400_000)")
        assert eventually(lambda: host.files() == [])
        assert host.state() == CLEAN


def test_without_a_proc_of_its_own_a_container_gets_no_lease(host: Host) -> None:
    with owners(host, 1, ["unshare", "--pid", "--fork", "--kill-child"]) as (inside,):
        error, text = inside.try_("ClockLease.acquire(UUID, duration_s=60)")
        assert error == "ClockError"
        assert "/proc of this process's own PID namespace" in text
    assert host.files() == []
    assert host.driver.changes() == []

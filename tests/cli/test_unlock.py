"""``observatory clocks unlock``: what its exit code says."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from observatory.cli import main
from observatory.locks import locking
from observatory.locks.lease import create_lease, lease_path, new_lease
from tests.locks.test_locking import UUID


def test_a_lease_that_expires_after_it_was_looked_at_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "leases"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("OBSERVATORY_LEASES", str(folder))
    lease = new_lease(UUID, duration_s=60)
    create_lease(lease_path(folder, UUID), lease)
    looked_at = locking.undo_leases

    def slow(*arguments: object, **options: object) -> list[locking.UndoneLease]:
        found = looked_at(*arguments, **options)  # type: ignore[arg-type]
        now_ns = time.monotonic_ns
        monkeypatch.setattr(time, "monotonic_ns", lambda: now_ns() + 61 * 10**9)
        assert lease.problem is not None
        return found

    monkeypatch.setattr(locking, "undo_leases", slow)
    assert main(["clocks", "unlock", "--json"]) == 0
    (left,) = json.loads(capsys.readouterr().out)["leases"]
    assert not left["undone"]

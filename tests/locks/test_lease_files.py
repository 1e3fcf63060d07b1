"""Folders and files of leases that others could replace, or that are not what they seem."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from observatory.errors import ClockError
from observatory.locks.lease_files import open_own, trusted_folder
from tests.devices.driver import why_not
from tests.locks.owners import CLEAN, owners
from tests.locks.test_locking import UUID, Host

needs_driver = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to other users")

NOBODY = 65534
NAME = UUID.lower()


def owned(path: Path, user: int = NOBODY, mode: int = 0o755) -> Path:
    path.mkdir(exist_ok=True)
    path.chmod(mode)
    os.chown(path, user, user)
    return path


def linked(path: Path, target: Path | str, user: int = 0) -> Path:
    path.symlink_to(target)
    os.chown(path, user, user, follow_symlinks=False)
    return path


#: A folder of leases below tmp_path that must be refused.
REFUSED: dict[str, Callable[[Path], Path]] = {
    "parent of another user": lambda tmp: owned(tmp / "a") / "leases",
    "grandparent of another user": lambda tmp: owned(owned(tmp / "a") / "b", 0) / "leases",
    "own folder in a parent of another user": lambda tmp: owned(owned(tmp / "a") / "leases", 0, 0o700),
    "parent that a group may write": lambda tmp: owned(tmp / "a", 0, 0o775) / "leases",
    "parent that all may write": lambda tmp: owned(tmp / "a", 0, 0o777) / "leases",
    "sticky parent of another user": lambda tmp: owned(tmp / "a", NOBODY, 0o1777) / "leases",
    "folder of another user in a sticky one": lambda tmp: owned(owned(tmp / "a", 0, 0o1777) / "leases"),
    "sticky folder itself": lambda tmp: owned(tmp / "a", 0, 0o1777),
    "folder that a group may write": lambda tmp: owned(tmp / "a", 0, 0o770),
    "link of another user": lambda tmp: linked(tmp / "a", owned(tmp / "b", 0), NOBODY) / "leases",
    "link to a folder of another user": lambda tmp: linked(tmp / "a", owned(tmp / "b")) / "leases",
    "link through a folder of another user": lambda tmp: (
        linked(tmp / "a", owned(owned(tmp / "b") / "c", 0)) / "leases"
    ),
    "link to a link of another user": lambda tmp: (
        linked(tmp / "a", linked(tmp / "b", owned(tmp / "c", 0), NOBODY)) / "leases"
    ),
    "up from a folder of another user": lambda tmp: owned(tmp / "a") / ".." / "leases",
    "link in a sticky folder, of another user": lambda tmp: (
        linked(owned(tmp / "a", 0, 0o1777) / "b", owned(tmp / "c", 0), NOBODY) / "leases"
    ),
    "the last part is a link of another user": lambda tmp: linked(tmp / "a", owned(tmp / "b", 0), NOBODY),
}  # fmt: skip


@needs_root
@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_others_can_replace_or_write_to_is_refused(case: str, tmp_path: Path) -> None:
    folder = REFUSED[case](tmp_path)
    with pytest.raises(ClockError, match="is not ours alone"):
        trusted_folder(folder)
    assert not folder.exists() or case not in ("parent of another user", "parent that all may write")


@needs_root
def test_links_of_ours_are_followed_to_what_they_name(tmp_path: Path) -> None:
    tmp_path = tmp_path.resolve()
    linked(tmp_path / "a", "b/../c")
    linked(tmp_path / "d", tmp_path / "a")
    for name in ("b", "c"):
        owned(tmp_path / name, 0)
    made = trusted_folder(tmp_path / "d" / "x" / "leases")
    assert made == tmp_path / "c" / "x" / "leases"
    assert made.stat().st_mode & 0o777 == 0o700
    sticky = owned(tmp_path / "e", 0, 0o1777)
    assert trusted_folder(sticky / "leases") == sticky / "leases"


@pytest.mark.parametrize("case", ["loop", "file", "file below"])
def test_what_is_no_folder_is_one_sentence(case: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    folder = tmp_path / case if case != "file below" else tmp_path / "file" / "leases"
    with pytest.raises(ClockError, match="leases cannot be kept in"):
        trusted_folder(folder)


@needs_root
@needs_driver
def test_a_lease_below_another_users_folder_is_refused_before_the_driver_is_asked(tmp_path: Path) -> None:
    host = Host(tmp_path)
    owned(tmp_path / "home")
    host.leases = tmp_path / "home" / "leases"
    host.environment["OBSERVATORY_LEASES"] = str(host.leases)
    with owners(host, 1) as (a,):
        for call in (
            "ClockLease.acquire(UUID, duration_s=60)",
            f"ClockLease.acquire(UUID, duration_s=60, folder=Path({str(host.leases)!r}))",
            "locking.refuse_leased(UUID)",
        ):
            error, text = a.try_(call)
            assert (error, "is not ours alone" in text) == ("ClockError", True), call
    for command in ("status", "unlock"):
        outcome = host.run("-m", "observatory", "clocks", command, code=1)
        assert "is not ours alone" in " ".join(outcome.stderr.split())
    assert not host.leases.exists()
    assert host.driver.changes() == []


def link_to_target(path: Path, target: Path) -> None:
    path.symlink_to(target)


def second_name(path: Path, target: Path) -> None:
    path.hardlink_to(target)


def pipe(path: Path, _target: Path) -> None:
    os.mkfifo(path, 0o600)


def folder(path: Path, _target: Path) -> None:
    path.mkdir()


def of_another_user(path: Path, target: Path) -> None:
    path.write_bytes(target.read_bytes())
    os.chown(path, NOBODY, NOBODY)


def writable(path: Path, target: Path) -> None:
    path.write_bytes(target.read_bytes())
    path.chmod(0o666)


KINDS = [link_to_target, second_name, pipe, folder, of_another_user, writable]


@needs_root
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_only_plain_files_of_ours_are_opened(kind: Callable[[Path, Path], None], tmp_path: Path) -> None:
    target, path = tmp_path / "target", tmp_path / "path"
    target.write_text("kept")
    kind(path, target)
    for flags in (os.O_RDONLY, os.O_RDWR | os.O_CREAT, os.O_WRONLY | os.O_APPEND | os.O_CREAT):
        with pytest.raises(OSError, match="path"):
            open_own(path, flags)
    assert target.read_text() == "kept"


@needs_driver
@pytest.mark.parametrize("kind", [link_to_target, pipe], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", [f"{NAME}.lock", f"{NAME}.json", f"{NAME}.log"])
def test_a_file_that_is_no_plain_file_of_ours_is_neither_followed_nor_waited_for(
    name: str, kind: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    host = Host(tmp_path)
    host.run("-m", "tests.locks.lock_owner", UUID, "middle", "everybody", code=None)
    held = host.state()
    assert held != CLEAN
    target = tmp_path / "target"
    lease = host.leases / f"{NAME}.json"
    target.write_bytes(lease.read_bytes())
    content, mode = target.read_bytes(), target.stat().st_mode
    (host.leases / name).unlink()
    kind(host.leases / name, target)
    host.run("-m", "observatory", "clocks", "status")
    outcome = host.run(
        "-m", "observatory", "clocks", "unlock", "--json", code=0 if name.endswith("log") else 1
    )
    assert (target.read_bytes(), target.stat().st_mode) == (content, mode)
    (found,) = json.loads(outcome.stdout)["leases"]
    assert found["undone"] == (host.state() == CLEAN) == name.endswith("log")
    assert found["undone"] or found["reason"].startswith(("guard ", "lease "))
    with owners(host, 1) as (a,):
        error, text = a.try_("held = ClockLease.acquire(UUID, duration_s=60); held.release()")
        assert error == (None if name.endswith("log") else "ClockError"), text
    assert (target.read_bytes(), target.stat().st_mode) == (content, mode)


@needs_driver
def test_names_of_temporary_files_are_not_to_be_foreseen(tmp_path: Path) -> None:
    host = Host(tmp_path)
    target = tmp_path / "target"
    target.write_text("kept")
    with owners(host, 1) as (a,):
        host.leases.mkdir(mode=0o700)
        for pid in (a.pid, *range(a.pid + 1, a.pid + 200)):
            (host.leases / f".{NAME}.json.{pid}.tmp").symlink_to(target)
        a.acquire()
        a.ask("held.lock(780); held.release()")
    assert target.read_text() == "kept"
    assert host.state() == CLEAN
    assert [path.name for path in host.leases.iterdir() if path.suffix == ".tmp"] == []

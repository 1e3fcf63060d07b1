"""A test that fails, or that is ended, ends what it has started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT
from tests.processes import command_of, lives, wait_until

#: Processes with sessions of their own, orphans, and deaf ones; LENGTH_S tells them from all others.
START = """
import pytest, subprocess, time
from pathlib import Path

DEAF = "trap '' TERM HUP INT; sleep LENGTH_S & sleep LENGTH_S"

def start():
    subprocess.Popen(["sh", "-c", DEAF], start_new_session=True)
    subprocess.Popen(["sh", "-c", f"({DEAF}) & exit 0"]).wait()
"""
FAILING = """
@pytest.fixture(scope="module", autouse=True)
def shared():
    start()

def test_fails():
    start()
    assert False

def test_is_late():
    subprocess.run(["sh", "-c", DEAF], timeout=0.2)

@pytest.fixture
def broken():
    start()
    raise OSError

def test_cannot_begin(broken):
    pass

def test_leaves_something():
    start()
"""
WAITING = """
def test_waits():
    start()
    Path(__file__).with_name("begun").touch()
    try:
        time.sleep(600)
    except KeyboardInterrupt:  # as the command line does
        pass

def test_next_runs():
    print("test_next_runs")
    assert False
"""


def run_tests(folder: Path, code: str, length_s: str) -> subprocess.Popen[str]:
    (folder / "test_it.py").write_text(START.replace("LENGTH_S", length_s) + code)
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", "-c"),
            *(str(ROOT / "pyproject.toml"), "-o", "filterwarnings=ignore", "--rootdir", str(folder)),
            str(folder / "test_it.py"),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def running(length_s: str) -> list[int]:
    numbers = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    return [pid for pid in numbers if f"sleep {length_s}" in command_of(pid) and lives(pid)]


def test_nothing_is_left_of_tests_that_fail(tmp_path: Path) -> None:
    length_s = f"6{os.getpid()}.1"
    with run_tests(tmp_path, FAILING, length_s) as tests:
        said, _ = tests.communicate(timeout=400)
    assert tests.returncode == 1, said
    assert "2 failed, 1 passed, 1 error" in said, said
    assert running(length_s) == []


def test_nothing_is_left_of_a_test_that_is_ended(tmp_path: Path) -> None:
    length_s = f"6{os.getpid()}.2"
    with run_tests(tmp_path, WAITING, length_s) as tests:
        assert wait_until((tmp_path / "begun").exists, within_s=400.0)
        assert wait_until(lambda: len(running(length_s)) >= 4, within_s=400.0)
        tests.send_signal(signal.SIGTERM)
        said, _ = tests.communicate(timeout=400)
    assert tests.returncode not in (0, None), said
    assert "test_next_runs" not in said
    assert running(length_s) == []


def test_tests_of_one_file_share_a_worker(request: pytest.FixtureRequest) -> None:
    """Otherwise each worker starts the ranks of a fixture anew; pytest-xdist 3.8 needs pytest before 9.2."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.skip("the tests run in one process")
    assert request.node.nodeid.endswith("@tests/test_processes.py")

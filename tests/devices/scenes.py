"""Plays scenes with the fake driver, each in a process of its own.

    def scene(driver: FakeDriver) -> object: ...        # in a test module, at its top level
    assert play(scene, tmp_path) == ...                 # what it returned, through JSON

An assertion that fails inside a scene shows with its traceback.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.devices.driver import FakeDriver, why_not
from tests.paths import ROOT

needs_driver = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


def play(scene: Callable[[FakeDriver], Any], folder: Path, *, timeout_s: float = 400.0) -> Any:
    """Run a scene with a driver of its own, and give what it returned."""
    state = folder / "state"
    done = subprocess.run(
        [sys.executable, "-m", "tests.devices.scenes", scene.__module__, scene.__qualname__, str(state)],
        cwd=ROOT, env=FakeDriver(state).environment(), capture_output=True, text=True, check=False,
        timeout=timeout_s,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _main(module: str, name: str, state: str) -> None:
    driver = FakeDriver(Path(state))
    driver.load()
    outcome = getattr(importlib.import_module(module), name)(driver)
    sys.stdout.write(json.dumps(outcome) + "\n")


if __name__ == "__main__":
    _main(*sys.argv[1:])

"""Captures on a file system that is full: one sentence, a program that goes on, a run that can be read."""

# ruff: noqa: PT012  # what is raised is that one of the steps does

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import observatory
from observatory.cli import main
from observatory.errors import CaptureError
from tests.probes.tiny import ScriptedModel, ids, scripted_adapter

pytestmark = pytest.mark.slow

_KIB = 96


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with little room."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a file system needs root on Linux")
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_KIB}k", "observatory-test", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def routed_steps(run: Path) -> list[int]:
    return sorted(
        {step for block in observatory.open_run(run).iter_loads() for step in block.step_S.tolist()}
    )


def test_a_profile_on_a_full_file_system_ends_with_one_sentence(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--data", "mock", "--batch-size", "1", "--sequence-length", "16", "--sample-tokens", "16")
    code = main(
        ["profile", "tiny-gqa", *words, "--steps", "100000", "--flush-seconds", "0.1", "--power", "off",
         "--out", str(small / "run")]
    )  # fmt: skip
    assert code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("observatory:")]
    assert f"rank 0 cannot write {small / 'run'}/" in line
    assert line.endswith("parts written before are intact; free space or choose another place")
    assert "No space left on device" in line
    steps = routed_steps(small / "run")
    assert steps == list(range(len(steps)))
    assert len(steps) > 1
    assert not list((small / "run").rglob("*.tmp"))


def test_a_program_goes_on_and_its_run_does_when_there_is_room_again(small: Path) -> None:
    ballast = small / "ballast"
    model = ScriptedModel()
    with observatory.watch(model, small / "run", adapters=[scripted_adapter(2)], flush_s=0.01) as watch:
        model([ids([1])])
        watch.step()
        assert watch.run().has_parts("routing")  # the first step is on disk
        with pytest.raises(OSError, match="No space left"):
            ballast.write_bytes(bytes(_KIB << 10))
        with pytest.raises(CaptureError, match=r"could not be kept: .*No space left on device"):
            for _ in range(1000):
                model([ids([1])])
                watch.step()
                time.sleep(0.01)
        ballast.unlink()
        model([ids([1])])
        watch.step()
    steps = routed_steps(small / "run")
    assert {0, watch.steps - 1} <= set(steps)
    run = observatory.open_run(small / "run")
    assert run.manifest.state == "failed"
    assert "No space left on device" in (run.manifest.ranks[0].error or "")
    # A replaced file frees pages: what could not be written may be the gaps alone, and no row is lost.
    assert run.manifest.ranks[0].dropped_rows >= watch.steps - len(steps)

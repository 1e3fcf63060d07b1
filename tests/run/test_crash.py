"""SIGKILL and full disks cost at most what was not flushed."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from observatory.run import open_run
from tests.run.conftest import expected_load

pytestmark = pytest.mark.slow

_WRITER = """
import sys
from observatory.run import RunWriter
from tests.run.conftest import manifest_of, one_step
writer = RunWriter.create(sys.argv[1], manifest_of())
step = 0
while True:
    writer.append("routing", one_step(step))
    step += 1
    if step % 5 == 0:
        writer.flush()
        print(step, flush=True)
"""

_SMALL_DISK = """
import resource, sys
from observatory.errors import ObservatoryError
from observatory.run import RunWriter, routing_rows
from tests.run.conftest import manifest_of
import numpy as np
writer = RunWriter.create(sys.argv[1], manifest_of())
random = np.random.default_rng(0)
def append(steps, first):
    rows = routing_rows(step_N=np.arange(first, first + steps), phase_N="prefill", layer_N=0, source_rank=0,
                        tokens_N=1, load_NE=random.integers(0, 2**40, (steps, 64)))
    writer.append("routing", rows)
append(10, 0)
writer.flush()
sys.dont_write_bytecode = True
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
append(1000, 10)
try:
    writer.flush()
except ObservatoryError as error:
    print(error)
append(10, 1010)
writer.close(steps=1020)
"""


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_killed_writer_loses_nothing_that_was_flushed(tmp_path: Path, seed: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path / "run")], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(random.Random(seed).uniform(0.0, 0.4))
    process.kill()
    rest = process.communicate(timeout=30)[0].split()
    flushed = int(rest[-1]) if rest else 5
    run = open_run(tmp_path / "run")
    assert "the run was never closed: it still runs, or rank 0 was killed" in run.problems
    assert any(problem.startswith("rank 0 never closed") for problem in run.problems)
    steps: list[int] = []
    for block in run.iter_loads(layers=[1]):
        for s, step in enumerate(block.step_S.tolist()):
            steps.append(step)
            assert block.load_SPE[s, 0].tolist() == expected_load(step, 0)[1].tolist()
    assert steps == list(range(len(steps)))
    assert flushed <= len(steps) <= flushed + 5


def test_a_full_disk_is_one_line_and_leaves_earlier_and_later_parts(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SMALL_DISK, str(tmp_path / "run")], capture_output=True, text=True, check=True
    )
    (line,) = done.stdout.splitlines()
    assert "File too large; 1000 rows are lost, parts written before are intact; free space" in line
    run = open_run(tmp_path / "run")
    assert run.problems == ("rank 0 could not write 1000 rows",)
    assert run.manifest.ranks[0].dropped_rows == 1000
    steps = [step for block in run.iter_loads() for step in block.step_S.tolist()]
    assert steps == [*range(10), *range(1010, 1020)]
    assert [
        file.name for file in (tmp_path / "run/routing/rank-00000").iterdir() if ".tmp" in file.name
    ] == []

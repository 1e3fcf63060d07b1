"""The reader never holds the whole run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from observatory.run import RunWriter, routing_rows
from tests.run.conftest import manifest_of

pytestmark = pytest.mark.slow

_READER = """
import sys
from observatory.run import open_run
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) * 1024
run = open_run(sys.argv[1])
before = peak()
counts = sum(block.load_SPE.size for block in run.iter_loads())
print(counts, peak() - before)
"""


def test_reading_needs_far_less_memory_than_the_run_has(tmp_path: Path) -> None:
    ranks, layers, experts, steps = 2, 32, 256, 9600
    load_NE = np.random.default_rng(0).integers(0, 9, (layers * 400, experts))
    writers = [
        RunWriter.create(tmp_path / "run", manifest_of(ranks)),
        RunWriter.join(tmp_path / "run", rank=1),
    ]
    for writer in reversed(writers):
        for first in range(0, steps, 400):
            rows = routing_rows(
                step_N=np.repeat(np.arange(first, first + 400), layers),
                phase_N="prefill",
                layer_N=np.tile(np.arange(layers), 400),
                source_rank=writer.rank,
                tokens_N=1,
                load_NE=load_NE,
            )
            writer.append("routing", rows)
        writer.close()
    done = subprocess.run(
        [sys.executable, "-c", _READER, str(tmp_path / "run")], capture_output=True, text=True, check=True
    )
    counts, grown_bytes = map(int, done.stdout.split())
    assert counts == ranks * layers * experts * steps
    assert counts * 8 > 1200e6
    print(grown_bytes)
    assert grown_bytes < 600e6

"""Trainings on two ranks, which write one run: counts of each rank equal its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import observatory
from tests.api import training_ranks
from tests.api.training_cases import LENGTH, Found, loads

BATCH = MICRO_BATCHES = 2  # of each rank, in each step


@pytest.mark.slow
def test_trainings_on_two_ranks_are_counted_exactly_by_rank(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "--module", training_ranks.__name__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, first_step in (("run", 0), ("run-2", 2), ("lightning", 0)):
        run = observatory.open_run(tmp_path / name)
        assert run.problems == ()
        assert [(rank.rank, rank.state) for rank in run.manifest.ranks] == [(0, "complete"), (1, "complete")]
        of_ranks = [counted(tmp_path / f"{name}-{rank}.json") for rank in (0, 1)]
        assert [loads(tmp_path / name, rank) for rank in (0, 1)] == of_ranks
        assert of_ranks[0] != of_ranks[1]
        assert {phase for _, phase, _ in of_ranks[0]} == {"train_forward", "prefill"}
        tokens = run.routed_tokens().groupby(["phase", "step"])["tokens"].sum()["train_forward"]
        assert tokens.to_dict() == dict.fromkeys(range(first_step, 4), 2 * MICRO_BATCHES * BATCH * LENGTH)
        ranks_of_losses = run.auxiliary_losses().groupby(["step", "phase"])["source_rank"].apply(sorted)
        assert all(ranks == [0, 1] for ranks in ranks_of_losses)


def counted(path: Path) -> Found:
    return {
        (step, phase, layer): Counter(dict(load))
        for step, phase, layer, *load in json.loads(path.read_text())
    }

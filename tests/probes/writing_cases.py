"""What two gloo ranks do, case by case, for test_ranks.py; run as a program of its own."""

from __future__ import annotations

import os
import time

import torch

import observatory.run.writer
from tests.probes.rank_cases import Rank, run_cases
from tests.probes.tiny import ScriptedModel, ids, scripted_adapter


def watched(me: Rank, name: str) -> None:
    """Two steps of a wrapped model; in the case ``dies`` rank 1 is gone before the watch ends."""
    model = torch.nn.parallel.DistributedDataParallel(ScriptedModel())
    # Rank 1 has word of rank 0, and does not look at files.
    observatory.run.writer._FIRST_PAUSE_S = 600.0
    time.sleep(0.5 * (1 - me.rank))
    with me.watch(name, model, adapter=scripted_adapter(3), flush_s=0.1) as watch:
        for _ in range(2):
            model([ids([me.rank, 2])])
            watch.step()
        if name == "dies" and me.rank == 1:
            os._exit(9)


if __name__ == "__main__":
    cases = {name: lambda me, name=name: watched(me, name) for name in ("lives", "dies")}
    run_cases(cases, world=2, timeout_s=120, last="dies")

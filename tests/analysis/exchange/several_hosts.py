"""A program of a user's own on several hosts, started as a module by torchrun with a folder.

Rank 2 is late in every second exchange. Three runs: as watched by default; with ``align_clocks=False``; and
one in which rank 2 leaves the watch by an exception.
"""

from __future__ import annotations

import contextlib
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

import observatory
from tests.probes.tiny import ScriptedModel, ids, scripted_adapter

DELAYED, DELAY_S, STEPS = 2, 0.06, 16


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
    model = ScriptedModel()
    rank, size = distributed.get_rank(), distributed.get_world_size()
    for name, options in (("default", {}), ("not aligned", {"align_clocks": False}), ("fails", {})):
        with (
            contextlib.suppress(ZeroDivisionError),
            observatory.watch(
                model,
                folder / name,
                adapters=[scripted_adapter(3)],
                **options,  # type: ignore[arg-type]
            ) as watch,
        ):
            for step in range(STEPS):
                distributed.barrier()
                if rank == DELAYED and step % 2:
                    time.sleep(DELAY_S)
                distributed.all_to_all_single(torch.empty(2 * size, 8), torch.ones(2 * size, 8))
                model([ids([0])])
                watch.step()
            if name == "fails" and rank == DELAYED:
                raise ZeroDivisionError
        distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()

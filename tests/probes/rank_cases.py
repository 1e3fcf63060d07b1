"""What programs of several gloo ranks share: cases one after the other, each in a run named after it.

What only the program itself can see (its own results, its own errors) is put into ``facts-<rank>.json``.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import observatory
from observatory.probes.routing.adapters import Adapter
from observatory.probes.watch import Watch
from tests.probes.expert_parallel import parallel_adapter
from tests.probes.tiny import ScriptedModel, scripted_adapter

Case = Callable[["Rank"], None]


class Rank:
    """This rank, its place on disk and its findings."""

    def __init__(self, out: Path, rank: int) -> None:
        self.out, self.rank = out, rank
        self.facts: dict[str, Any] = {}

    @contextlib.contextmanager
    def watch(
        self, name: str, model: nn.Module | None = None, *, adapter: Adapter | None = None, **options: Any
    ) -> Iterator[Watch]:
        """Watch a model; by default one that has nothing to do with the exchanges."""
        adapter = adapter or (
            scripted_adapter(3) if model is None else parallel_adapter(dist.get_world_size())
        )
        with observatory.watch(
            ScriptedModel() if model is None else model, self.out / name, adapters=[adapter], **options
        ) as watch:
            dist.barrier()
            yield watch


def run_cases(cases: Mapping[str, Case], *, world: int, timeout_s: float, last: str | None = None) -> None:
    """This process as one rank of ``world``; its folder and number are the program's arguments.

    Args:
        cases: in the order in which they run.
        world: number of ranks.
        timeout_s: of the process group.
        last: a case that no barrier goes before and none follows.
    """
    out, number = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{out / 'rendezvous'}",
        rank=number,
        world_size=world,
        timeout=timedelta(seconds=timeout_s),
    )
    me = Rank(out, number)
    for name, run in cases.items():
        if name != last:
            dist.barrier()
        run(me)
        (out / f"facts-{number}.json").write_text(json.dumps(me.facts), encoding="utf-8")
    if last is None:
        dist.barrier()
    os._exit(0)  # groups that may be broken, not worth taking down one by one

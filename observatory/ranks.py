"""Which rank of how many this process is."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from observatory.errors import CaptureError

__all__ = ["RankOf", "find_rank"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankOf:
    """A rank, counted from 0, and the number of ranks."""

    rank: int
    world: int


def find_rank(
    rank: int | None = None, world: int | None = None, environment: Mapping[str, str] = os.environ
) -> RankOf:
    """What the caller says; else the initialised process group; else what torchrun put into the environment.

    No collective is issued: ranks find each other through the run directory alone.

    Raises:
        CaptureError: only one of the two is given, or they do not fit together.
    """
    if rank is not None or world is not None:
        if rank is None or world is None or not 0 <= rank < world:
            raise CaptureError(
                f"rank={rank} and world={world} do not fit; expected both, with 0 <= rank < world, or neither"
            )
        return RankOf(rank=rank, world=world)
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return RankOf(rank=distributed.get_rank(), world=distributed.get_world_size())
    if "TORCHELASTIC_RUN_ID" in environment:
        return find_rank(int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1")))
    return RankOf(rank=0, world=1)

"""Which rank of how many this process is, and where it sits.

Several launchers may have left their mark on one environment. They may nest (``torchrun`` started once per
node by ``srun``): the inner one then counts the processes, the outer one the nodes. ``mpiexec`` in a
Slurm job nests too: it starts its daemons with ``srun``. Any other difference is an error, because ranks that
number themselves differently would write each other's part of a run.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from observatory.errors import CaptureError, ExchangeError

Launcher = Literal["caller", "torch.distributed", "torchrun", "mpiexec", "srun", "alone"]
BackendChoice = Literal["auto", "gloo", "nccl", "mpi", "alone"]

#: How TORCHELASTIC_RUN_ID of ranks begins that `observatory.hpc.launch` has started.
LOCAL_RUN = "observatory-"

#: Slurm numbers the steps that are no ``srun`` (batch script, external, interactive) from here on.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
#: ``4``, or ``4(x3)`` for three nodes that have four tasks each.
_TASKS_OF_NODES = re.compile(r"(\d{1,7})(?:\(x(\d{1,7})\))?", re.ASCII)


#: Variables of launchers that together name a launch, the innermost launcher first.
_LAUNCH_NAMES = (
    ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"),
    ("PMIX_NAMESPACE",),
    ("SLURM_STEP_ID", "SLURM_JOB_ID", "SLURM_RESTART_COUNT"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankOf:
    """A rank, counted from 0, and the number of ranks.

    Attributes:
        rank: this process's rank.
        world: number of ranks, P.
        local_rank: rank among those of its node; None when the launcher does not state it.
        local_world: ranks of its node; None when the launcher does not state it.
        node: number of its node; None when the launcher does not state it.
        launcher: where ``rank`` and ``world`` were read.
    """

    rank: int
    world: int
    local_rank: int | None = None
    local_world: int | None = None
    node: int | None = None
    launcher: Launcher = "alone"


def find_rank(
    rank: int | None = None, world: int | None = None, environment: Mapping[str, str] = os.environ
) -> RankOf:
    """What the caller says; else the initialised process group; else what launchers put into the environment.

    Understood are torchrun (and whoever speaks its language: ``RANK``, ``WORLD_SIZE`` with
    ``TORCHELASTIC_RUN_ID`` or ``MASTER_ADDR``), Open MPI, MPICH and other PMI launchers, and ``srun``.
    No collective is issued.

    Raises:
        CaptureError: only one of the two is given, they do not fit together, a variable is not a number, or
            two sources disagree.
    """
    if rank is not None or world is not None:
        if rank is None or world is None or not 0 <= rank < world:
            raise CaptureError(
                f"rank={rank} and world={world} do not fit",
                expected="both, with 0 <= rank < world, or neither",
            )
        return RankOf(rank=rank, world=world, launcher="caller")
    sources = (_process_group(), _torchrun(environment), _mpiexec(environment), _srun(environment))
    launchers = [source for source in sources if source is not None]
    if not launchers:
        return RankOf(rank=0, world=1)
    # One process started by an outer launcher says nothing about those it starts itself.
    chosen, *others = [source for source in launchers if source.world > 1] or launchers[:1]
    for other in others:
        if (other.rank, other.world) == (chosen.rank, chosen.world):
            chosen = replace(
                chosen,
                local_rank=other.local_rank if chosen.local_rank is None else chosen.local_rank,
                local_world=other.local_world if chosen.local_world is None else chosen.local_world,
                node=other.node if chosen.node is None else chosen.node,
            )
        elif _counts_nodes(other, chosen):
            chosen = replace(chosen, node=other.rank if chosen.node is None else chosen.node)
        else:
            raise CaptureError(
                f"{chosen.launcher} says rank {chosen.rank} of {chosen.world}, {other.launcher} says rank "
                f"{other.rank} of {other.world}",
                expected="one launcher, or one process per node of the outer one",
                remedy="remove the variables of the launcher that did not start this process",
            )
    return chosen


def launch_name(environment: Mapping[str, str] = os.environ) -> str | None:
    """What all processes of one launch have in common, and no other launch has; None where nothing says it.

    A launch is one start of torchrun, mpiexec (Open MPI, or another of PMIx) or srun.
    """
    for names in _LAUNCH_NAMES:
        if names[0] in environment:
            return " ".join(f"{name}={environment.get(name, '')}" for name in names)
    return None


def _counts_nodes(outer: RankOf, inner: RankOf) -> bool:
    """Whether the outer launcher started one process per node, which started the inner ranks."""
    if outer.launcher == "srun" and inner.launcher == "mpiexec" and outer.local_world == 1:
        # Daemons of mpiexec: one on every node of the job, except on that where mpiexec runs, used or not.
        return True
    if not outer.world < inner.world:
        return False
    if inner.local_world is not None:
        return outer.world * inner.local_world == inner.world
    return inner.world % outer.world == 0


def _process_group() -> RankOf | None:
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return RankOf(
        rank=distributed.get_rank(), world=distributed.get_world_size(), launcher="torch.distributed"
    )


def _torchrun(environment: Mapping[str, str]) -> RankOf | None:
    if "TORCHELASTIC_RUN_ID" not in environment and not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(
        environment
    ):
        return None
    return _read(
        environment, "torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"
    )


def _mpiexec(environment: Mapping[str, str]) -> RankOf | None:
    if "OMPI_COMM_WORLD_RANK" in environment:
        prefix = "OMPI_COMM_WORLD_"
        return _read(
            environment,
            "mpiexec",
            f"{prefix}RANK",
            f"{prefix}SIZE",
            f"{prefix}LOCAL_RANK",
            f"{prefix}LOCAL_SIZE",
        )
    if "PMI_RANK" in environment:
        return _read(environment, "mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    return None


def _srun(environment: Mapping[str, str]) -> RankOf | None:
    step = _number(environment, "SLURM_STEP_ID")
    if step is None or step >= _FIRST_SPECIAL_STEP or "SLURM_PROCID" not in environment:
        return None
    world = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    source = _read(environment, "srun", "SLURM_PROCID", world, "SLURM_LOCALID", None, "SLURM_NODEID")
    return replace(
        source, local_world=_tasks_of_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""), source.node)
    )


def _tasks_of_node(text: str, node: int | None) -> int | None:
    """Tasks of one node from Slurm's list of all nodes, such as ``2(x3),1``; None where not stated."""
    if node is None:
        return None
    for part in text.split(","):
        match = _TASKS_OF_NODES.fullmatch(part)
        if match is None:
            return None
        node -= int(match[2] or 1)
        if node < 0:
            return int(match[1]) or None
    return None


def _read(
    environment: Mapping[str, str],
    launcher: Launcher,
    rank_name: str,
    world_name: str,
    local_rank_name: str | None = None,
    local_world_name: str | None = None,
    node_name: str | None = None,
) -> RankOf:
    rank, world = _number(environment, rank_name), _number(environment, world_name)
    if rank is None and world is None:
        rank, world = 0, 1
    if rank is None or world is None or rank >= world:
        raise CaptureError(
            f"{launcher} set {rank_name}={environment.get(rank_name)} and "
            f"{world_name}={environment.get(world_name)}",
            expected="both, with 0 <= rank < world",
        )
    return RankOf(
        rank=rank,
        world=world,
        local_rank=None if local_rank_name is None else _number(environment, local_rank_name),
        local_world=None if local_world_name is None else _number(environment, local_world_name),
        node=None if node_name is None else _number(environment, node_name),
        launcher=launcher,
    )


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal()):
        raise CaptureError(f"{name} is {text[:40]!r} in the environment", expected="a number from 0 on")
    return int(text)


def check_backend(backend: str) -> None:
    """Refuse a backend that does not exist, also where one rank needs none.

    Raises:
        ExchangeError: no such backend.
    """
    if backend not in get_args(BackendChoice):
        raise ExchangeError(
            f"backend {backend!r} does not exist", expected=f"one of {', '.join(get_args(BackendChoice))}"
        )

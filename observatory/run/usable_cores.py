"""Cores that the ranks of each machine can use at once, and whether there is one for every rank.

With fewer cores than ranks a time is of waiting for a core as well. What a rank may use is read where it
runs (`find_cores`) and kept with the run or the result; what that means for all ranks of a machine is judged
from there (`core_shares`). A core is what the kernel schedules on: with simultaneous multithreading two of
them are one physical core.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from observatory.run.control_groups import own_groups
from observatory.run.manifest import MOST_CORES, CoreQuota, CoreShare, CoreSpec
from observatory.run.time_base import boot_id

_PROC = Path("/proc")
#: Beyond any limit in use, within what a record takes.
_MOST_QUOTA = 1e6
_MOST_QUOTAS = 32


def find_cores(proc: Path = _PROC) -> CoreSpec:
    """What this process may use: the cores of its affinity, and its control groups' quotas of them."""
    return CoreSpec(
        host="".join(char for char in socket.gethostname()[:255] if char.isprintable()) or "unknown",
        machine=_machine(proc),
        cpus=as_ranges(own_cores(proc)),
        quotas=tuple(_quotas(proc))[:_MOST_QUOTAS],
        threads=_threads(),
    )


def core_shares(cores_P: Iterable[CoreSpec | None]) -> list[CoreShare]:
    """Ranks and cores of every machine, in the order of ranks; ranks that do not say are not among them."""
    of_machine: dict[str, list[CoreSpec]] = defaultdict(list)
    for cores in cores_P:
        if cores is not None and cores.cpus:
            of_machine[cores.machine or cores.host].append(cores)
    return [_share(ranks) for ranks in of_machine.values()]


def short_of_cores(cores_P: Iterable[CoreSpec | None]) -> list[CoreShare]:
    """Machines on which ranks, or all their threads together, are more than the cores that they can use."""
    return [share for share in core_shares(cores_P) if share.short is not None]


def share_document(share: CoreShare) -> dict[str, Any]:
    """A share for JSON, with what is short there."""
    return {**share.model_dump(mode="json"), "short": share.short}


def core_sentence(share: CoreShare) -> str:
    """A share in words."""
    ranks = "1 rank" if share.ranks == 1 else f"{share.ranks} ranks"
    if share.short == "threads":
        ranks += f" with {share.threads} threads"
    cores = "1 usable core" if share.cores == 1 else f"{share.cores:.4g} usable cores"
    hosts = share.hosts[0] if len(share.hosts) == 1 else ", ".join(share.hosts)
    usage = f"{ranks} on {cores} of host {hosts}"
    return usage if share.short is None else f"{usage}: times are of waiting for a core as well"


def _share(cores_K: Sequence[CoreSpec]) -> CoreShare:
    ranks = len(cores_K)
    sets = [from_ranges(cores.cpus) for cores in cores_K]
    at_once = min(float(_with_a_core_each(sets)), _within_quotas(cores_K))
    threads = [cores.threads for cores in cores_K]
    if at_once >= ranks:
        # Every rank has one: what is left over serves further threads.
        at_once = min(float(len(frozenset[int]().union(*sets))), _within_quotas(cores_K, each=float("inf")))
    return CoreShare(
        hosts=tuple(dict.fromkeys(cores.host for cores in cores_K))[:64],
        ranks=ranks,
        cores=at_once,
        threads=None if None in threads else sum(number or 0 for number in threads),
    )


def _with_a_core_each(sets: Sequence[frozenset[int]]) -> int:
    """Ranks that can run at once, each on a core that is its own: the largest matching (Kuhn 1955)."""
    # A rank that may use as many cores as there are ranks always finds a free one.
    narrow = [cores for cores in sets if len(cores) < len(sets)]
    held_by: dict[int, int] = {}

    def place(rank: int) -> bool:
        """Find a core, moving others along one chain of cores."""
        came_from: dict[int, tuple[int, int | None]] = {}
        queue: list[tuple[int, int | None]] = [(rank, None)]
        for mover, left in queue:
            for core in narrow[mover]:
                if core in came_from:
                    continue
                came_from[core] = (mover, left)
                if core not in held_by:
                    free: int | None = core
                    while free is not None:
                        taker, left_behind = came_from[free]
                        held_by[free], free = taker, left_behind
                    return True
                queue.append((held_by[core], core))
        return False

    return sum(place(rank) for rank in range(len(narrow))) + len(sets) - len(narrow)


def _within_quotas(cores_K: Sequence[CoreSpec], *, each: float = 1.0) -> float:
    """Cores within the quotas of the control groups when every rank takes so many, a part of one included."""
    inside: dict[str | None, float] = defaultdict(float)
    above: dict[str, str | None] = {}
    quota: dict[str, float] = {}
    depth: dict[str, int] = {}
    for cores in cores_K:
        groups = [item.group for item in cores.quotas]
        inside[groups[0] if groups else None] += each
        for place, item in enumerate(cores.quotas):
            above[item.group] = groups[place + 1] if place + 1 < len(groups) else None
            quota[item.group] = min(item.cpus, quota.get(item.group, item.cpus))
            depth[item.group] = len(groups) - place
    for group in sorted(depth, key=lambda name: -depth[name]):
        inside[above[group]] += min(inside[group], quota[group])
    return inside[None]


def _machine(proc: Path) -> str | None:
    """What names the kernel: containers of one machine have it in common, whatever they are called."""
    boot = boot_id(proc)
    return None if boot is None else hashlib.sha256(boot.encode()).hexdigest()[:16]


def own_cores(proc: Path) -> set[int]:
    """Cores on which any thread of this process may run: OpenMP may have bound the first to one of them."""
    if not hasattr(os, "sched_getaffinity"):
        return set(range(os.cpu_count() or 1))
    cores: set[int] = set(os.sched_getaffinity(0))
    with contextlib.suppress(OSError):
        for thread in os.listdir(proc / "self/task"):
            with contextlib.suppress(OSError, ValueError):
                cores |= os.sched_getaffinity(int(thread))
    return {core for core in cores if core < MOST_CORES}


def _threads() -> int | None:
    """Threads that torch computes with, where it is loaded."""
    torch = sys.modules.get("torch")
    with contextlib.suppress(Exception):
        return None if torch is None else int(torch.get_num_threads())
    return None


def _quotas(proc: Path) -> list[CoreQuota]:
    """Quotas of this process's control groups, the innermost first."""
    quotas = []
    for folder in own_groups(proc, "cpu"):
        cpus = _quota_of(folder)
        if cpus is not None:
            with contextlib.suppress(OSError):
                entry = os.stat(folder)
                quotas.append(CoreQuota(cpus=cpus, group=f"{entry.st_dev}:{entry.st_ino}"))
    return quotas


def _quota_of(folder: Path) -> float | None:
    """Cores that one group may use at once; None without a limit."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text("ascii").split()
        return None if quota == "max" else _cores(int(quota), int(period))
    with contextlib.suppress(OSError, ValueError):
        quota_us = int((folder / "cpu.cfs_quota_us").read_text("ascii"))
        return (
            None
            if quota_us <= 0
            else _cores(quota_us, int((folder / "cpu.cfs_period_us").read_text("ascii")))
        )
    return None


def _cores(quota_us: int, period_us: int) -> float | None:
    return min(quota_us / period_us, _MOST_QUOTA) if quota_us > 0 and period_us > 0 else None


def as_ranges(cores: Iterable[int]) -> str:
    """``0-3,8`` as Linux writes it."""
    ranges: list[list[int]] = []
    for core in sorted(cores):
        if ranges and ranges[-1][1] == core - 1:
            ranges[-1][1] = core
        else:
            ranges.append([core, core])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)


def from_ranges(text: str) -> frozenset[int]:
    """Numbers of a checked list, those of cores."""
    cores: set[int] = set()
    for part in text.split(","):
        low, _, high = part.partition("-")
        cores.update(range(int(low), min(int(high or low), MOST_CORES) + 1))
    return frozenset(cores)

"""Process groups: a label that all members give alike, and numbers for their collectives."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

__all__ = ["GroupFacts", "Groups", "group_label"]


def group_label(ranks: Sequence[int], *, copy: int = 0) -> str:
    """Label of a group: its global ranks in ascending order, runs of them shortened.

    Args:
        ranks: global ranks of the members.
        copy: 0 for the first group of exactly these ranks, 1 for the next, in the order in which the
            program made them; members make groups in the same order.

    Returns:
        For example ``0-3``, ``0,4,8`` or ``0-3#1``.
    """
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
    return f"{text}#{copy}" if copy else text


@dataclass(slots=True)
class GroupFacts:
    """One process group as rows name it.

    Attributes:
        label: see ``group_label``.
        size: P, its members.
        backends: backend by device type, as far as they were needed.
        next_sequence: number of its next collective, counted from the beginning of the watch.
    """

    label: str
    size: int
    backends: dict[str, str]
    next_sequence: int = 0


class Groups:
    """Facts about the groups that a watch has met; groups are not kept alive by it."""

    def __init__(self) -> None:
        self._facts: weakref.WeakKeyDictionary[Any, GroupFacts] = weakref.WeakKeyDictionary()

    def facts(self, group: Any) -> GroupFacts:
        """Facts about a process group."""
        known = self._facts.get(group)
        if known is None:
            known = self._facts[group] = GroupFacts(_label(group), group.size(), {})
        return known

    def backend(self, group: Any, device: torch.device) -> str:
        """Name of the backend that serves this device: gloo, nccl, ..."""
        backends = self.facts(group).backends
        if device.type not in backends:
            backends[device.type] = str(group._get_backend(device).name())
        return backends[device.type]


def _label(group: Any) -> str:
    members = distributed.distributed_c10d._world.pg_group_ranks
    if group not in members:
        return f"unregistered {group.group_name}"
    ranks = set(members[group])
    alike = [other for other, of_other in members.items() if set(of_other) == ranks]
    return group_label(sorted(ranks), copy=alike.index(group))

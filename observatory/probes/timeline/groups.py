"""Process groups: a label that all members give alike, and numbers for their collectives."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import methodcaller
from typing import Any

import torch
from torch import distributed


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


#: Number of the latest collective of a group.
Numbering = Callable[[Any], int]


@dataclass(frozen=True, slots=True)
class Backend:
    """What serves the tensors of one device in one group.

    Attributes:
        name: gloo, nccl, ...
        number: how it numbers what it did, counted from the beginning of the group; None where it does not.
    """

    name: str
    number: Numbering | None


@dataclass(slots=True)
class GroupFacts:
    """One process group as rows name it.

    Attributes:
        label: see ``group_label``.
        name: torch's own name of it, by which its flight recorder knows it; None for another library's.
        size: P, its members.
        numbers: the number of its next collective, counted from the beginning of the watch.
        backends: by device, as far as they were needed.
    """

    label: str
    name: str | None
    size: int
    numbers: Iterator[int] = field(default_factory=itertools.count)
    backends: dict[torch.device, Backend] = field(default_factory=dict)


class Groups:
    """Facts about the groups that a watch has met; groups are not kept alive by it."""

    def __init__(self) -> None:
        self._facts: weakref.WeakKeyDictionary[Any, GroupFacts] = weakref.WeakKeyDictionary()
        #: The same by identity, which later groups use again: a look here takes no hash of the group.
        self._known: dict[int, tuple[weakref.ref[Any], GroupFacts]] = {}
        self._labels: set[str] = set()
        self._lock = threading.Lock()

    def facts(self, group: Any) -> GroupFacts:
        """Facts about a process group."""
        known = self._known.get(id(group))
        return known[1] if known is not None and known[0]() is group else self._learn(group)

    def backend(self, group: Any, facts: GroupFacts, device: torch.device) -> Backend:
        """The backend of a group that serves a device."""
        backend = facts.backends.get(device)
        if backend is None:
            backend = facts.backends[device] = _backend(group, device)
        return backend

    def _learn(self, group: Any) -> GroupFacts:
        with self._lock:
            if group not in self._facts:
                self._facts[group] = GroupFacts(self._label(group), str(group.group_name), group.size())
            facts = self._facts[group]
            self._known[id(group)] = weakref.ref(group), facts
            return facts

    def _label(self, group: Any) -> str:
        members = distributed.distributed_c10d._world.pg_group_ranks
        if group not in members:
            return f"unregistered {group.group_name}"
        ranks = sorted(members[group])
        same_ranks = [other for other, of_other in members.items() if sorted(of_other) == ranks]
        # One that was taken down made room among those alike, but its label stays its own.
        labels = (group_label(ranks, copy=copy) for copy in itertools.count(same_ranks.index(group)))
        label = next(label for label in labels if label not in self._labels)
        self._labels.add(label)
        return label


def _backend(group: Any, device: torch.device) -> Backend:
    backend = group._get_backend(device)
    name = str(backend.name())

    def number_of_backend(asked: Any) -> int:
        return int(asked._get_backend(device)._get_sequence_number_for_group())

    # A group answers for its default backend, which is cheaper to ask.
    ways: list[Numbering] = [methodcaller("_get_sequence_number_for_group")] if group.name() == name else []
    for way in (*ways, number_of_backend):
        try:
            way(group)
        except Exception:  # not every backend numbers its collectives
            continue
        return Backend(name, way)
    return Backend(name, None)

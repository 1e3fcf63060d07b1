"""What ran when: stretches of time with names, none overlapping, and the time of each name in any window.

Shapes: M segments, J names, N windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from observatory.errors import EnergyError

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

#: More names than this in one timeline are not phases any more.
MOST_NAMES = 32
#: More combinations than this of names that overlap are refused.
_MOST_LABELS = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class Timeline:
    """Segments in time order. Time outside them has no name.

    Attributes:
        names: of what ran; names of spans that overlapped are joined by ``+``, as their powers cannot be
            separated.
        start_ns_M, end_ns_M: the segments.
        name_M: index into ``names``.
    """

    names: tuple[str, ...]
    start_ns_M: Int64
    end_ns_M: Int64
    name_M: Int64
    _gone_J: tuple[tuple[Float64, Float64], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_gone_J", tuple(map(self._gone, range(len(self.names)))))

    def _gone(self, name: int) -> tuple[Float64, Float64]:
        """Starts and ends of the segments of a name, and its time until each of them, nanoseconds."""
        own_M = self.name_M == name
        start, end = self.start_ns_M[own_M].astype(np.float64), self.end_ns_M[own_M].astype(np.float64)
        until = np.cumsum(end - start)
        edges = np.column_stack([start, end]).reshape(-1)
        return edges, np.column_stack([until - (end - start), until]).reshape(-1)

    @property
    def start_ns(self) -> int:
        """Start of the first segment."""
        return int(self.start_ns_M[0])

    @property
    def end_ns(self) -> int:
        """End of the last."""
        return int(self.end_ns_M[-1])

    def seconds(self) -> dict[str, float]:
        """Time of each name."""
        return {
            name: float(until[-1]) * 1e-9 if len(until) else 0.0
            for name, (_, until) in zip(self.names, self._gone_J, strict=True)
        }

    def seconds_in(self, start_ns_N: npt.NDArray[np.float64], end_ns_N: npt.NDArray[np.float64]) -> Float64:
        """Time of each name in windows, shape (N, J)."""
        # The search for shifts spends its time here: a row of memory for each name, not for each window.
        seconds_JN = np.zeros((len(self.names), len(start_ns_N)))
        for seconds_N, (edges, until) in zip(seconds_JN, self._gone_J, strict=True):
            if len(edges):
                np.subtract(
                    np.interp(end_ns_N, edges, until), np.interp(start_ns_N, edges, until), out=seconds_N
                )
        seconds_JN *= 1e-9
        return seconds_JN.T

    def moved(self, shift_ns: int) -> Timeline:
        """The same on another clock."""
        if shift_ns == 0:
            return self
        return Timeline(
            names=self.names,
            start_ns_M=self.start_ns_M + shift_ns,
            end_ns_M=self.end_ns_M + shift_ns,
            name_M=self.name_M,
        )


def make_timeline(names: Sequence[str], start_ns: Int64, end_ns: Int64) -> Timeline:
    """A timeline of spans that may overlap, one name each; spans without length are left out.

    Raises:
        EnergyError: nothing has a length, or there are too many names.
    """
    start, end = np.asarray(start_ns, np.int64), np.asarray(end_ns, np.int64)
    kept = np.flatnonzero(end > start)
    if not len(kept):
        raise EnergyError("no span has a length; expected phases that last, capture the run again")
    kept_names = [names[i] for i in kept.tolist()]
    distinct = sorted(set(kept_names))
    if len(distinct) > MOST_NAMES:
        raise EnergyError(
            f"{len(distinct)} different names of spans; expected at most {MOST_NAMES}, choose fewer names"
        )
    number = {name: position for position, name in enumerate(distinct)}
    code = np.array([number[name] for name in kept_names], dtype=np.int64)
    edge_ns = np.concatenate([start[kept], end[kept]])
    order = np.argsort(edge_ns, kind="stable")
    change = np.zeros((len(order), len(distinct)), dtype=np.int32)
    change[np.arange(len(order)), np.tile(code, 2)[order]] = np.repeat([1, -1], len(kept))[order]
    running = (np.cumsum(change, axis=0) > 0) @ (1 << np.arange(len(distinct), dtype=np.int64))
    starts, ends, mask = edge_ns[order][:-1], edge_ns[order][1:], running[:-1]
    real = (ends > starts) & (mask > 0)
    starts, ends, mask = starts[real], ends[real], mask[real]
    masks, label = np.unique(mask, return_inverse=True)
    if len(masks) > _MOST_LABELS:
        raise EnergyError(
            f"spans of {len(distinct)} names overlap in {len(masks)} different ways; expected at most "
            f"{_MOST_LABELS}, choose fewer names"
        )
    labels = tuple(
        "+".join(name for position, name in enumerate(distinct) if value >> position & 1)
        for value in masks.tolist()
    )
    # Neighbours of the same label are one segment.
    fresh = np.ones(len(starts), dtype=bool)
    fresh[1:] = (label[1:] != label[:-1]) | (starts[1:] != ends[:-1])
    first = np.flatnonzero(fresh)
    return Timeline(
        names=labels,
        start_ns_M=starts[first],
        end_ns_M=ends[np.append(first[1:], len(starts)) - 1],
        name_M=label[first].astype(np.int64),
    )

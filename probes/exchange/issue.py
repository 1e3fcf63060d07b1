"""One collective as it was seen: what it moves, and when it began and ended.

Shapes: P members of the collective's group. Everything here is read from shapes and split lists on the host;
no tensor is kept, and none is looked into.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

__all__ = ["Issue", "Side", "per_peer_bytes", "side_of", "side_of_list"]

#: A point in time: monotonic nanoseconds of the host, or an event in the order of a CUDA stream.
Mark = int | torch.cuda.Event


@dataclass(frozen=True, slots=True)
class Side:
    """What one side of an exchange holds.

    Attributes:
        splits: rows per peer, (P,); empty when they are equal shares. With ``row_bytes`` None these are
            bytes per peer.
        rows: rows in total, the length of the first dimension.
        row_bytes: bytes of one row; None for a list of tensors.
        width: elements of one row, the largest in a list of tensors.
    """

    splits: tuple[int, ...]
    rows: int
    row_bytes: int | None
    width: int


def side_of(tensor: torch.Tensor, splits: Sequence[int]) -> Side:
    """Side of a tensor that is split along its first dimension."""
    shape = tensor.shape
    width = math.prod(shape[1:])
    return Side(tuple(splits), shape[0] if shape else 1, width * tensor.itemsize, width)


def side_of_list(tensors: Sequence[torch.Tensor]) -> Side:
    """Side of a list with one tensor per peer."""
    sizes = tuple(tensor.numel() * tensor.itemsize for tensor in tensors)
    width = max((math.prod(tensor.shape[1:]) for tensor in tensors), default=0)
    return Side(sizes, len(sizes), None, width)


def per_peer_bytes(side: Side, peers: int) -> list[int] | None:
    """Bytes to or from each of ``peers`` members, the member itself included.

    Returns:
        (P,) bytes, or None when the splits do not fit the group.
    """
    if side.row_bytes is None:
        return list(side.splits) if len(side.splits) == peers else None
    if not side.splits:
        return [side.rows * side.row_bytes // peers] * peers if peers else None
    return [rows * side.row_bytes for rows in side.splits] if len(side.splits) == peers else None


@dataclass(slots=True)
class Issue:
    """A collective in flight, then ended; shared by everybody who watches.

    Attributes:
        algorithm: name of the collective in ``torch.distributed``.
        group: the process group it runs on.
        device: where its tensors are.
        all_to_all: whether it is one, of any form.
        payload: whether its elements can be hidden states: floating point, or single bytes in wide rows.
        send, receive: what goes out and what comes in.
        start: before the call.
        end: when it was complete; None as long as it is not known.
        state: ``failed`` when it raised; ``unknown`` when its backend does not tell.
    """

    algorithm: str
    group: Any
    device: torch.device
    all_to_all: bool
    payload: bool
    send: Side
    receive: Side
    start: Mark = 0
    end: Mark | None = None
    state: Literal["running", "done", "failed", "unknown"] = "running"

    def finish(self, end: Mark) -> None:
        """It is complete."""
        self.end = end
        self.state = "done"

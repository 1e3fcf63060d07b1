"""One collective: what it moves, and when it started and ended.

Shapes: P members of the collective's group. Everything here is read from shapes and split lists on the host;
no tensor is kept, and none is looked into. What is kept is as raw as it comes: it is made on the program's
threads, and everything that can be worked out later is worked out on ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

#: A point in time: monotonic nanoseconds of the host, or an event in the order of a CUDA stream.
Mark = int | torch.cuda.Event


@dataclass(slots=True)
class Side:
    """What one side of an exchange holds; not frozen, which would double what it costs to make one.

    Attributes:
        shape: of the tensor; for a list of tensors its length and the width of the widest.
        item_bytes: bytes of one element.
        splits: rows per peer, (P,); empty when they are equal shares.
        in_bytes: ``splits`` are bytes per peer, not rows.
    """

    shape: Sequence[int]
    item_bytes: int
    splits: Sequence[int]
    in_bytes: bool = False

    @property
    def rows(self) -> int:
        """Rows in total, the length of the first dimension."""
        return self.shape[0] if self.shape else 1

    @property
    def width(self) -> int:
        """Elements of one row."""
        return math.prod(self.shape[1:])


def side_of(tensor: torch.Tensor, splits: Sequence[int]) -> Side:
    """Side of a tensor that is split along its first dimension."""
    return Side(tensor.shape, tensor.itemsize, splits)


def side_of_list(tensors: Sequence[torch.Tensor]) -> Side:
    """Side of a list with one tensor per peer."""
    widest = max((math.prod(tensor.shape[1:]) for tensor in tensors), default=0)
    return Side((len(tensors), widest), 1, [tensor.nbytes for tensor in tensors], True)


def per_peer_bytes(side: Side, peers: int) -> list[int] | None:
    """Bytes to or from each of ``peers`` members, the member itself included.

    Returns:
        (P,) bytes, or None when the splits do not fit the group.
    """
    if side.in_bytes:
        return list(side.splits) if len(side.splits) == peers else None
    row_bytes = side.width * side.item_bytes
    if not side.splits:
        return [side.rows * row_bytes // peers] * peers if peers else None
    return [rows * row_bytes for rows in side.splits] if len(side.splits) == peers else None


@dataclass(slots=True)
class Issue:
    """A collective in flight, then ended; shared by everybody who watches.

    Attributes:
        algorithm: name of the collective in ``torch.distributed``.
        device: where its tensors are.
        dtype: of their elements.
        send, receive: what goes out and what comes in.
        start: before the call.
        end: when it was complete; None as long as it is not known.
        blocking: the program goes on when it is over; None where that is not known.
        state: ``failed`` when it raised; ``unknown`` when its backend does not report it.
    """

    algorithm: str
    device: torch.device
    dtype: torch.dtype
    send: Side
    receive: Side
    start: Mark = 0
    end: Mark | None = None
    blocking: bool | None = None
    state: Literal["running", "done", "failed", "unknown"] = "running"

    @property
    def differentiable(self) -> bool:
        """Whether a gradient of it can exist."""
        return self.dtype.is_floating_point or self.dtype.is_complex

    @property
    def is_all_to_all(self) -> bool:
        """Whether every rank sends something of its own to every other."""
        return self.algorithm.startswith("all_to_all")

    @property
    def carries_rows(self) -> bool:
        """Whether they can be hidden states: floats, or single bytes in wide rows of an all-to-all."""
        if self.differentiable:
            return True
        packed = self.dtype.itemsize == 1 and self.dtype is not torch.bool
        return packed and self.is_all_to_all and self.send.width > 1

    def finish(self, end: Mark) -> None:
        """It is complete."""
        self.end = end
        self.state = "done"

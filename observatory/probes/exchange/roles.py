"""Which exchange of an MoE layer is the dispatch and which the combine.

Rules, for the exchanges of one call of an MoE block:

* before the layer has routed, and for anything but floating-point (or one-byte) rows, the role is ``other``:
  counts, masks, all-to-alls of sequence-parallel attention;
* an all-to-all that sends what an earlier dispatch of the same group received, and receives what it sent, is
  its ``combine``; each dispatch is combined once;
* one whose rows are less than half as wide as those of the layer's first dispatch accompanies it (gate
  weights, quantisation scales, indices): ``other``;
* what remains of the all-to-alls is a ``dispatch``; a hierarchical one has several.
* where no all-to-all dispatches, an all-gather may: of rows at least half as wide as the block's input, which
  leaves out gate weights and the flat weights of sharded data parallelism. The reduce-scatter of as much in
  the same group is its ``combine``. Beside an all-to-all both belong to tensor parallelism: ``other``.

Two dispatches in a row whose splits happen to be the mirror of each other cannot be told from a dispatch and
its combine; programs that label their exchanges (``observatory.probes.exchange.labels.labelled``) are
believed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from observatory.probes.timeline.issue import Issue, Side

Role = str
#: Group, what goes to and what comes from each member, elements of a row.
Way = tuple[str, tuple[int, ...], tuple[int, ...], int]
_Open = tuple[str, tuple[int, ...], tuple[int, ...]]


def way_of(issue: Issue, group: str, *, back: bool = False) -> Way:
    """Who sends what to whom in an exchange; with ``back``, in the one whose gradient it would carry."""
    if not issue.is_all_to_all:
        return group, _whole(issue), (), 0
    sends, receives = _rows(issue.send), _rows(issue.receive)
    return (group, receives, sends, issue.send.width) if back else (group, sends, receives, issue.send.width)


@dataclass(slots=True)
class LayerCall:
    """One call of an MoE block, as far as its exchanges go.

    Attributes:
        layer: MoE layer.
        hidden: elements per row of the block's input; 0 where that is not known.
        routed: the layer's router has been at work in this call.
        width: elements per row of the first all-to-all that dispatched; 0 before it.
        open: dispatches that were not combined yet.
        combined: a dispatch was combined.
    """

    layer: int
    hidden: int = 0
    routed: bool = False
    width: int = 0
    open: list[_Open] = field(default_factory=list)
    combined: bool = False

    def role(self, issue: Issue, group: str) -> Role:
        """Role of an exchange that is started now."""
        if not (self.routed and issue.carries_rows):
            return "other"
        if not issue.is_all_to_all:
            return self._role_of_gather(issue, group)
        width = max(issue.send.width, issue.receive.width)
        if 2 * width < self.width:
            return "other"
        sends, receives = _rows(issue.send), _rows(issue.receive)
        if (group, receives, sends) in self.open:
            self.open.remove((group, receives, sends))
            self.combined = True
            return "combine"
        self.width = self.width or width
        self.open.append((group, sends, receives))
        return "dispatch"

    def _role_of_gather(self, issue: Issue, group: str) -> Role:
        flat = len(issue.send.shape) < 2
        if self.width or not self.hidden or flat or 2 * issue.send.shape[-1] < self.hidden:
            return "other"
        way = (group, _whole(issue), ())
        if issue.algorithm.startswith("all_gather"):
            self.open.append(way)
            return "dispatch"
        if way not in self.open:
            return "other"
        self.open.remove(way)
        self.combined = True
        return "combine"


def _whole(issue: Issue) -> tuple[int, ...]:
    """Elements of the gathered or scattered whole, in total and of one row."""
    return math.prod(issue.send.shape), issue.send.shape[-1] if issue.send.shape else 1


def _rows(side: Side) -> tuple[int, ...]:
    """Rows per peer; for equal shares their total, for a list of tensors the bytes."""
    return tuple(side.splits) or (side.rows,)

"""Which exchange of an MoE layer is the dispatch and which the combine.

Rules, for the exchanges of one call of an MoE block:

* before the layer has routed, and for anything but an all-to-all of floating point (or one-byte) rows, the
  role is ``other``: counts, gathers, all-to-alls of sequence-parallel attention;
* an exchange that sends what an earlier dispatch of the same group received, and receives what it sent, is
  its ``combine``; each dispatch is combined once;
* one whose rows are less than half as wide as those of the layer's first dispatch accompanies it (gate
  weights, quantisation scales, indices): ``other``;
* what remains is a ``dispatch``; a hierarchical one has several.

Two dispatches in a row whose splits happen to be the mirror of each other cannot be told from a dispatch and
its combine; programs that label their exchanges (``collectives.recorder.labelled``) are believed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from probes.exchange.issue import Issue, Side

__all__ = ["LayerCall", "Role"]

Role = str
_Way = tuple[str, tuple[int, ...], tuple[int, ...]]


@dataclass(slots=True)
class LayerCall:
    """One call of an MoE block, as far as its exchanges go.

    Attributes:
        layer: MoE layer.
        routed: the layer's router has been at work in this call.
        width: elements per row of the first dispatch; 0 before it.
        open: dispatches that were not combined yet.
        combined: a dispatch was combined.
    """

    layer: int
    routed: bool = False
    width: int = 0
    open: list[_Way] = field(default_factory=list)
    combined: bool = False

    def role(self, issue: Issue, group: str) -> Role:
        """Role of an exchange that is started now."""
        if not (self.routed and issue.carries_rows):
            return "other"
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


def _rows(side: Side) -> tuple[int, ...]:
    """Rows per peer; for equal shares their total, for a list of tensors the bytes."""
    return tuple(side.splits) or (side.rows,)

"""Where in the model an exchange happens: hooks on the MoE blocks, and links from backward to forward.

A block is the module around a routing site (around the router or the experts). Its hooks say on which thread
which layer is being computed. Gradients travel without hooks: an exchange that is started while autograd runs
a node is linked to the exchange of that node's forward by autograd's own sequence number, which the node
carries; nothing is put into the graph. Where that says too little, an exchange belongs to one that sent what
it receives, and received what it sends: to the only such one where a node stands for several exchanges
(compiled code), to the latest where a program numbers its nodes anew to have them run earlier. Else the layer
stays None.

Which exchange is the dispatch and which the combine, by rules for the exchanges of one call of a block:

* before the layer has routed, and for anything but floating-point (or one-byte) rows, the role is ``other``:
  counts, masks, all-to-alls of sequence-parallel attention;
* an all-to-all that sends what an earlier dispatch of the same group received, and receives what it sent, is
  its ``combine``; each dispatch is combined once;
* one whose rows are less than half as wide as those of the layer's first dispatch accompanies it (gate
  weights, quantisation scales, indices): ``other``;
* what remains of the all-to-alls is a ``dispatch``; a hierarchical one has several.
* where no all-to-all dispatches, an all-gather may: of rows at least half as wide as the block's input, which
  leaves out gate weights and the flat weights of sharded data parallelism. The reduce-scatter of as much in
  the same group is its ``combine``. Next to an all-to-all both belong to tensor parallelism: ``other``.

Of these rules only what must be seen at once is looked at on the program's threads (``Attribution.here``):
the block, whether it has routed, autograd's numbers. The rest is worked out on another thread from the
exchanges in their order (``Attribution.find``).

Two dispatches in a row whose splits happen to mirror each other look like a dispatch and its combine;
programs that label their exchanges (``observatory.probes.exchange.labels.labelled``) are believed.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from observatory.probes.routing.attachment import NO_KWARGS, Attachment
from observatory.probes.routing.sites import RoutingSite
from observatory.probes.timeline.issue import Issue, Mark, Side

#: ``dispatch``, ``combine`` or ``other``, or what a label states.
Role = str
#: Group, what goes to and what comes from each member, elements of a row.
Way = tuple[str, tuple[int, ...], tuple[int, ...], int]
#: A dispatch that was not combined yet: group, what goes to and what comes from each member.
_Dispatch = tuple[str, tuple[int, ...], tuple[int, ...]]

#: Forward exchanges whose gradient may still come; older ones are forgotten. 64 for each of 1024 layers.
_MOST_LINKS = 1 << 16
#: Those among which a gradient is looked for whose node was numbered anew: those of a step, as a rule.
_MOST_RECENT = 1 << 12
#: Role of the exchange that carries the gradient.
_REVERSED: dict[Role, Role] = {"dispatch": "combine", "combine": "dispatch", "other": "other"}

#: (layer, device, start of the block's call) -> None
NoteSpan = Callable[[int, torch.device, Mark], None]
MarkNow = Callable[[torch.device], Mark | None]


_NO_GRAPH = -1


def in_backward() -> bool:
    """Whether autograd runs a graph on this thread, recomputation of checkpointed layers included."""
    return torch._C._current_graph_task_id() != _NO_GRAPH


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
        phase: that it routed in, of a call whose hooks were compiled away; None of others.
        is_torn: an exchange of it was lost, and with it what the others are.
    """

    layer: int
    hidden: int = 0
    routed: bool = False
    width: int = 0
    open: list[_Dispatch] = field(default_factory=list)
    combined: bool = False
    phase: str | None = None
    is_torn: bool = False

    @property
    def is_over(self) -> bool:
        """Whether hooks that were compiled away would have ended it: all that was sent has come back."""
        return self.phase is not None and self.combined and not self.open

    def role(self, issue: Issue, group: str, *, routed: bool) -> Role:
        """Role of the next exchange, started after or before the layer has routed."""
        if self.is_torn or not (routed and issue.carries_rows):
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


@dataclass(slots=True, eq=False)
class _Link:
    """An exchange of a forward pass, whose gradient may come.

    Attributes:
        layer: MoE layer.
        role: its role.
        way: who sent what to whom.
        used: its gradient has come.
    """

    layer: int
    role: Role
    way: Way
    used: bool = False


@dataclass(slots=True)
class _BlockCall:
    """A block that is being computed.

    Attributes:
        block: the module.
        call: its exchanges so far.
        start: when it was entered; None inside the capture of a CUDA graph.
        graph: run of autograd that it was entered in, as a recomputed block is.
    """

    block: nn.Module
    call: LayerCall
    start: Mark | None
    graph: int


class _Stack(threading.local):
    """What this thread is computing."""

    def __init__(self) -> None:
        self.calls: list[_BlockCall] = []
        self.loose: LayerCall | None = None


#: Seen at the start of an exchange: the call it belongs to (None: none, or autograd's), that call's layer
#: and whether it has routed; the call whose hooks were compiled away; whether autograd runs a graph, and its
#: number of the node that is running or being made.
Place = tuple[LayerCall | None, int | None, bool, LayerCall | None, bool, int | None]


class Attribution:
    """Knows the layer and the role of an exchange that is started now."""

    def __init__(self, *, mark: MarkNow, note_span: NoteSpan) -> None:
        self._mark = mark
        self._note_span = note_span
        self._stack = _Stack()
        self._links: dict[int, _Link | None] = {}
        self._recent: deque[_Link] = deque()
        self._ways: dict[Way, deque[_Link]] = {}
        self._latest_number = -1
        self._attachments: list[Attachment] = []

    def attach(self, model: nn.Module, sites: Sequence[RoutingSite]) -> None:
        """Put the hooks on; all of them or, when one cannot be put on, none."""
        modules = dict(model.named_modules())
        blocks: dict[nn.Module, int] = {}
        try:
            for site in sites:
                blocks.setdefault(_block(site, modules), site.spec.layer)
            for block, layer in blocks.items():
                self._attach_block(block, layer)
            for site in sites:
                self._attach_site(site)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Take all hooks off; doing it twice does nothing."""
        while self._attachments:
            self._attachments.pop().remove()

    def pause(self) -> None:
        """Take all hooks off until `resume`."""
        for attachment in self._attachments:
            attachment.pause()

    def resume(self) -> None:
        """Put them on again."""
        for attachment in self._attachments:
            attachment.resume()

    def restore_hooks(self) -> bool:
        """Put hooks on again that another library has taken off; whether there were any."""
        lost = [attachment for attachment in self._attachments if not attachment.is_on()]
        for attachment in lost:
            attachment.restore()
        return bool(lost)

    def routed(self, layer: int, phase: str) -> None:
        """A layer has routed on this thread; needed where its hooks were compiled away."""
        stack = self._stack
        if not stack.calls:
            stack.loose = LayerCall(layer, routed=True, phase=phase)

    def loose(self) -> LayerCall | None:
        """The call on this thread whose hooks were compiled away; None outside any, or when it is over."""
        return self._stack.loose

    def boundary(self) -> None:
        """A step ends on this thread: what comes next belongs to no layer that routed before."""
        self._stack.loose = None

    def here(self) -> Place:
        """What has to be seen of an exchange when it is started, on its thread."""
        stack = self._stack
        loose = stack.loose
        graph = torch._C._current_graph_task_id()
        if stack.calls and stack.calls[-1].graph == graph:
            call = stack.calls[-1].call
        elif graph != _NO_GRAPH:  # also where a block runs the backward pass of something else inside
            node: Any = torch._C._current_autograd_node()
            return None, None, False, loose, True, None if node is None else node._sequence_nr()
        elif loose is not None:
            call = loose
        else:
            return None, None, False, None, False, None
        # The node of this exchange is being made: its number was taken last on this thread.
        number = torch._C._autograd._get_sequence_nr() - 1
        return call, call.layer, call.routed, loose, graph != _NO_GRAPH, number

    def find(self, issue: Issue, group: str, place: Place) -> tuple[Role, int | None]:
        """Role and layer of an exchange; called for one after the other, in their order."""
        call, layer, routed, _loose, in_graph, number = place
        if call is None or call.is_over:
            return self._linked(issue, group, number) if in_graph and call is None else ("other", None)
        assert layer is not None
        assert number is not None
        role = call.role(issue, group, routed=routed)
        if issue.differentiable:
            self._remember(_Link(layer, role, way_of(issue, group)), number)
        return role, layer

    def _remember(self, link: _Link, number: int) -> None:
        former = self._links.get(number, link)
        # two exchanges in one node: which gradient is whose is not known
        is_same = former is not None and (former.layer, former.role) == (link.layer, link.role)
        self._links[number] = link if is_same else None
        self._latest_number = max(self._latest_number, number)
        if len(self._links) > _MOST_LINKS:
            del self._links[next(iter(self._links))]
        self._recent.append(link)
        self._ways.setdefault(link.way, deque()).append(link)
        if len(self._recent) > _MOST_RECENT:
            oldest = self._recent.popleft()
            self._ways[oldest.way].popleft()
            if not self._ways[oldest.way]:
                del self._ways[oldest.way]

    def _linked(self, issue: Issue, group: str, number: int | None) -> tuple[Role, int | None]:
        if number is None:
            return "other", None
        link = self._links.get(number)
        renumbered = number > self._latest_number
        if renumbered or (link is None and number in self._links):
            dispatches = self._ways.get(way_of(issue, group, back=True), ())
            open_ones = [other for other in dispatches if not other.used]
            if renumbered or len({(other.layer, other.role) for other in open_ones}) == 1:
                link = open_ones[-1] if open_ones else None
        if link is None:
            return "other", None
        link.used = True
        return _REVERSED[link.role], link.layer

    def _attach_block(self, block: nn.Module, layer: int) -> None:
        device = next((p.device for p in block.parameters()), torch.device("cpu"))

        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] = NO_KWARGS) -> None:
            if torch.compiler.is_compiling():
                return
            calls = self._stack.calls
            if any(other.block is block for other in calls):
                leave(block, (), {}, None)  # its end was in compiled code, where this hook is not
            graph = torch._C._current_graph_task_id()
            call = LayerCall(layer, _width((*args, *kwargs.values())))
            calls.append(_BlockCall(block, call, self._mark(device), graph))

        def leave(_module: nn.Module, _args: tuple[Any, ...], _kwargs: Any, _output: Any = None) -> None:
            if torch.compiler.is_compiling():
                return
            calls = self._stack.calls
            while calls:
                ended = calls.pop()
                if ended.block is block:
                    if ended.start is not None:
                        self._note_span(ended.call.layer, device, ended.start)
                    return

        self._attachments.append(Attachment(block, before=enter, after=leave))

    def _attach_site(self, site: RoutingSite) -> None:
        layer = site.spec.layer

        def enter(_module: nn.Module, _args: tuple[Any, ...], _kwargs: Mapping[str, Any] = NO_KWARGS) -> None:
            if torch.compiler.is_compiling() or not self._stack.calls:
                return
            call = self._stack.calls[-1].call
            call.layer, call.routed = layer, True

        self._attachments.append(Attachment(site.module, before=enter))


def _width(given: Sequence[Any]) -> int:
    """Elements per row of the first argument that holds rows; 0 where there is none."""
    tensors = (value for value in given if isinstance(value, torch.Tensor))
    rows = (tensor for tensor in tensors if tensor.is_floating_point() and tensor.dim() > 1)
    return next((int(tensor.shape[-1]) for tensor in rows), 0)


def _block(site: RoutingSite, modules: dict[str, nn.Module]) -> nn.Module:
    """The module around the site; the site's own where that is the model or a list of layers."""
    path = next((name for name, module in modules.items() if module is site.module), "")
    parent = modules.get(path.rpartition(".")[0]) if path else None
    return site.module if parent is None or isinstance(parent, nn.ModuleList | nn.ModuleDict) else parent

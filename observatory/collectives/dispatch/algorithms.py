"""The algorithms of dispatch, and the choice among them by name.

Shapes: T input rows of a step, N rows sent, R rows received, G members, K assignments, M slots in a row;
P ranks, A tokens of all ranks, H hidden size.

Flat and hierarchical dispatch use all-to-all-v: one step over the world, or one between nodes and one inside
them.

Hierarchical, from rank (node a, place i) to an expert on rank (node b, place j): first across to (b, i), once
for every token and destination node; then inside node b to (b, j). Between nodes first, because only then one
copy serves all ranks of the destination node; inside first, a token would cross once per destination place.
Outputs are summed at (b, i) before they cross back, again one row per token and node.

Gather chooses nothing: an all-gather brings the tokens of all ranks to all, a reduce-scatter sums what the
experts of each rank add, at the tokens' sources. It moves P - 1 copies of every token whatever the routing,
and is never unbalanced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch

from observatory.collectives.autograd import Exchanger
from observatory.collectives.dispatch.base import Dispatcher, LocalExperts
from observatory.collectives.dispatch.plan import DispatchPlan, ExpertMap
from observatory.collectives.layout import Group
from observatory.errors import ExchangeError
from observatory.probes.exchange.labels import Label, labelled

Algorithm = Literal["flat", "hierarchical", "gather"]
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One exchange of the way to the experts.

    Attributes:
        group: who takes part.
        deduplicate: send a row once per member, however many of its experts are behind that member.
    """

    group: Group
    deduplicate: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sent:
    """What is needed to bring the outputs of one step back."""

    step: Step
    plan: DispatchPlan
    rows: int
    receive_G: tuple[int, ...]


class SteppedDispatcher(Dispatcher):
    """Runs its steps one after the other, and back in reverse order."""

    name: ClassVar[str] = "stepped"
    _calls = 0

    def steps(self) -> tuple[Step, ...]:
        """The way to the experts."""
        raise NotImplementedError

    def __call__(
        self, hidden_TH: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """Outputs of the experts; see :class:`Dispatcher`."""
        self._calls += 1
        rows, weights, slots = hidden_TH, weights_TK, self.route(expert_ids_TK)
        way: list[_Sent] = []
        for step in self.steps():
            plan, receive_G = self.count_exchange(slots, step)
            packed = self.pack(plan, rows, weights)
            way.append(_Sent(step=step, plan=plan, rows=rows.shape[0], receive_G=receive_G))
            rows, weights, slots = self.dispatch(packed, way[-1])
        outputs = self.experts(rows, slots, weights)
        for sent in reversed(way):
            outputs = self.unpack(sent, self.combine(sent, outputs))
        return outputs

    def count_exchange(self, slots_TK: torch.Tensor, step: Step) -> tuple[DispatchPlan, tuple[int, ...]]:
        """Phase: plan what to send, and learn what will come; (plan, rows from each member)."""
        with self._span("count_exchange"):
            members = self._transport.layout.members(step.group)
            plan = DispatchPlan.make(
                slots_TK,
                self._member_of_Z(step.group, members),
                len(members),
                deduplicate=step.deduplicate,
            )
            head = (-1 if self.layer is None else self.layer, self._calls)
            announced = torch.tensor([[rows, *head] for rows in plan.send_G])
            with labelled(Label(role="other", layer=self.layer, algorithm=self.name)):
                received = self._transport.exchange_counts(announced, group=step.group)
            for member, (_, layer, call) in zip(members, received.tolist(), strict=True):
                if (layer, call) != head:
                    raise ExchangeError(
                        f"rank {member} is in call {call} of MoE layer {layer} while rank "
                        f"{self._transport.rank} is in call {head[1]} of layer {head[0]}; all ranks must run "
                        "the same layers and the same number of steps, those without tokens too"
                    )
            return plan, tuple(received[:, 0].tolist())

    def pack(
        self, plan: DispatchPlan, rows_TH: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Phase: the rows to send, sorted by destination, with weights and slots."""
        with self._span("pack"):
            return rows_TH[plan.source_N], plan.weights(weights_TK), plan.slots_NM.to(torch.int32)

    def dispatch(
        self, packed: tuple[torch.Tensor, torch.Tensor, torch.Tensor], sent: _Sent
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Phase: rows, weights and slots received."""
        with self._span("dispatch"):
            rows, weights, slots = self._exchanger.exchange(
                packed,
                sent.plan.send_G,
                sent.receive_G,
                label=self._label("dispatch"),
                group=sent.step.group,
            )
            return rows, weights, slots.long()

    def combine(self, sent: _Sent, outputs_RH: torch.Tensor) -> torch.Tensor:
        """Phase: outputs of the rows that this rank sent, in the order in which it sent them."""
        with self._span("combine"):
            (returned,) = self._exchanger.exchange(
                [outputs_RH],
                sent.receive_G,
                sent.plan.send_G,
                label=self._label("combine"),
                group=sent.step.group,
            )
            return returned

    def unpack(self, sent: _Sent, returned_NH: torch.Tensor) -> torch.Tensor:
        """Phase: outputs summed over the rows of each input row, (T, H)."""
        with self._span("unpack"):
            summed = returned_NH.new_zeros((sent.rows, returned_NH.shape[1]))
            return summed.index_add(0, sent.plan.source_N, returned_NH)

    def _member_of_Z(self, group: Group, members: tuple[int, ...]) -> torch.Tensor:
        """The member of the group on the way to each slot."""
        layout = self._transport.layout
        if group == "across":
            toward_P = list(layout.node_of_P)
        else:
            place = {rank: index for index, rank in enumerate(members)}
            toward_P = [place.get(rank, -1) for rank in range(layout.size)]
        return torch.tensor(toward_P)[self._map.rank_of_Z]


class FlatDispatcher(SteppedDispatcher):
    """Every row goes straight to the rank of its expert."""

    name: ClassVar[str] = "flat"

    def steps(self) -> tuple[Step, ...]:
        """One step over the world."""
        return (Step(group="world", deduplicate=self._deduplicate),)


class HierarchicalDispatcher(SteppedDispatcher):
    """Rows cross between nodes once; the order is that of this module."""

    name: ClassVar[str] = "hierarchical"

    def steps(self) -> tuple[Step, ...]:
        """Across to the rank of the same place on the destination node, then inside it."""
        return (
            Step(group="across", deduplicate=True),
            Step(group="node", deduplicate=self._deduplicate),
        )


class GatherDispatcher(Dispatcher):
    """All-gather, experts, reduce-scatter; deduplicated by nature."""

    name: ClassVar[str] = "gather"
    _calls = 0

    def __call__(
        self, hidden_TH: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """Outputs of the experts; see :class:`Dispatcher`."""
        self._calls += 1
        slots_TK = self.route(expert_ids_TK)
        rows_P = self.count_exchange(hidden_TH.shape[0])
        packed = self.pack(hidden_TH, weights_TK, slots_TK)
        hidden_AH, weights_AK, slots_AK = self.dispatch(packed, rows_P)
        return self.unpack(self.combine(self.experts(hidden_AH, slots_AK, weights_AK), rows_P))

    def count_exchange(self, tokens: int) -> tuple[int, ...]:
        """Phase: tokens of each rank, (P,)."""
        with self._span("count_exchange"), labelled(self._label("other")):
            head = (-1 if self.layer is None else self.layer, self._calls)
            announced = torch.tensor([[tokens, *head]] * self._transport.size)
            received = self._transport.exchange_counts(announced).tolist()
            for rank, (_, layer, call) in enumerate(received):
                if (layer, call) != head:
                    raise ExchangeError(
                        f"rank {rank} is in call {call} of MoE layer {layer} while rank "
                        f"{self._transport.rank} is in call {head[1]} of layer {head[0]}; all ranks must run "
                        "the same layers and the same number of steps, those without tokens too"
                    )
            return tuple(rows for rows, _, _ in received)

    def pack(
        self, hidden_TH: torch.Tensor, weights_TK: torch.Tensor, slots_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Phase: the rows, with weights and slots."""
        with self._span("pack"):
            return hidden_TH, weights_TK, slots_TK.to(torch.int32)

    def dispatch(
        self, packed: tuple[torch.Tensor, torch.Tensor, torch.Tensor], rows_P: tuple[int, ...]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Phase: rows, weights and slots of all ranks."""
        with self._span("dispatch"):
            rows, weights, slots = self._exchanger.gather(packed, rows_P, label=self._label("dispatch"))
            return rows, weights, slots.long()

    def combine(self, outputs_AH: torch.Tensor, rows_P: tuple[int, ...]) -> torch.Tensor:
        """Phase: outputs summed over ranks, at the tokens' source."""
        with self._span("combine"):
            return self._exchanger.reduce_scatter(outputs_AH, rows_P, label=self._label("combine"))

    def unpack(self, outputs_TH: torch.Tensor) -> torch.Tensor:
        """Phase: nothing is left to do; the span says so."""
        with self._span("unpack"):
            return outputs_TH


_CLASSES: dict[Algorithm, type[Dispatcher]] = {
    "flat": FlatDispatcher,
    "hierarchical": HierarchicalDispatcher,
    "gather": GatherDispatcher,
}


def make_dispatcher(
    algorithm: Algorithm,
    exchanger: Exchanger,
    experts: ExpertMap,
    local: LocalExperts,
    *,
    layer: int | None = None,
    deduplicate: bool = False,
) -> Dispatcher:
    """The dispatcher of one layer.

    Raises:
        ExchangeError: no such algorithm, or the nodes do not fit it.
    """
    if algorithm not in _CLASSES:
        raise ExchangeError(f"algorithm {algorithm!r} does not exist; expected {', '.join(ALGORITHMS)}")
    if algorithm == "hierarchical":
        exchanger.transport.layout.members("across")
    return _CLASSES[algorithm](exchanger, experts, local, layer=layer, deduplicate=deduplicate)

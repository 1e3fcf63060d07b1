"""Whether what was read of one site is what its experts compute: by rows, else by intervention.

Shapes: T tokens, K assignments per token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from observatory.errors import ModelError
from observatory.records import Verified
from observatory.store.files import one_line
from probes.routing.sites import RoutingDecision, RoutingSite, may_drop_inside
from probes.routing.stacks import SeenOperators, Stack, changed_part, find_stacks
from probes.routing.witness import (
    RowsOfExperts,
    chosen_by_intervention,
    few_tokens,
    loads_of_decision,
    rows_as_decision,
)

__all__ = ["BlockCall", "Judgement", "Verify", "is_captured", "stacks_of_site"]

_HELP = "pass an Adapter that reads what is dispatched (docs/supported-models.md#adapters)"

#: Which calls are checked: the rows of the first, the rows of all, the first by intervention, or none.
Verify = Literal["first", "rows", "intervention", "none"]


class BlockCall:
    """One call of a block, and what was read and seen in it.

    Attributes:
        block: the block.
        args: positional arguments.
        kwargs: keyword arguments.
        decisions: what was read, one for each call of the site.
        rows_E: rows that each expert was used with, None where they were not seen.
        operators: what was seen of its operators; None where they were not looked at.
    """

    def __init__(
        self,
        block: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        decisions: Sequence[RoutingDecision],
        rows_E: list[int] | None,
        operators: SeenOperators | None,
    ) -> None:
        self.block, self.args, self.kwargs = block, args, kwargs
        self.decisions = decisions
        self.rows_E = operators.rows_E() if rows_E is None and operators is not None else rows_E
        self.operators = operators


class Judgement:
    """The verdicts on one site.

    Attributes:
        verdicts: what confirmed the readings, per training flag of the block.
        is_contradicted: the experts compute something else than the gates say, which are counted.
        is_replaceable: readings cannot see what is dispatched, so that rows are looked at in every call, and
            counted in the place of readings from which they differ.
    """

    def __init__(self, site: RoutingSite, verify: Verify, rows: RowsOfExperts, *, rerun: Rerun) -> None:
        self.verdicts: dict[bool, Verified] = {}
        self.is_contradicted = False
        self.is_replaceable = site.infers or may_drop_inside(site)
        self._site = site
        self._verify = verify
        self._rows = rows
        self._rerun = rerun

    def wants(self, *, training: bool) -> bool:
        """Whether a call is to be judged."""
        if self.is_replaceable or self._verify == "rows":
            return True
        return self._verify != "none" and training not in self.verdicts

    def judge(self, call: BlockCall) -> Sequence[RoutingDecision]:
        """What is to be counted of a call: what was read, or the rows in its place.

        Raises:
            ModelError: the witnesses contradict the reading, or it was inferred and there is none.
        """
        try:
            return self._judge(call)
        except ModelError as error:
            if not self._site.shows_gates:
                raise
            self.is_contradicted = True
            self.verdicts[call.block.training] = Verified(by="none", reason=one_line(error))
            return call.decisions

    def _judge(self, call: BlockCall) -> Sequence[RoutingDecision]:
        mode, spec = call.block.training, self._site.spec
        is_inferred = any(d.is_inferred for d in call.decisions)
        decisions = (
            _as_chosen(call.decisions, call.operators, spec.experts) if is_inferred else call.decisions
        )
        counted_E, tokens = _sum_of_loads(decisions, spec.experts), sum(d.tokens or 0 for d in decisions)
        rows_E = call.rows_E
        if rows_E is None and not any(counted_E):  # no tokens, or none that counts
            return decisions
        is_dense = rows_E is not None and set(rows_E) == {tokens} and rows_E != counted_E
        if rows_E is None or is_dense or (self._verify == "intervention" and mode not in self.verdicts):
            self._judge_by_intervention(call, rows_E == counted_E, is_inferred=is_inferred, is_dense=is_dense)
        elif rows_E == counted_E:
            self.verdicts.setdefault(mode, Verified(by="rows"))
        elif is_inferred or (self.is_replaceable and sum(rows_E) < sum(counted_E)):
            self._replace(mode, counted_E, rows_E)
            return [rows_as_decision(rows_E, tokens, device=decisions[0].device)]
        else:
            self._judge_difference(call, counted_E, rows_E)
        return decisions

    def unconfirmed(self, reason: str) -> ModelError:
        """The refusal of an inferred reading."""
        return ModelError(
            f"what {self._site.spec.module} chooses is inferred from its logits, and {reason}, so that "
            f"nothing confirms it; {_HELP}"
        )

    def _judge_by_intervention(
        self, call: BlockCall, rows_agree: bool, *, is_inferred: bool, is_dense: bool
    ) -> None:
        """Judge a call whose rows are not seen or decide nothing, once in training and once in evaluation.

        Raises:
            ModelError: the experts compute something else, or an inferred reading cannot be confirmed.
        """
        mode = call.block.training
        if mode in self.verdicts and (self.verdicts[mode].by == "intervention" or not is_inferred):
            return
        if not (is_inferred or is_dense or self._verify == "intervention"):
            reason: str | None = "the rows of its experts are not visible, and no intervention was asked for"
            self.verdicts[mode] = Verified(by="none", reason=reason)
            return
        args, kwargs = few_tokens(call.args, call.kwargs)
        reason = self._intervene(call.block, args, kwargs, is_inferred=is_inferred)
        if reason is None:
            self.verdicts[mode] = Verified(by="intervention")
        elif is_inferred and not rows_agree:
            raise self.unconfirmed(reason)
        else:
            self.verdicts[mode] = Verified(by="rows" if rows_agree else "none", reason=reason)

    def _replace(self, mode: bool, counted_E: Sequence[int], rows_E: Sequence[int]) -> None:
        """Let rows take the place of what was read.

        Raises:
            ModelError: the rows are not those of this rank's tokens.
        """
        if sum(rows_E) > sum(counted_E):
            raise ModelError(
                f"the experts beside {self._site.spec.module} were called with {sum(rows_E)} rows where its "
                f"logits make {sum(counted_E)} assignments: rows of other ranks or of padding; {_HELP}"
            )
        reason = "the rows differ from what was read and are counted in its place"
        self.verdicts[mode] = Verified(by="rows", reason=reason)

    def _judge_difference(self, call: BlockCall, counted_E: Sequence[int], rows_E: Sequence[int]) -> None:
        """Judge rows that differ from a reading that saw the choice, once in training and once in evaluation.

        Rows without an assignment are possible (padding, tokens of other ranks), assignments without rows
        are not. An intervention with all tokens of the call decides where it is possible.

        Raises:
            ModelError: the experts compute something else.
        """
        mode = call.block.training
        if mode in self.verdicts and self.verdicts[mode].by != "rows":
            return
        if call.operators is not None and call.operators.saw_communication:
            reason: str | None = "its block exchanges data with other ranks"
        else:
            reason = self._intervene(call.block, call.args, call.kwargs, is_inferred=False)
            if reason is not None and any(r < c for r, c in zip(rows_E, counted_E, strict=True)):
                raise self._contradiction(counted_E, rows_E, is_inferred=False)
        self.verdicts[mode] = (
            Verified(by="intervention", reason="its experts compute further rows, which change nothing")
            if reason is None
            else Verified(by="none", reason=reason)
        )

    def _intervene(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, is_inferred: bool
    ) -> str | None:
        """Hold the reading of a call of the block against what its experts compute.

        Returns:
            None when they agree, else why nothing was shown.

        Raises:
            ModelError: they contradict each other.
        """
        if not self._site.is_repeatable:
            return "its experts are called by a module further out, which cannot be run again"
        experts = self._site.spec.experts
        stacks = [] if self._site.experts else stacks_of_site(self._site)
        if not self._site.experts and not stacks:
            return "the weights of its experts were not found, or are spread over ranks"

        @contextmanager
        def changed(expert: int) -> Iterator[None]:
            with self._rows.changed(expert) if self._site.experts else changed_part(stacks[-1], expert):
                yield

        try:
            with self._rerun() as decisions, SeenOperators([]) as operators:
                true_ET = chosen_by_intervention(block, args, kwargs, experts=experts, changed=changed)
        except ModelError:
            raise
        except Exception as error:
            return f"running its block again failed ({type(error).__name__}: {one_line(error, 200)})"
        if true_ET is None:
            return "running its block again gives another result"
        if not decisions or not true_ET.any():
            return "running its block again does not show which experts compute a token"
        # Of E + 2 runs all read the same: which experts are chosen does not depend on their weights.
        one_run = decisions[: len(decisions) // (experts + 2)]
        one_run = _as_chosen(one_run, operators, experts) if is_inferred else one_run
        counted_E = _sum_of_loads(one_run, experts)
        sure_E = _sum_of_loads([_with_weight(decision) for decision in one_run], experts)
        true_E = [int(n) for n in true_ET.sum(dim=1).tolist()]
        if not all(s <= t <= c for s, t, c in zip(sure_E, true_E, counted_E, strict=True)):
            raise self._contradiction(counted_E, true_E, is_inferred=is_inferred)
        return None

    def _contradiction(
        self, counted_E: Sequence[int], true_E: Sequence[int], *, is_inferred: bool
    ) -> ModelError:
        spec = self._site.spec
        expert = max(range(spec.experts), key=lambda e: abs(counted_E[e] - true_E[e]))
        source = "the top-k of the logits" if is_inferred else "the reading"
        cause = (
            "something else takes part in the choice (noise, a bias, a group limit, a threshold)"
            if is_inferred
            else "what is read is not what is dispatched"
        )
        return ModelError(
            f"in layer {spec.layer} {source} of {spec.module} gives {counted_E[expert]} tokens to expert "
            f"{expert}, which computes {true_E[expert]}: {cause}; {_HELP}"
        )


#: A context in which calls of the block are our own; what is read in them lies in the list that it gives.
Rerun = Callable[[], Any]


def stacks_of_site(site: RoutingSite) -> list[Stack]:
    """Stacked weights of a site's experts: right inside what is called, else in its block."""
    assert site.block is not None
    return find_stacks(site.module, site.spec.experts) or find_stacks(site.block, site.spec.experts)


def _as_chosen(
    decisions: Sequence[RoutingDecision], operators: SeenOperators | None, experts: int
) -> Sequence[RoutingDecision]:
    """The one inferred decision of a call, as an operator of the block chose it, where one was seen."""
    if operators is None or len(decisions) != 1 or decisions[0].expert_ids is None or not decisions[0].tokens:
        return decisions
    inferred_TK = decisions[0].expert_ids
    seen = operators.choice(
        tokens=decisions[0].tokens, experts=experts, top_k=inferred_TK.numel() // decisions[0].tokens
    )
    if seen is None:
        return decisions
    return [
        RoutingDecision(
            expert_ids=seen.reshape(inferred_TK.shape), tokens=decisions[0].tokens, is_inferred=True
        )
    ]


def _sum_of_loads(decisions: Sequence[RoutingDecision], experts: int) -> list[int]:
    loads = (loads_of_decision(decision, experts) for decision in decisions)
    return [sum(n) for n in zip(*loads, strict=True)]


def _with_weight(decision: RoutingDecision) -> RoutingDecision:
    """The decision without assignments whose weight is too small for an intervention to show them."""
    if decision.weights is None:
        return decision
    is_small = decision.weights.abs() <= 4 * torch.finfo(decision.weights.dtype).eps
    if decision.expert_ids is not None:
        return replace(decision, expert_ids=decision.expert_ids.masked_fill(is_small, -1))
    assert decision.routing_map is not None
    return replace(decision, routing_map=decision.routing_map.ne(0).masked_fill(is_small, 0))


def is_captured() -> bool:
    """Whether a CUDA graph is captured, in which nothing can be looked at."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()

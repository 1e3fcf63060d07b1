"""Whether what was read of one site is what its experts compute: by rows, else by intervention.

Shapes: T tokens, K assignments per token, E experts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from observatory.errors import ModelError
from observatory.probes.options import Verify
from observatory.probes.routing.sites import RoutingDecision, RoutingSite, may_drop_inside, shown_by
from observatory.probes.routing.stacks import SeenOperators, Stack, changed_parts, find_stacks
from observatory.probes.routing.witness import (
    RowsOfExperts,
    chosen_by_intervention,
    few_tokens,
    loads_of_decision,
    rows_as_decision,
    tokens_of,
)
from observatory.probes.routing.words import Witness, sentence_of, verdict, verdict_of
from observatory.reasons import Reason
from observatory.run.files import one_line
from observatory.run.manifest import Verified

_NEVER = sys.maxsize
_HELP = "pass an Adapter that reads what is dispatched (docs/supported-models.md#adapters)"

#: A context in which calls of the block are our own; what is read in them lies in the list that it gives.
Rerun = Callable[[], AbstractContextManager[list[RoutingDecision]]]


class BlockCall:
    """One call of a block, and what was read and seen in it.

    Attributes:
        block: the block.
        args: positional arguments.
        kwargs: keyword arguments.
        decisions: what was read, one for each call of the site.
        rows_E: rows that each expert was used with, None where they were not seen.
        operators: what was seen of its operators; None where they were not looked at.
        tokens: rows of its first floating-point argument; 0 without one.
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
        self.tokens = tokens_of(args, kwargs)


@dataclass(slots=True)
class Mode:
    """What is known of the calls in training, or of those in evaluation.

    Attributes:
        calls: calls that were made.
        due: the number of the call that is judged next.
        tokens: most tokens of a call that was judged.
        elements: most elements of a first argument, a tensor with a row for each token, in calls that were
            not to be judged: of one with no more, only ``due`` is to be asked. -1 where there was none.
        has_intervened: an intervention has decided.
        trusts_rows: it has shown that rows that differ from the reading are what the experts compute.
        needs_choice: the choice of an operator, not that of the logits, is what they compute.
    """

    calls: int = 0
    due: int = 1
    tokens: int = 0
    elements: int = -1
    has_intervened: bool = False
    trusts_rows: bool = False
    needs_choice: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shown:
    """What an intervention showed of one run of a block: assignments per expert.

    Attributes:
        true_E: tokens whose result each expert changed.
        counted_E: what was read.
        sure_E: the same without assignments of a weight too small to change a result.
        rows_E: rows that experts were used with; None where they were not seen.
    """

    true_E: list[int]
    counted_E: list[int]
    sure_E: list[int]
    rows_E: list[int] | None

    @property
    def confirms_reading(self) -> bool:
        return all(s <= t <= c for s, t, c in zip(self.sure_E, self.true_E, self.counted_E, strict=True))


class Judgement:
    """The verdicts on one site.

    Attributes:
        verdicts: what confirmed the readings, per training flag of the block.
        is_contradicted: the experts compute something else than the gates say, which are counted.
        is_replaceable: readings cannot see what is dispatched, so that rows are looked at in every call, and
            counted in the place of readings from which they differ; until a reading shows that they can.
        modes: what is known of calls, per training flag of the block.
    """

    def __init__(
        self,
        site: RoutingSite,
        verify: Verify,
        rows: RowsOfExperts,
        *,
        rerun: Rerun,
        is_taken: Callable[[], bool],
    ) -> None:
        self.verdicts: dict[bool, Verified] = {}
        self.is_contradicted = False
        self.is_replaceable = site.infers or may_drop_inside(site)
        self._site = site
        self._verify = verify
        self._rows = rows
        self._rerun = rerun
        self._is_taken = is_taken
        # Where no call is judged none is ever due; where all are, none is not.
        self.modes = {training: Mode(due=_NEVER if verify == "none" else 1) for training in (True, False)}

    def starts_call(self, *, training: bool, tokens: int) -> bool:
        """Take note of a call at its start; whether it is to be judged.

        Where not all calls are: the first, second, fourth, and so on, and one with more than twice the
        tokens of any before.
        """
        mode = self.modes[training]
        mode.calls += 1
        if self.is_replaceable or self._verify == "rows":
            return True
        return self._verify != "none" and self._is_due(mode, tokens)

    def note_routine(self, *, training: bool, elements: int) -> None:
        """A call with a first argument of so many elements was not to be judged."""
        mode = self.modes[training]
        mode.elements = max(mode.elements, elements)

    def wants_operators(self, *, training: bool) -> bool:
        """Whether rows need operators to be looked at, which costs more than hooks on experts."""
        mode = self.modes[training]
        return not self._site.experts or not self._is_settled(training) or mode.needs_choice

    def judge(self, call: BlockCall) -> Sequence[RoutingDecision]:
        """What is to be counted of a call: what was read, or the rows in its place.

        Raises:
            ModelError: the witnesses contradict the reading, or it was inferred and there is none.
        """
        mode = self.modes[call.block.training]
        if call.decisions and all(decision.is_dispatch for decision in call.decisions):
            self.is_replaceable = False
        try:
            return self._judge(call, mode)
        except ModelError as error:
            if not self._site.shows_gates or self._is_everything(call.decisions):
                raise
            self.is_contradicted = True
            self.verdicts[call.block.training] = verdict("none", Witness.CONTRADICTED, error=one_line(error))
            return call.decisions
        finally:
            if self._is_due(mode, call.tokens):
                mode.due = 2 * mode.calls if mode.calls >= mode.due else mode.due
                mode.tokens = max(mode.tokens, call.tokens)

    def unconfirmed(self, reason: Reason) -> ModelError:
        """The refusal of an inferred reading."""
        return ModelError(
            f"what {self._site.spec.module} chooses is inferred from its logits, and {sentence_of(reason)}, "
            f"so that nothing confirms it; {_HELP}"
        )

    def _is_everything(self, decisions: Sequence[RoutingDecision]) -> bool:
        """Whether all tokens are given to all experts, though each is to have fewer."""
        tokens = _tokens(decisions)
        loads = set(_sum_of_loads(decisions, self._site.spec.experts))
        return loads == {tokens} and self._site.spec.top_k not in (None, self._site.spec.experts)

    def _is_due(self, mode: Mode, tokens: int) -> bool:
        return mode.calls >= mode.due or tokens > 2 * mode.tokens

    def _is_settled(self, training: bool) -> bool:
        return training in self.verdicts and not self._is_due(self.modes[training], 0)

    def _judge(self, call: BlockCall, mode: Mode) -> Sequence[RoutingDecision]:
        spec, training, rows_E = self._site.spec, call.block.training, call.rows_E
        is_inferred = any(d.is_inferred for d in call.decisions)
        decisions = call.decisions
        if is_inferred:
            decisions = _as_chosen(decisions, call.operators, spec.experts, tokens=call.tokens)
        tokens = _tokens(decisions)
        counted_E = _sum_of_loads(decisions, spec.experts)
        if not any(counted_E) and not any(rows_E or ()):  # no tokens, or none that counts
            return decisions
        is_dense = rows_E is not None and set(rows_E) == {tokens} and spec.top_k != spec.experts
        agrees = rows_E == counted_E and not is_dense
        mode.trusts_rows = mode.trusts_rows or (agrees and self.is_replaceable)
        if agrees and (self._verify != "intervention" or mode.has_intervened):
            self.verdicts.setdefault(training, verdict("rows"))
            mode.needs_choice = mode.needs_choice and _differ(decisions, call.decisions, spec.experts)
            return decisions
        if (
            rows_E is not None
            and not (agrees or is_dense)
            and mode.trusts_rows
            and sum(rows_E) <= sum(counted_E)
        ):
            self.verdicts[training] = verdict("rows", Witness.ROWS_COUNTED)
            return [rows_as_decision(rows_E, tokens, device=_device(decisions))]
        if rows_E is None and mode.trusts_rows and call.operators is not None:
            if is_inferred:
                raise self.unconfirmed(Reason(Witness.ROWS_SOMETIMES_VISIBLE))
            self.verdicts[training] = verdict("none", Witness.ROWS_SOMETIMES_VISIBLE)
            return decisions
        if mode.has_intervened and not self._is_due(mode, call.tokens):
            return decisions
        if rows_E is not None and _is_part_of(rows_E, counted_E):
            self.verdicts[training] = verdict("none", Witness.EXPERTS_NOT_CALLED)
            return decisions
        is_dense = is_dense or self._is_everything(decisions)
        may_ask = is_inferred or is_dense or rows_E is not None or self._verify == "intervention"
        if not may_ask:
            self.verdicts.setdefault(training, verdict("none", Witness.ROWS_NOT_VISIBLE))
            return decisions
        if self._is_taken():  # another thread asks just now, and its answer decides about these as well
            return decisions
        return self._ask(call, mode, decisions, counted_E, agrees=agrees, is_inferred=is_inferred)

    def _ask(
        self,
        call: BlockCall,
        mode: Mode,
        decisions: Sequence[RoutingDecision],
        counted_E: Sequence[int],
        *,
        agrees: bool,
        is_inferred: bool,
    ) -> Sequence[RoutingDecision]:
        """Let an intervention decide between the reading and the rows of a call.

        Raises:
            ModelError: it confirms neither, or it is not possible and an inferred reading, or assignments
                without rows, stand against it.
        """
        training, rows_E, tokens = call.block.training, call.rows_E, _tokens(decisions)
        communicates = call.operators is not None and call.operators.saw_communication
        if communicates and not is_inferred:
            shown: _Shown | Reason = Reason(Witness.COMMUNICATES)
        else:
            few = agrees or (mode.has_intervened and call.tokens <= mode.tokens)
            shown = self._intervene(call, few=few, is_inferred=is_inferred)
        if isinstance(shown, Reason):
            if is_inferred and not agrees:
                raise self.unconfirmed(shown)
            lacking = any(rows_E or ()) and any(r < c for r, c in zip(rows_E or (), counted_E, strict=True))
            if lacking and not communicates:
                raise self._contradiction(counted_E, rows_E or (), is_inferred=False)
            self.verdicts[training] = verdict_of("rows" if agrees else "none", shown)
            mode.has_intervened = True
            return decisions
        mode.has_intervened = True
        if shown.confirms_reading:
            code = Witness.ZERO_WEIGHTS if shown.true_E != shown.counted_E else None
            if not agrees and rows_E is not None and set(rows_E) != {tokens}:
                code = code or Witness.ROWS_WITHOUT_EFFECT
            self.verdicts[training] = verdict("intervention", code)
            return decisions
        if agrees and all(t <= c for t, c in zip(shown.true_E, shown.counted_E, strict=True)):
            self.verdicts[training] = verdict("rows", Witness.RESULTS_UNCHANGED)
            return decisions
        # Where sequences or images are routed, rows are something else than assignments.
        if self.is_replaceable and shown.rows_E == shown.true_E and tokens == call.tokens:
            mode.trusts_rows, mode.needs_choice = True, False
            self.verdicts[training] = verdict("rows", Witness.ROWS_COUNTED)
            assert rows_E is not None
            return [rows_as_decision(rows_E, tokens, device=_device(decisions))]
        raise self._contradiction(shown.counted_E, shown.true_E, is_inferred=is_inferred)

    def _intervene(self, call: BlockCall, *, few: bool, is_inferred: bool) -> _Shown | Reason:
        """What the experts compute in a call of the block with its arguments, or why that is not shown."""
        if not self._site.is_repeatable:
            return Reason(Witness.CALLED_FURTHER_OUT)
        experts = self._site.spec.experts
        stacks = [] if self._site.experts else stacks_of_site(self._site)
        if not self._site.experts and not stacks:
            return Reason(Witness.WEIGHTS_NOT_FOUND)
        args, kwargs = few_tokens(call.args, call.kwargs) if few else (call.args, call.kwargs)
        first: list[RoutingDecision] = []
        first_rows: list[int] = []
        operators = SeenOperators(stacks)

        @contextmanager
        def plain(decisions: list[RoutingDecision]) -> Iterator[None]:
            self._rows.clear()
            with operators:
                yield
            first.extend(decisions)
            first_rows.extend(self._rows.rows_E)

        def changed(expert: int) -> AbstractContextManager[None]:
            return self._rows.changed(expert) if self._site.experts else changed_parts(stacks, expert)

        try:
            with self._rerun() as decisions:
                true_ET = chosen_by_intervention(
                    call.block, args, kwargs, experts=experts, changed=changed, plain=lambda: plain(decisions)
                )
        except ModelError:
            raise
        except Exception as error:
            return Reason(Witness.RERUN_FAILED, {"error": f"{type(error).__name__}: {one_line(error, 200)}"})
        if true_ET is None:
            return Reason(Witness.RERUN_DIFFERS)
        if not first or not true_ET.any():
            return Reason(Witness.RERUN_SHOWS_NOTHING)
        if true_ET.all() and self._site.spec.top_k != experts and experts > 1:
            return Reason(Witness.ALL_TOKENS_CHANGE)
        if is_inferred:
            first = list(_as_chosen(first, operators, experts, tokens=tokens_of(args, kwargs)))
        shown = _Shown(
            true_E=[int(n) for n in true_ET.sum(dim=1).tolist()],
            counted_E=_sum_of_loads(first, experts),
            sure_E=_sum_of_loads([_with_weight(decision) for decision in first], experts),
            rows_E=first_rows if self._site.experts else operators.rows_E(),
        )
        is_divided = shown.confirms_reading or shown.rows_E == shown.true_E  # as experts are
        if stacks and stacks[-1].is_flat and not is_divided:
            return Reason(Witness.FLAT_WEIGHTS)
        return shown

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


def stacks_of_site(site: RoutingSite) -> list[Stack]:
    """Stacked weights of a site's experts: right inside what is called, else in its block."""
    assert site.block is not None
    return find_stacks(site.module, site.spec.experts) or find_stacks(site.block, site.spec.experts)


def _as_chosen(
    decisions: Sequence[RoutingDecision], operators: SeenOperators | None, experts: int, *, tokens: int
) -> Sequence[RoutingDecision]:
    """The one inferred decision of a call, as an operator of the block chose it, where one did.

    Of gates that are called several times for all tokens (for a loss, with noise) the last call counts.
    """
    if len(decisions) > 1 and all(decision.tokens == tokens for decision in decisions):
        decisions = decisions[-1:]
    if operators is None or len(decisions) != 1 or decisions[0].expert_ids is None or not decisions[0].tokens:
        return decisions
    inferred_TK = decisions[0].expert_ids
    chosen = operators.choice(
        tokens=decisions[0].tokens, experts=experts, top_k=inferred_TK.numel() // decisions[0].tokens
    )
    if chosen is None:
        return decisions
    return [
        RoutingDecision(
            expert_ids=chosen.reshape(inferred_TK.shape), tokens=decisions[0].tokens, is_inferred=True
        )
    ]


def _tokens(decisions: Sequence[RoutingDecision]) -> int:
    return sum(decision.tokens or 0 for decision in decisions)


def _device(decisions: Sequence[RoutingDecision]) -> torch.device:
    shown = shown_by(decisions[0])
    assert shown is not None
    return shown.device


def _sum_of_loads(decisions: Sequence[RoutingDecision], experts: int) -> list[int]:
    loads = (loads_of_decision(decision, experts) for decision in decisions)
    return [sum(n) for n in zip(*loads, strict=True)]


def _is_part_of(rows_E: Sequence[int], counted_E: Sequence[int]) -> bool:
    """Whether rows are those that were counted, for some experts, and none for the others."""
    pairs = [*zip(rows_E, counted_E, strict=True)]
    return any(rows_E) and any(not r and c for r, c in pairs) and all(r in (0, c) for r, c in pairs)


def _differ(chosen: Sequence[RoutingDecision], read: Sequence[RoutingDecision], experts: int) -> bool:
    """Whether what an operator chose is something else than what was read."""
    return chosen is not read and _sum_of_loads(chosen, experts) != _sum_of_loads(read, experts)


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

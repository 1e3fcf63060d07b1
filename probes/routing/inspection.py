"""Looks at the calls of MoE blocks around the sites: was the site called, and can its reading be trusted?

A block that runs without the call that is read goes round the hook. A reading that infers the choice
(``RoutingDecision.is_inferred``) is counted only after a witness has confirmed it (``witness.py``); where the
rows of the experts contradict it and are those of this rank's tokens, they are counted in its place.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from observatory.errors import ModelError
from probes.routing.attachment import Attachment, PostHook
from probes.routing.sites import RoutingDecision, RoutingSite
from probes.routing.witness import (
    RowsOfExperts,
    chosen_by_intervention,
    few_tokens,
    loads_of_decision,
    rows_as_decision,
)

__all__ = ["BlockInspection", "Suspension", "Verdict", "is_recomputed_or_traced"]

_HELP = "pass an Adapter that reads what is dispatched (docs/supported-models.md#adapters)"

Verdict = Literal["rows", "intervention", "counted rows"]


def is_recomputed_or_traced() -> bool:
    """Whether a call repeats one that was counted (activation checkpointing) or is traced (``torch.jit``)."""
    return torch._C._current_graph_task_id() != -1 or torch._C._get_tracing_state() is not None


class Suspension(threading.local):
    """Which inspection calls its block by itself on this thread; None when none does."""

    by: BlockInspection | None = None


class _Call(threading.local):
    """The call of a block on this thread."""

    depth = 0
    decision: RoutingDecision | None = None


class BlockInspection:
    """The calls of one site's block.

    Attributes:
        verdicts: per training flag of the block, what confirmed inferred readings: ``rows``,
            ``intervention``, or ``counted rows`` where rows took their place. Empty where all was seen.
        was_reached: the site was called.
        was_bypassed: the block was called before the site ever was, and ended without it.
    """

    def __init__(
        self,
        site: RoutingSite,
        suspension: Suspension,
        *,
        count: Callable[[RoutingDecision], None],
        fail: Callable[[Exception], None],
    ) -> None:
        """Inspect the calls of ``site.block``; what may be counted goes to ``count``, errors to ``fail``."""
        self.verdicts: dict[bool, Verdict] = {}
        self.was_reached = False
        self.was_bypassed = False
        self._site = site
        self._suspension = suspension
        self._count = count
        self._fail = fail
        self._rows = RowsOfExperts(site.spec.experts)
        self._call = _Call()

    def attach(self) -> list[Attachment]:
        """Put hooks on the block and on its experts; all of them or none."""
        assert self._site.block is not None
        attachments: list[Attachment] = []

        def enter(_module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
            if torch.compiler.is_compiling() or self._is_done() or self._is_outside():
                return
            self._call.depth += 1
            self._call.decision = None
            self._rows.clear()

        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if torch.compiler.is_compiling() or not self._call.depth or self._is_outside():
                return
            self._call.depth -= 1
            decision, self._call.decision = self._call.decision, None
            if output is None:  # the call raised
                return
            if decision is None:
                self.was_bypassed = self.was_bypassed or not self.was_reached
                return
            try:
                with torch.no_grad():
                    self._judge(module, args, kwargs, decision)
            except Exception as error:  # the model's own run must not suffer from ours
                self._fail(error)

        try:
            attachments.append(Attachment(self._site.block, before=enter, after=leave))
            for expert, module in enumerate(self._site.experts):
                attachments.append(Attachment(module, after=self._expert_hook(expert)))
        except BaseException:
            for attachment in attachments:
                attachment.remove()
            raise
        return attachments

    def take(self, decision: RoutingDecision) -> bool:
        """Take a reading of the site; True if it is judged at the end of the block's call."""
        if self._suspension.by is self:
            self._call.decision = self._call.decision or decision
            return True
        if not decision.is_inferred or not self._site.experts or not self._call.depth:
            return False
        self._call.decision = decision
        return True

    def _is_done(self) -> bool:
        """Whether calls have nothing more to show: the site is reached, and experts are not watched."""
        return self.was_reached and not self._site.experts

    def _is_outside(self) -> bool:
        """Whether a call is not one of the model's own: an intervention's, a recomputation, a trace."""
        return self._suspension.by is not None or is_recomputed_or_traced()

    def _expert_hook(self, expert: int) -> PostHook:
        def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            return None if torch.compiler.is_compiling() else self._rows.note(expert, args, kwargs, output)

        return note

    def _judge(
        self,
        block: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        decision: RoutingDecision,
    ) -> None:
        """Count an inferred decision, or the rows of its experts, or raise.

        Raises:
            ModelError: the witnesses contradict the reading, or there is none.
        """
        rows_E, tokens, spec = self._rows.rows_E, decision.tokens or 0, self._site.spec
        if not tokens:
            self._count(decision)
            return
        if not any(rows_E):
            raise ModelError(
                f"what {spec.module} chooses is inferred from its logits, and its experts are not called as "
                f"modules, so that nothing confirms it; {_HELP}"
            )
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise ModelError(
                f"what {spec.module} chooses is inferred from its logits, which cannot be confirmed while a "
                f"CUDA graph is captured; {_HELP}"
            )
        if set(rows_E) == {tokens} and spec.top_k != spec.experts:
            if self.verdicts.get(block.training) != "intervention":
                self._intervene(block, args, kwargs)
                self.verdicts[block.training] = "intervention"
            self._count(decision)
            return
        known = self.verdicts.get(block.training)
        wanted = tokens * (spec.top_k or 1)
        if known is None:
            equal = loads_of_decision(decision, spec.experts) == rows_E
            known = self.verdicts[block.training] = "rows" if equal else "counted rows"
        if sum(rows_E) > wanted:
            raise ModelError(
                f"the experts beside {spec.module} were called with {sum(rows_E)} rows where its logits make "
                f"{wanted} assignments: rows of other ranks or of padding; {_HELP}"
            )
        if known == "rows" and sum(rows_E) == wanted:
            self._count(decision)
        else:
            self.verdicts[block.training] = "counted rows"
            self._count(rows_as_decision(rows_E, decision))

    def _intervene(self, block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Hold the reading of the block's call against what its experts compute.

        Raises:
            ModelError: they contradict each other, or the call cannot be repeated.
        """
        spec = self._site.spec
        args, kwargs = few_tokens(args, kwargs)
        self._suspension.by, self._call.decision = self, None
        try:
            true_ET = chosen_by_intervention(block, args, kwargs, self._rows)
        finally:
            self._suspension.by = None
        decision, self._call.decision = self._call.decision, None
        if true_ET is None or decision is None or not true_ET.any():
            raise ModelError(
                f"what {spec.module} chooses is inferred from its logits, and running its block again does "
                f"not show which experts compute a token, so that nothing confirms it; {_HELP}"
            )
        counted, true = loads_of_decision(decision, spec.experts), true_ET.sum(dim=1).tolist()
        if counted != true:
            expert = next(e for e in range(spec.experts) if counted[e] != true[e])
            raise ModelError(
                f"the logits of {spec.module} give {counted[expert]} tokens to expert {expert}, which "
                f"computes {true[expert]}: something else takes part in the choice (noise, a bias, a group "
                f"limit, a threshold); {_HELP}"
            )

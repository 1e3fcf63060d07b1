"""Rules about loads, judged while the loads of a run stream by.

Shapes: S stored rows in time order (one step each, or one window of steps), E experts.

Memory: one row of loads per rule, phase and layer, whatever the length of the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from observatory.analysis.parallel.placement import Placement
from observatory.analysis.parallel.traffic import load_by_rank
from observatory.analysis.routing.floor import gini_floor, max_over_mean_floor
from observatory.analysis.routing.imbalance import entropy_bits, gini, idle_experts, max_over_mean
from observatory.analysis.rules.judged import Judged
from observatory.analysis.rules.rules_file import Rule
from observatory.analysis.rules.words import RuleCode
from observatory.reasons import Reason
from observatory.run import LoadBlock

Int64 = NDArray[np.int64]


class WindowJudge:
    """One rule about the added loads of windows of one layer in one phase."""

    def __init__(self, rule: Rule, block: LoadBlock, placement: Placement | None, top_k: int | None) -> None:
        self._rule = rule
        self._phase, self._layer, self._experts = block.phase, block.layer, block.experts
        self._placement = placement
        self._top_k = top_k
        self._load_E = np.zeros(block.experts, dtype=np.int64)
        self._tokens = self._steps = 0
        self._first_step: int | None = None
        self._row_step, self._row_steps = -1, 0
        self._worst: Judged | None = None
        self._windows = self._broken = 0

    def add(self, block: LoadBlock) -> None:
        """Add rows; every window that they fill is judged."""
        load_SE, tokens_S = block.load_SE, block.tokens_S
        if self._rule.window_steps is None:  # in one go
            for step, steps in zip(block.step_S.tolist(), block.window_steps_S.tolist(), strict=True):
                self._count(step, steps)
            self._load_E += load_SE.sum(axis=0)
            self._tokens += int(tokens_S.sum())
            return
        for row, (step, steps) in enumerate(
            zip(block.step_S.tolist(), block.window_steps_S.tolist(), strict=True)
        ):
            # rows of one step follow each other: a window ends before a row of another step
            if step != self._row_step and self._steps >= self._rule.window_steps:
                self._judge()
            self._count(step, steps)
            self._load_E += load_SE[row]
            self._tokens += int(tokens_S[row])

    def finish(self) -> Iterator[Judged]:
        """Judge the last window, if it is whole; what was found."""
        if self._rule.window_steps is None or self._steps >= self._rule.window_steps:
            self._judge()
        if self._worst is not None:
            yield replace(self._worst, windows=self._windows, broken_windows=self._broken)
            return
        needed = self._rule.window_steps or 1
        reason = (
            Reason(RuleCode.FEW_STEPS, {"needed": needed, "steps": self._steps})
            if self._steps < needed
            else Reason(RuleCode.NO_ASSIGNMENTS)
        )
        yield Judged(rule=self._rule, phase=self._phase, layer=self._layer, reason=reason)

    def _count(self, step: int, steps: int) -> None:
        """Rows that start at one step (of ranks whose windows differ in length) cover the longest of them."""
        if step == self._row_step:
            self._steps += max(0, steps - self._row_steps)
            self._row_steps = max(steps, self._row_steps)
        else:
            self._steps += steps
            self._row_step, self._row_steps = step, steps
        if self._first_step is None:
            self._first_step = step

    def _judge(self) -> None:
        value = self._value()
        if value is not None:
            self._windows += 1
            self._broken += self._rule.is_broken_by(value)
            worst = self._worst
            if worst is None or worst.value is None or self._is_worse(value, worst.value):
                self._worst = Judged(
                    rule=self._rule, phase=self._phase, layer=self._layer, value=value, floor=self._floor(),
                    first_step=self._first_step, steps=self._steps,
                )  # fmt: skip
        if self._rule.window_steps is not None:
            self._load_E[:] = 0
            self._tokens = self._steps = 0
            self._first_step = None

    def _is_worse(self, value: float, than: float) -> bool:
        return value > than if self._rule.above is not None else value < than

    def _value(self) -> float | None:
        load_E = self._load_E
        match self._rule.metric:
            case "rank_max_over_mean":
                assert self._placement is not None
                return max_over_mean(load_by_rank(load_E, self._placement))
            case "expert_max_over_mean":
                return max_over_mean(load_E)
            case "gini":
                return gini(load_E)
            case "entropy_bits":
                return entropy_bits(load_E)
            case _:
                return float(idle_experts(load_E)) if load_E.any() else None

    def _floor(self) -> float | None:
        """What uniform routing of as many tokens shows; None where it is not known."""
        tokens, experts, top_k = self._tokens, self._experts, self._top_k
        if tokens == 0 or top_k is None or top_k > experts:
            return None
        match self._rule.metric:
            case "gini":
                return gini_floor(tokens=tokens, top_k=top_k, experts=experts)
            case "expert_max_over_mean":
                return max_over_mean_floor(tokens=tokens, top_k=top_k, experts=experts)
            case "rank_max_over_mean":
                assert self._placement is not None
                ranks = self._placement.ep
                if not self._placement.even:
                    return None
                return max_over_mean_floor(tokens=tokens, top_k=top_k, experts=experts, groups=ranks)
            case _:
                return None


class DeadExpertJudge:
    """A rule about how many consecutive captured steps an expert of one layer received no token."""

    def __init__(self, rule: Rule, block: LoadBlock) -> None:
        self._rule = rule
        self._phase, self._layer = block.phase, block.layer
        self._steps = 0
        # of each expert: captured steps up to its last token, and the step of that token (-1: none so far)
        self._seen_E = np.zeros(block.experts, dtype=np.int64)
        self._last_step_E = np.full(block.experts, -1, dtype=np.int64)
        self._longest_E = np.zeros(block.experts, dtype=np.int64)
        self._after_step_E = np.full(block.experts, -1, dtype=np.int64)

    def add(self, block: LoadBlock) -> None:
        """Add rows."""
        routed_S = block.assignments_SP.sum(axis=1) > 0  # where nothing was routed no expert was passed over
        if not routed_S.any():
            return
        load_SE, step_S = block.load_SE[routed_S], block.step_S[routed_S]
        covered_S = self._steps + np.cumsum(block.window_steps_S[routed_S])
        self._steps = int(covered_S[-1])
        row_SE = np.where(load_SE > 0, np.arange(len(step_S))[:, None], -1)
        np.maximum.accumulate(row_SE, axis=0, out=row_SE)
        seen_SE = np.where(row_SE >= 0, covered_S[row_SE], self._seen_E)
        last_step_SE = np.where(row_SE >= 0, step_S[row_SE], self._last_step_E)
        dead_SE = covered_S[:, None] - seen_SE
        at_E = dead_SE.argmax(axis=0), np.arange(block.experts)
        longer_E = dead_SE[at_E] > self._longest_E
        self._longest_E = np.where(longer_E, dead_SE[at_E], self._longest_E)
        self._after_step_E = np.where(longer_E, last_step_SE[at_E], self._after_step_E)
        self._seen_E, self._last_step_E = seen_SE[-1], last_step_SE[-1]

    def finish(self) -> Iterator[Judged]:
        """Every expert that breaks the rule, else the one that comes nearest."""
        if self._steps == 0:
            reason = Reason(RuleCode.NO_ASSIGNMENTS)
            yield Judged(rule=self._rule, phase=self._phase, layer=self._layer, reason=reason)
            return
        broken = [e for e, steps in enumerate(self._longest_E.tolist()) if self._rule.is_broken_by(steps)]
        for expert in broken or [int(np.argmax(self._longest_E))]:
            after = int(self._after_step_E[expert])
            yield Judged(
                rule=self._rule, phase=self._phase, layer=self._layer, expert=expert,
                value=float(self._longest_E[expert]), after_step=after if after >= 0 else None,
                steps=self._steps,
            )  # fmt: skip

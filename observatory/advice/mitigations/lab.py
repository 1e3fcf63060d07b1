"""The trace and the models that changes are compared on, and how a change is judged.

Shapes: S judged steps, L layers, R captured source ranks, E experts, P ranks, K slots of each rank.

Layouts and shares are chosen on the first steps of a phase; every number is of the steps after them. A gain
is paired: the same steps with and without the change. Its interval covers the scatter of steps (block
bootstrap) and what the models were wrong by on held-out measurements: only for what the change alters where
the kind of exchange stays the same, for all exchanges where it does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from observatory.advice.mitigations.setup import Setup
from observatory.advice.mitigations.verdict import Mitigation, MitigationCode, Premise, Verdict, VerdictCode
from observatory.analysis.experts.cost import ExpertCost
from observatory.analysis.experts.step_time import LayerWork, StepTimes, layer_work, work_times
from observatory.analysis.network.network import NetworkModel
from observatory.analysis.network.predict import predict_stages_us
from observatory.analysis.parallel.balancing.problem import Objective, Problem
from observatory.analysis.parallel.balancing.solving import solve
from observatory.analysis.parallel.dispatch_rules import DispatchRule
from observatory.analysis.parallel.step_loads import StepLoads
from observatory.analysis.parallel.token_samples import LayerTokens, places_touched
from observatory.analysis.parallel.traffic import source_shares
from observatory.analysis.statistics import (
    Interval,
    block_count,
    block_weights,
    few_blocks_widening,
    sample_interval,
)
from observatory.errors import BenchmarkError
from observatory.reasons import Reason
from observatory.run.exchange_algorithms import Algorithm

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

_RESAMPLES = 500
#: Less than this part of a step is no gain: step times of one program scatter as much.
_WORTH = 0.005
#: Numbers of one array of loads by source rank and expert; of more judged steps some are left out, evenly.
_MOST_NUMBERS = 1 << 25


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """What is known about one phase of a run.

    Attributes:
        phase: prefill, decode, ...
        loads: of all steps of the phase, by source rank.
        train_steps: the first so many are what layouts are chosen on; the rest is judged.
        today_LPK: today's layout.
        named_today: its name.
        tokens: sampled tokens of each layer; None without samples.
        shared_experts: shared experts of a layer; None where not known.
        sequence_tokens: tokens of a sequence in a prefill step; None where not known.
    """

    phase: str
    loads: StepLoads
    train_steps: int
    today_LPK: Int64
    named_today: str
    tokens: list[LayerTokens] | None
    shared_experts: int | None
    sequence_tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Models:
    """What predicts times.

    Attributes:
        experts: time of the experts of one rank.
        network: time of exchanges; None without.
        horizon_steps: steps over which a change has to pay for itself.
    """

    experts: ExpertCost
    network: NetworkModel | None
    horizon_steps: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Timed:
    """Predicted microseconds of the judged steps, summed over layers, (S,) each.

    Attributes:
        counts_S, dispatch_S, combine_S: exchanges, the first announces numbers of rows; None where they are
            not predicted, as ``reason`` says.
        experts_S: of the mean rank.
        waiting_S: of the mean rank for the busiest, layer by layer.
        alone_S: shared experts and what else ranks do alone; zero where that is not known.
        extrapolated: share of layer-steps whose expert time lies outside what was measured; 1 where exchanges
            do.
        reason: why exchanges are not predicted; None when they are.
    """

    counts_S: Float64 | None
    dispatch_S: Float64 | None
    combine_S: Float64 | None
    experts_S: Float64
    waiting_S: Float64
    alone_S: Float64
    extrapolated: float
    reason: Reason | None = None

    @classmethod
    def of(cls, times: StepTimes) -> Timed:
        """Seconds of layer-steps as microseconds of steps."""

        def summed(part_SL: Float64 | None) -> Float64 | None:
            return None if part_SL is None else np.asarray(1e6 * part_SL.sum(axis=1))

        outside = float(1.0 - times.inside_SL.mean())
        reasons = times.reasons.get("total", ())
        return cls(
            counts_S=summed(times.counts_s),
            dispatch_S=summed(times.dispatch_s),
            combine_S=summed(times.combine_s),
            experts_S=1e6 * (times.experts_s - times.waiting_s).sum(axis=1),
            waiting_S=1e6 * times.waiting_s.sum(axis=1),
            alone_S=1e6
            * sum(
                (part_SL for part_SL in (times.shared_s, times.local_s) if part_SL is not None),
                start=np.zeros_like(times.experts_s),
            ).sum(axis=1),
            extrapolated=1.0 if "extrapolated" in times.reasons else outside,
            reason=reasons[0] if reasons else None,
        )

    @property
    def exchange_S(self) -> Float64:
        """All exchanges; zero where they are not known."""
        if self.counts_S is None or self.dispatch_S is None or self.combine_S is None:
            return np.zeros_like(self.experts_S)
        return self.counts_S + self.dispatch_S + self.combine_S

    @property
    def compute_S(self) -> Float64:
        """Experts of the busiest rank, and what ranks do alone."""
        return self.experts_S + self.waiting_S + self.alone_S

    @property
    def total_S(self) -> Float64:
        """The MoE part of each step."""
        return self.exchange_S + self.compute_S

    def parts(self) -> dict[str, float]:
        """Mean of each part that is known."""
        parts = {
            "counts": self.counts_S,
            "dispatch": self.dispatch_S,
            "experts": self.experts_S,
            "waiting": self.waiting_S,
            "combine": self.combine_S,
            "alone": self.alone_S,
        }
        return {name: float(part_S.mean()) for name, part_S in parts.items() if part_S is not None}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Change:
    """What one change makes of the set-up; None keeps today's.

    Attributes:
        work: what ranks do.
        algorithm, deduplicate: how they exchange it.
        once_L: as of `work_times`.
        slot_LPK: new layout, which takes moving experts.
        memory_bytes: what a rank needs more.
        extra_us_S: what comes on top in each step.
        assumed: something of it is assumed, not measured.
    """

    work: LayerWork
    algorithm: Algorithm | None = None
    deduplicate: bool | None = None
    once_L: Float64 | None = None
    slot_LPK: Int64 | None = None
    memory_bytes: int = 0
    extra_us_S: Float64 | None = None
    assumed: bool = False


class Lab:
    """Judges changes of one set-up on one trace.

    Args:
        trace: of one phase.
        setup: the set-up of today.
        models: what predicts times.
    """

    def __init__(self, trace: Trace, setup: Setup, models: Models) -> None:
        self.trace, self.setup, self.models = trace, setup, models
        assert trace.loads.load_SLRE is not None
        steps, self.layers, _, self.experts = trace.loads.load_SLRE.shape
        judged_S = np.arange(trace.train_steps, steps)
        most = max(1, _MOST_NUMBERS // (self.layers * setup.ranks * max(self.experts, setup.ranks)))
        self.judged_S = judged_S[:: -(-len(judged_S) // most)]
        self.train_SLE = trace.loads.load_SLE[: trace.train_steps].astype(np.float64)
        self.test_SLE = trace.loads.load_SLE[self.judged_S].astype(np.float64)
        self._weight_BS = block_weights(len(self.judged_S), _RESAMPLES, 0)
        self._widening = few_blocks_widening(block_count(len(self.judged_S)))
        self._layouts: dict[int, Int64] = {}

    @cached_property
    def sources_SLPE(self) -> Float64:
        """Loads of the judged steps by source rank."""
        assert self.trace.loads.load_SLRE is not None
        load_SLRE = self.trace.loads.load_SLRE[self.judged_S].astype(np.float64)
        share_PR, _ = source_shares(load_SLRE.shape[2], self.setup.ranks)
        return np.asarray(np.einsum("pr,slre->slpe", share_PR, load_SLRE, optimize=True))

    def work(
        self, slot_LPK: Int64, *, rule: DispatchRule = "equal", share_LPK: Float64 | None = None
    ) -> LayerWork:
        """What ranks do under a layout."""
        return layer_work(
            self.sources_SLPE,
            slot_LPK,
            node_of_P=self.setup.node_of_P,
            dispatch=rule,
            share_LPK=share_LPK,
        )

    @cached_property
    def today_work(self) -> LayerWork:
        """What ranks do today."""
        return self.work(self.trace.today_LPK)

    @cached_property
    def today(self) -> Timed:
        """The judged steps as they are."""
        return self.timed(Change(work=self.today_work))

    def timed(self, change: Change) -> Timed:
        """Predicted times under a change."""
        return Timed.of(
            work_times(
                change.work,
                self.models.experts,
                network=self.models.network,
                node_of_P=self.setup.node_of_P,
                algorithm=change.algorithm or self.setup.algorithm,
                deduplicate=self.setup.deduplicate if change.deduplicate is None else change.deduplicate,
                once_L=change.once_L,
                count_bytes=self.setup.announce_bytes,
                shared_experts=self.trace.shared_experts,
            )
        )

    def chosen_layout(self, replicas: int) -> Int64:
        """The layout that the training steps suggest, (L, P, K); made once."""
        if replicas not in self._layouts:
            problem = Problem(
                load_SLE=self.train_SLE,
                ranks=self.setup.ranks,
                replicas=replicas,
                objective=Objective.STEP,
            )
            self._layouts[replicas] = solve(problem).slot_LPK
        return self._layouts[replicas]

    def once_of(self, place_LE: Sequence[Int64]) -> Float64 | None:
        """Places that a token's experts are at over those that independent experts would touch, (L,).

        Args:
            place_LE: of each layer, the place of each expert.

        None without token samples.
        """
        if self.trace.tokens is None:
            return None
        ratios = []
        for tokens, place_E in zip(self.trace.tokens, place_LE, strict=True):
            top_k = tokens.experts_TK.shape[1]
            share_N = np.bincount(place_E[tokens.experts_TK].ravel()) / tokens.experts_TK.size
            by_chance = float((1.0 - (1.0 - share_N) ** top_k).sum())
            ratios.append(float(places_touched(tokens.experts_TK, place_E).mean()) / max(by_chance, 1e-300))
        return np.array(ratios)

    @cached_property
    def home_LE(self) -> list[Int64]:
        """The first rank that holds each expert today, of each layer (E,)."""
        homes = []
        for slot_PK in self.trace.today_LPK:
            home_E = np.zeros(self.experts, dtype=np.int64)
            for rank in reversed(range(len(slot_PK))):
                home_E[slot_PK[rank]] = rank
            homes.append(home_E)
        return homes

    def judge(
        self,
        mitigation: Mitigation,
        change: Change,
        *,
        setting: str = "",
        premise: Premise | None = None,
        beyond: Timed | None = None,
    ) -> Verdict:
        """The verdict on a change; on what it adds to a simpler one where ``beyond`` is that one's times."""
        timed = self.timed(change)
        algorithm = change.algorithm or self.setup.algorithm
        verdict = self.judge_times(
            mitigation,
            timed,
            setting=setting,
            premise=premise,
            assumed=change.assumed,
            algorithm=algorithm,
            extra_us_S=change.extra_us_S,
            beyond=beyond,
        )
        return self._with_costs(verdict, change)

    def judge_times(
        self,
        mitigation: Mitigation,
        timed: Timed,
        *,
        setting: str = "",
        premise: Premise | None = None,
        assumed: bool = False,
        algorithm: Algorithm | None = None,
        extra_us_S: Float64 | None = None,
        beyond: Timed | None = None,
    ) -> Verdict:
        """The verdict on predicted times, without what a change costs."""
        extra_S = np.zeros_like(timed.experts_S) if extra_us_S is None else extra_us_S
        total_S = timed.total_S + extra_S
        gain = self._gain(self.today, timed, total_S, algorithm or self.setup.algorithm)
        further = None
        if beyond is not None and beyond is not self.today:
            further = self._gain(beyond, timed, total_S, algorithm or self.setup.algorithm)
        return Verdict(
            mitigation=mitigation,
            setting=setting,
            code=_code(further or gain),
            gain=gain,
            beyond=further,
            premise=premise,
            grades=self.grades(assumed=assumed),
            reason=timed.reason,
            **shown(timed, total_S, extra_S),
        )

    def _with_costs(self, verdict: Verdict, change: Change) -> Verdict:
        """With memory, the cost of getting there, and whether that pays."""
        change_us, kv_bytes = self._change_us(change), self.setup.kv_bytes_per_token
        saved_us = 0.0 if verdict.step_us is None else float(self.today.total_S.mean()) - verdict.step_us
        after = float(np.ceil(change_us / saved_us)) if change_us is not None and saved_us > 0 else None
        code = verdict.code
        if code is VerdictCode.CHANGE and self.over_memory(change.memory_bytes):
            code = VerdictCode.DOES_NOT_FIT
        elif code is VerdictCode.CHANGE and after is not None and after > self.models.horizon_steps:
            code = VerdictCode.DOES_NOT_PAY
        return replace(
            verdict,
            code=code,
            memory_bytes=change.memory_bytes,
            kv_tokens=None if kv_bytes is None else change.memory_bytes / kv_bytes,
            change_us=change_us,
            break_even_steps=after,
        )

    def reference(self, mitigation: Mitigation, timed: Timed, *, setting: str = "") -> Verdict:
        """A row that others are compared with: no verdict."""
        return Verdict(
            mitigation=mitigation,
            setting=setting,
            code=VerdictCode.REFERENCE,
            gain=None if timed is self.today else self._paired(self.today.total_S, timed.total_S),
            memory_bytes=0,
            grades=self.grades(),
            reason=timed.reason,
            **shown(timed, timed.total_S, np.zeros_like(timed.experts_S)),
        )

    def grades(self, *, assumed: bool = False) -> tuple[str, ...]:
        """What numbers rest on."""
        experts = "fitted" if self.models.experts.grade == "measured" else self.models.experts.grade
        exchanges = [] if self.models.network is None else ["fitted"]
        return tuple(dict.fromkeys([experts, *exchanges, *(["assumed"] if assumed else [])]))

    def exchange_error(self, algorithm: str) -> float:
        """Median error of the network model on held-out matrices, of an unreliable one its 90th percentile.

        0 without a model.
        """
        if self.models.network is None:
            return 0.0
        try:
            fit = self.models.network.of(algorithm)
        except BenchmarkError:
            return 0.0
        if fit.verdict is not None:
            is_valid = fit.verdict.code == "valid"
            return fit.verdict.median_error if is_valid else fit.verdict.p90_error
        return min((score.median_error for score in fit.scores), default=0.0)

    @property
    def exchange_share(self) -> float:
        """Share of exchanges in today's steps; 0 where they are not known."""
        return float(self.today.exchange_S.sum() / max(self.today.total_S.sum(), 1e-300))

    @cached_property
    def balanced_work(self) -> LayerWork:
        """The judged steps with every source's rows spread evenly over ranks, and activated experts too."""
        ranks = self.setup.ranks
        rows_SLP1 = self.sources_SLPE.sum(axis=3)[..., None]
        active_SL1 = (self.test_SLE > 0).sum(axis=2)[..., None]
        return LayerWork(
            rows_SLRP=np.repeat(rows_SLP1 / ranks, ranks, axis=3),
            activated_SLP=np.repeat(active_SL1 / ranks, ranks, axis=2),
        )

    @cached_property
    def ceiling(self) -> Timed:
        """What no layout, rule or exchange on these ranks is faster than.

        Every rank computes the mean of assignments and of activated experts and waits for no other; exchanges
        carry nothing and cost the least latency that was measured.
        """
        balanced = self.timed(Change(work=self.balanced_work))
        is_known = balanced.dispatch_S is not None
        empty_S = np.full(len(self.judged_S), self.layers * self._least_exchange_us()) if is_known else None
        return replace(
            balanced,
            counts_S=empty_S if self.setup.announce_bytes or empty_S is None else 0.0 * empty_S,
            dispatch_S=empty_S,
            combine_S=empty_S,
            waiting_S=np.zeros_like(balanced.waiting_S),
        )

    def _least_exchange_us(self) -> float:
        assert self.models.network is not None
        nodes = self.setup.node_of_P
        nothing = np.zeros((1, len(nodes), len(nodes)), dtype=np.int64)
        least = []
        for fit in self.models.network.fits:
            stages = 2 if fit.algorithm == "hierarchical" else 1
            try:
                us_1 = predict_stages_us(
                    self.models.network, [nothing] * stages, nodes, algorithm=fit.algorithm
                )
            except BenchmarkError:
                continue
            least.append(float(us_1[0]))
        return min(least, default=0.0)

    def _gain(self, before: Timed, timed: Timed, total_S: Float64, algorithm: str) -> Interval | None:
        """Share of the time before that is removed; None where exchanges of one of both are not known."""
        if (timed.reason is None) != (before.reason is None):
            return None
        gain = self._paired(before.total_S, total_S)
        exchange_us = float(np.abs(timed.exchange_S - before.exchange_S).mean())
        if algorithm != self.setup.algorithm:  # errors of two fits do not cancel
            exchange_us = float((timed.exchange_S + before.exchange_S).mean())
        compute_us = float(np.abs(timed.compute_S - before.compute_S).mean())
        exchange_error = max(self.exchange_error(algorithm), self.exchange_error(self.setup.algorithm))
        error_us = (self.models.experts.median_error or 0.0) * compute_us + exchange_error * exchange_us
        error = error_us / max(float(before.total_S.mean()), 1e-300)
        assert gain.low is not None
        assert gain.high is not None
        return Interval(
            value=gain.value,
            low=gain.value - float(np.hypot(gain.value - gain.low, error)),
            high=gain.value + float(np.hypot(gain.high - gain.value, error)),
        )

    def _paired(self, before_S: Float64, after_S: Float64) -> Interval:
        """Share of the time before that the same steps lack after it, with the scatter of steps."""
        value = 1.0 - float(after_S.sum() / max(before_S.sum(), 1e-300))
        sample_B = 1.0 - (self._weight_BS @ after_S) / np.maximum(self._weight_BS @ before_S, 1e-300)
        return sample_interval(value, value + self._widening * (sample_B - value))

    @property
    def held_bytes(self) -> int:
        """Weights of the experts that a rank holds today."""
        layers, _, slots = self.trace.today_LPK.shape
        return int(layers * slots * self.models.experts.shape.expert_bytes)

    def over_memory(self, more_bytes: int) -> bool:
        """Whether the experts of a rank alone exceed its memory; False where that is not known."""
        return self.setup.memory_bytes is not None and self.held_bytes + more_bytes > self.setup.memory_bytes

    def _change_us(self, change: Change) -> float | None:
        """Once: the weights that the busiest rank receives, and the stall; None where no rate is known."""
        if change.slot_LPK is None:
            return 0.0
        rate = self.move_rate
        if rate is None:
            return None
        received_P = self._received(change.slot_LPK).sum(axis=0)
        seconds = float(received_P.max()) * self.models.experts.shape.expert_bytes / rate
        return 1e6 * (seconds + self.setup.stall_s)

    def _received(self, slot_LPK: Int64) -> Int64:
        """Experts that ranks have to receive for a layout, (L, P)."""
        moved = [
            [
                len(set(new_K.tolist()) - set(old_K.tolist()))
                for new_K, old_K in zip(new_PK, old_PK, strict=True)
            ]
            for new_PK, old_PK in zip(slot_LPK, self.trace.today_LPK, strict=True)
        ]
        return np.array(moved, dtype=np.int64)

    @property
    def move_rate(self) -> float | None:
        """Bytes per second of weights that a rank receives: as stated, else the slowest fitted rate."""
        if self.setup.move_bytes_per_s is not None or self.models.network is None:
            return self.setup.move_bytes_per_s
        rates = [
            item.gb_per_s
            for item in self.models.network.fits[0].coefficients
            if item.gb_per_s and item.term != "bytes_self"
        ]
        return 1e9 * min(rates) if rates else None


def _code(gain: Interval | None) -> VerdictCode:
    """What a gain comes to before its costs."""
    if gain is None or gain.low is None or gain.high is None:
        return VerdictCode.NOT_KNOWN
    if gain.high < -_WORTH:
        return VerdictCode.WORSE
    if gain.low <= 0 or gain.value < _WORTH:
        return VerdictCode.NO_GAIN
    return VerdictCode.CHANGE


def shown(timed: Timed, total_S: Float64, extra_S: Float64) -> dict[str, Any]:
    """The times of a verdict."""
    extra = {"extra": float(extra_S.mean())} if extra_S.any() else {}
    return {
        "step_us": float(total_S.mean()),
        "p10_us": float(np.quantile(total_S, 0.1)),
        "p90_us": float(np.quantile(total_S, 0.9)),
        "parts_us": timed.parts() | extra,
        "extrapolated": timed.extrapolated,
    }


def not_known(mitigation: Mitigation, code: MitigationCode, **values: Any) -> Verdict:
    """A verdict that something is missing for."""
    return Verdict(mitigation=mitigation, code=VerdictCode.NOT_KNOWN, reason=Reason(code, values))


def not_applicable(mitigation: Mitigation, code: MitigationCode, **values: Any) -> Verdict:
    """A verdict on what has nothing to change here."""
    return Verdict(mitigation=mitigation, code=VerdictCode.NOT_APPLICABLE, reason=Reason(code, values))

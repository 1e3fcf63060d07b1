"""The trace and the models that changes are compared on, and how a change is judged.

Shapes: S judged steps, L layers, R captured source ranks, E experts, P ranks, K slots of each rank.

Layouts and shares are chosen on the first steps of a phase; every number is of the steps after them. A gain
is paired: the same steps with and without the change. Its interval covers the scatter of steps (block
bootstrap) and what the models were wrong by on held-out measurements: only for what the change alters where
the kind of exchange stays the same, for all exchanges where it does not.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from observatory.advice.mitigations.change import Change
from observatory.advice.mitigations.setup import Setup
from observatory.advice.mitigations.timed import Models, Timed, Trace
from observatory.advice.mitigations.verdict import Mitigation, MitigationCode, Premise, Verdict, VerdictCode
from observatory.analysis.experts.step_time import LayerWork, layer_work, work_times
from observatory.analysis.network.predict import predict_stages_us
from observatory.analysis.parallel.balancing import holders
from observatory.analysis.parallel.balancing.coactivation import nodes_touched
from observatory.analysis.parallel.balancing.moves import renumbered
from observatory.analysis.parallel.balancing.problem import Objective, Problem
from observatory.analysis.parallel.balancing.solving import solve
from observatory.analysis.parallel.dispatch_rules import DispatchRule
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
#: Relative error that times of published rates are taken to have: none is known.
_UNKNOWN_ERROR = 0.3
#: Fewer sampled tokens of a layer do not show which experts a token has together.
_FEWEST_TOKENS = 200
#: A gain that may be larger than this and may be none is not certain.
_LARGE = 0.02


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
        _, self.layers, _, self.experts = trace.loads.load_SLRE.shape
        self.judged_S = trace.judged_S
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
        algorithm = change.algorithm or self.setup.algorithm
        deduplicate = self.setup.deduplicate if change.deduplicate is None else change.deduplicate
        slot_LPK = self.trace.today_LPK if change.slot_LPK is None else change.slot_LPK
        place_P = np.array(self.setup.node_of_P) if algorithm == "hierarchical" else None
        is_once = deduplicate or algorithm == "hierarchical"
        times = work_times(
            change.work,
            self.models.experts,
            network=self.models.network,
            node_of_P=self.setup.node_of_P,
            algorithm=algorithm,
            deduplicate=deduplicate,
            once_L=self.once_of(slot_LPK, place_P) if is_once else None,
            count_bytes=self.setup.announce_bytes,
            shared_experts=self.trace.shared_experts,
        )
        return Timed.of(times, self.trace.phase, self.models.power_of(self.setup.ranks))

    def chosen_layout(self, replicas: int) -> Int64:
        """The layout that the training steps suggest, (L, P, K); made once."""
        if replicas not in self._layouts:
            problem = Problem(
                load_SLE=self.train_SLE,
                ranks=self.setup.ranks,
                replicas=replicas,
                objective=Objective.STEP,
            )
            held_LPE = holders(self.trace.today_LPK, self.experts)
            node_P = np.array(self.setup.node_of_P)
            self._layouts[replicas] = renumbered(solve(problem).slot_LPK, held_LPE, node_P)
        return self._layouts[replicas]

    def missing(self, mitigation: Mitigation, algorithm: str) -> Verdict | None:
        """A verdict that says what is missing to predict exchanges by an algorithm; None where nothing is."""
        if self.models.network is None:
            return not_known(mitigation, MitigationCode.NO_NETWORK)
        if algorithm not in {fit.algorithm for fit in self.models.network.fits}:
            return not_known(mitigation, MitigationCode.NO_ALGORITHM, algorithm=algorithm)
        return None

    @cached_property
    def simpler(self) -> Change | None:
        """The chosen layout without replicas where that is better than today's; None where it is not."""
        if self.experts % self.setup.ranks:
            return None
        layout = self.chosen_layout(0)
        change = Change(work=self.work(layout), slot_LPK=layout)
        return change if self.timed(change).total_S.sum() < self.today.total_S.sum() else None

    @cached_property
    def _simpler_times(self) -> Timed | None:
        return None if self.simpler is None else self.timed(self.simpler)

    def once_of(self, slot_LPK: Int64, place_P: Int64 | None = None) -> Float64 | None:
        """Places that a token's experts are at over those that independent experts would touch, (L,).

        Args:
            slot_LPK: a layout; of copies, the first counts.
            place_P: place of each rank, such as its node; None for the rank itself.

        None without enough token samples.
        """
        if not self.has_tokens:
            return None
        assert self.trace.tokens is not None
        ratios = []
        for tokens, slot_PK in zip(self.trace.tokens, slot_LPK, strict=True):
            home_E = self.homes(slot_PK)
            place_E = home_E if place_P is None else place_P[home_E]
            top_k = tokens.experts_TK.shape[1]
            share_N = np.bincount(place_E[tokens.experts_TK].ravel()) / tokens.experts_TK.size
            by_chance = float((1.0 - (1.0 - share_N) ** top_k).sum())
            touched_T = nodes_touched(tokens.experts_TK, place_E, int(place_E.max()) + 1)
            ratios.append(float(touched_T.mean()) / max(by_chance, 1e-300))
        return np.array(ratios)

    @property
    def has_tokens(self) -> bool:
        """Whether enough tokens were sampled to show which experts a token has together."""
        tokens = self.trace.tokens
        return tokens is not None and min(len(layer.experts_TK) for layer in tokens) >= _FEWEST_TOKENS

    def homes(self, slot_PK: Int64) -> Int64:
        """The first rank that holds each expert, (E,)."""
        home_E = np.zeros(self.experts, dtype=np.int64)
        for rank in reversed(range(len(slot_PK))):
            home_E[slot_PK[rank]] = rank
        return home_E

    def judge(
        self,
        mitigation: Mitigation,
        change: Change,
        *,
        setting: str = "",
        premise: Premise | None = None,
        adds: bool = False,
    ) -> Verdict:
        """The verdict on a change; with ``adds``, on what it adds to `simpler`, where there is that."""
        simpler = self._simpler_times if adds else None
        verdict = self.judge_times(
            mitigation,
            self.timed(change),
            setting=setting,
            premise=premise,
            assumed=change.assumed,
            algorithm=change.algorithm,
            extra_us_S=change.extra_us_S,
            beyond=simpler,
        )
        return self._with_costs(verdict, change, simpler)

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
        is_other_fabric: bool = False,
    ) -> Verdict:
        """The verdict on predicted times, without what a change costs.

        Args:
            mitigation: which change.
            timed: its times.
            setting: what of it.
            premise: what it rests on.
            assumed: something of it is assumed.
            algorithm: of its exchanges, where it is another than today's.
            extra_us_S: what comes on top in each step.
            beyond: times of the simpler change that it adds to.
            is_other_fabric: its exchanges are between other ranks than today's, so that errors do not cancel.
        """
        if (timed.reason is None) != (self.today.reason is None):
            return Verdict(
                mitigation=mitigation,
                setting=setting,
                code=VerdictCode.NOT_KNOWN,
                premise=premise,
                reason=timed.reason or self.today.reason,
            )
        extra_S = np.zeros_like(timed.experts_S) if extra_us_S is None else extra_us_S
        total_S = timed.total_S + extra_S
        cancels = algorithm in (None, self.setup.algorithm) and not is_other_fabric
        used = algorithm or self.setup.algorithm
        gain = self._gain(self.today, timed, total_S, used, cancels=cancels)
        further = None
        if beyond is not None:
            further = self._gain(beyond, timed, total_S, used, cancels=cancels)
        code, reason = code_of(further or gain), None
        other_fabric = timed.other_fabric or self.today.other_fabric
        if code is VerdictCode.CHANGE and other_fabric is not None:
            code, reason = VerdictCode.EXTRAPOLATED, other_fabric
        return Verdict(
            mitigation=mitigation,
            setting=setting,
            code=code,
            gain=gain,
            beyond=further,
            premise=premise,
            grades=self.grades(assumed=assumed),
            reason=reason,
            **shown(timed, total_S, extra_S),
        )

    def _with_costs(self, verdict: Verdict, change: Change, simpler: Timed | None) -> Verdict:
        """With memory, the cost of getting there, and whether that pays; of what it adds to a simpler one."""
        kv_bytes = self.setup.kv_bytes_per_token
        change_us = self._change_us(change)
        costs: dict[str, Any] = {
            "memory_bytes": change.memory_bytes,
            "kv_tokens": None if kv_bytes is None else change.memory_bytes / kv_bytes,
            "change_us": change_us,
        }
        if verdict.code is not VerdictCode.CHANGE or verdict.step_us is None:
            return replace(verdict, **costs)
        costs["change"] = change
        if self.over_memory(change.memory_bytes):
            return self.without_room(replace(verdict, **costs), change.memory_bytes)
        if change_us is None:
            return replace(verdict, reason=Reason(MitigationCode.NO_MOVE_RATE), **costs)
        before_us = float((self.today if simpler is None else simpler).total_S.mean())
        first_us = 0.0
        if simpler is not None and self.simpler is not None:
            first_us = self._change_us(self.simpler) or 0.0
        after = float(np.ceil(max(change_us - first_us, 0.0) / max(before_us - verdict.step_us, 1e-300)))
        pays = after <= self.models.horizon_steps
        code = VerdictCode.CHANGE if pays else VerdictCode.DOES_NOT_PAY
        return replace(verdict, code=code, break_even_steps=after, **costs)

    def reference(self, mitigation: Mitigation, timed: Timed, *, setting: str = "") -> Verdict:
        """A row that others are compared with: no verdict."""
        return Verdict(
            mitigation=mitigation,
            setting=setting,
            code=VerdictCode.REFERENCE,
            gain=None
            if timed is self.today
            else self._gain(self.today, timed, timed.total_S, self.setup.algorithm, cancels=True),
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
        """90th percentile of the error of the network model on held-out matrices; 0 without one."""
        if self.models.network is None:
            return 0.0
        try:
            fit = self.models.network.of(algorithm)
        except BenchmarkError:
            return 0.0
        if fit.verdict is not None:
            return fit.verdict.p90_error
        return min((score.p90_error for score in fit.scores), default=_UNKNOWN_ERROR)

    @property
    def expert_error(self) -> float:
        """90th percentile of the error of expert times on held-out points, or what it is taken to be."""
        error = self.models.experts.p90_error
        return _UNKNOWN_ERROR if error is None else error

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
        empty_S = np.full(len(self.judged_S), self.layers * self.least_exchange_us()) if is_known else None
        return replace(
            balanced,
            counts_S=empty_S if self.setup.announce_bytes or empty_S is None else 0.0 * empty_S,
            dispatch_S=empty_S,
            combine_S=empty_S,
            waiting_S=np.zeros_like(balanced.waiting_S),
            energy_S=None,
            no_energy=Reason(MitigationCode.NO_PROGRAM),
            covered=0.0,
        )

    def least_exchange_us(self) -> float:
        """What an exchange of nothing takes, by the algorithm for which that is least."""
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

    def _gain(
        self, before: Timed, timed: Timed, total_S: Float64, algorithm: str, *, cancels: bool
    ) -> Interval:
        """Share of the time before that is removed, with the scatter of steps and the errors of the models.

        Of exchanges whose errors cancel, only the difference has one.
        """
        gain = self.paired(before.total_S, total_S)
        exchange_us = float(np.abs(timed.exchange_S - before.exchange_S).mean())
        if not cancels:
            exchange_us = float((timed.exchange_S + before.exchange_S).mean())
        compute_us = float(np.abs(timed.compute_S - before.compute_S).mean())
        exchange_error = max(self.exchange_error(algorithm), self.exchange_error(self.setup.algorithm))
        error_us = self.expert_error * compute_us + exchange_error * exchange_us
        error = error_us / max(float(before.total_S.mean()), 1e-300)
        assert gain.low is not None
        assert gain.high is not None
        return Interval(
            value=gain.value,
            low=gain.value - float(np.hypot(gain.value - gain.low, error)),
            high=min(1.0, gain.value + float(np.hypot(gain.high - gain.value, error))),
        )

    def paired(self, before_S: Float64, after_S: Float64) -> Interval:
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

    def without_room(self, verdict: Verdict, more_bytes: int) -> Verdict:
        """The verdict on a change whose experts exceed the memory of a rank."""
        assert self.setup.memory_bytes is not None
        needed_bytes = self.held_bytes + more_bytes
        values = {"needed_bytes": needed_bytes, "memory_bytes": int(self.setup.memory_bytes)}
        reason = Reason(MitigationCode.NO_ROOM, values)
        return replace(verdict, code=VerdictCode.DOES_NOT_FIT, reason=reason)

    def _change_us(self, change: Change) -> float | None:
        """Once: the weights that the busiest rank receives, and the stall; None where no rate is known."""
        if change.slot_LPK is None and change.moved_bytes is None:
            return 0.0
        rate, moved_bytes = self.move_rate, change.moved_bytes
        if rate is None:
            return None
        if moved_bytes is None:
            assert change.slot_LPK is not None
            received_P = self._received(change.slot_LPK).sum(axis=0)
            moved_bytes = float(received_P.max()) * self.models.experts.shape.expert_bytes
        return 1e6 * (moved_bytes / rate + self.setup.stall_s)

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
        return self.setup.move_bytes_per_s or self.fitted_rate

    @property
    def fitted_rate(self) -> float | None:
        """Slowest rate of the network model, bytes per second; None without one."""
        if self.models.network is None:
            return None
        rates = [
            item.gb_per_s
            for item in self.models.network.fits[0].coefficients
            if item.gb_per_s and item.term != "bytes_self"
        ]
        return 1e9 * min(rates) if rates else None


def code_of(gain: Interval) -> VerdictCode:
    """What a gain comes to before its costs."""
    assert gain.low is not None
    assert gain.high is not None
    if gain.high < -_WORTH:
        return VerdictCode.WORSE
    if gain.low > 0 and gain.value >= _WORTH:
        return VerdictCode.CHANGE
    return VerdictCode.UNCERTAIN if gain.high > _LARGE else VerdictCode.NO_GAIN


def shown(timed: Timed, total_S: Float64, extra_S: Float64) -> dict[str, Any]:
    """The times of a verdict."""
    extra = {"extra": float(extra_S.mean())} if extra_S.any() else {}
    energy_S, covered, no_energy = timed.energy_of(total_S)
    return {
        "step_us": float(total_S.mean()),
        "p10_us": float(np.quantile(total_S, 0.1)),
        "p90_us": float(np.quantile(total_S, 0.9)),
        "parts_us": timed.parts() | extra,
        "extrapolated": timed.extrapolated,
        "farthest": timed.farthest,
        "energy_mj": None if energy_S is None else float(energy_S.mean()),
        "energy_covered": covered,
        "energy_reason": no_energy,
    }


def not_known(mitigation: Mitigation, code: MitigationCode, **values: Any) -> Verdict:
    """A verdict that something is missing for."""
    return Verdict(mitigation=mitigation, code=VerdictCode.NOT_KNOWN, reason=Reason(code, values))


def not_applicable(mitigation: Mitigation, code: MitigationCode, **values: Any) -> Verdict:
    """A verdict on what has nothing to change here."""
    return Verdict(mitigation=mitigation, code=VerdictCode.NOT_APPLICABLE, reason=Reason(code, values))

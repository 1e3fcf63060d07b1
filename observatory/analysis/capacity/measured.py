"""Serving steps from measurements of this machine: of its experts, its exchanges, and the rest of a step.

Shapes: seconds have three values, (3,): fast, likely, slow. N steps, S draws, L layers, P ranks.

    step = rest(tokens) + MoE layers (`observatory.analysis.experts.step_time`)

The rest (mixers, dense blocks, head, the program) is a call and a rate of tokens, fitted to steps of captured
runs from which the MoE layers were taken off: by their own spans where there are any, else as the expert
benchmark predicts them. It is taken not to depend on the length of the context. Ranks that are more than the
cores of the machine take turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from observatory.analysis.capacity.layers import exchange_part, experts_part, layer_times, total_s
from observatory.analysis.capacity.model_shape import ModelShape
from observatory.analysis.capacity.routed import Routed
from observatory.analysis.capacity.step import Memory, Parallel, Part, Step, Work
from observatory.analysis.experts.cost import ExpertCost
from observatory.analysis.parallel.step_loads import step_loads
from observatory.errors import PlanError
from observatory.run.documents.expert_bench import ELEMENT_BYTES
from observatory.run.usable_cores import core_shares

if TYPE_CHECKING:
    from observatory.analysis.network.network import NetworkModel
    from observatory.run import Run

Float64 = NDArray[np.float64]

_FEWEST_STEPS = 4
_PHASE, _LAYER = "phase", "moe_layer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rest:
    """Everything of a step but its MoE layers, on one rank.

    Attributes:
        call_s, token_s: seconds of a step and of one of its tokens.
        low, high: first and ninth decile of measured over fitted time of whole steps.
        most_tokens: of the largest step that was measured.
    """

    call_s: float
    token_s: float
    low: float
    high: float
    most_tokens: float

    def seconds(self, tokens: int) -> float:
        """Of so many tokens of a rank."""
        return self.call_s + self.token_s * tokens

    @property
    def spread_3(self) -> Float64:
        """By what factor a step may be faster or slower."""
        return np.array([min(self.low, 1.0), 1.0, max(self.high, 1.0)])


class MeasuredServer:
    """A model on this machine, as `observatory.analysis.capacity.serving.Server` is one on described devices.

    Args:
        model: its shape.
        runs: of the model on this machine, with the duration of their steps.
        experts: times of its experts here.
        network: of exchanges between ranks here; None: one rank only.

    Raises:
        PlanError: no run has the duration of its steps.
    """

    name = "this machine"
    tensor_parallel: tuple[int, ...] = (1,)
    power_limit_w: float | None = None

    def __init__(
        self, model: ModelShape, runs: Sequence[Run], experts: ExpertCost, network: NetworkModel | None
    ) -> None:
        if any(run.manifest.config.get("device") not in (None, "cpu") for run in runs):
            raise PlanError(
                "runs on an accelerator do not state its memory",
                remedy="name it with --hardware; --experts and --network take the place of published figures",
            )
        dtype = (runs[0].manifest.model.dtype or model.dtype).removeprefix("torch.")
        size = float(ELEMENT_BYTES.get(dtype, 4))
        self.model = replace(
            model, dtype=dtype, expert_dtype=dtype, weight_bytes=size, expert_weight_bytes=size
        )
        self._experts, self._network, self._element_bytes = experts, network, size
        shares = core_shares(status.cores for status in runs[0].manifest.ranks[:1])
        self._cores = shares[0].cores if shares else None
        self._host_bytes = next(
            (host.memory_bytes for run in runs for host in run.manifest.hosts if host.memory_bytes), None
        )
        self._rests = {
            phase: rest
            for phase in ("decode", "prefill")
            if (rest := _fit_rest(phase, runs, experts, self._cores)) is not None
        }
        if not self._rests:
            raise PlanError(
                "no run has the duration of its steps",
                expected=f"runs with at least {_FEWEST_STEPS} steps of decode or prefill",
                remedy="profile again, or name devices with --hardware",
            )

    @property
    def gpus_per_domain(self) -> int:
        """Ranks that fast links join: all of one machine."""
        return 1 << 16

    @property
    def most_ranks(self) -> int:
        """Ranks that are tried; more than one only where exchanges were measured."""
        if self._network is None:
            return 1
        return max(max(fit.domain.ranks) for fit in self._network.fits)

    def memory(self, parallel: Parallel, tokens: int) -> Memory:
        """Bytes of a rank; ranks of the machine share its memory alike.

        Raises:
            PlanError: the runs do not state the memory of their host.
        """
        if self._host_bytes is None:
            raise PlanError("the runs do not state the memory of their host")
        model, size = self.model, self._element_bytes
        device = self._host_bytes / parallel.ranks
        return Memory(
            device=device,
            usable=0.9 * device,
            weights=model.outside_values * size,
            experts=model.moe_layers * parallel.slots * model.moe.expert_values * size,
            workspace=2.0 * tokens * (1 + model.moe.top_k) * model.hidden * size,
            program=1e9,
            cache_per_token=sum(count * layer.cache_values * size for count, layer in model.layers),
            state_per_sequence=sum(count * layer.state_values * 4 for count, layer in model.layers),
        )

    def step(self, parallel: Parallel, work: Work, routed: Routed) -> Step:
        """Time of a step in which every rank does the same work.

        Raises:
            PlanError: a phase was not captured, or an exchange cannot be predicted.
        """
        computed = [("decode", work.decode), ("prefill", work.prefill)]
        rests = [(self._rest(phase), tokens) for phase, tokens in computed if tokens]
        rest_s = self._turns(parallel.ranks) * sum(rest.seconds(tokens) for rest, tokens in rests)
        spread_3 = np.mean([rest.spread_3 for rest, _ in rests], axis=0)
        is_beyond = any(tokens > rest.most_tokens for rest, tokens in rests)
        parts = [
            Part("rest", np.full(3, rest_s), "measured", is_extrapolated=is_beyond),
            *self._layers(parallel, work, routed),
        ]
        return Step(
            parts=tuple(
                part if part.grade == "fitted" else replace(part, s_3=part.s_3[1] * spread_3)
                for part in parts
            )
        )

    def _rest(self, phase: str) -> Rest:
        rest = self._rests.get(phase)
        if rest is None:
            raise PlanError(f"no run has steps of {phase} with their duration")
        return rest

    def _layers(self, parallel: Parallel, work: Work, routed: Routed) -> list[Part]:
        ranks = parallel.ranks
        busy_SLP, activated_SLP = routed.rank_work(
            ranks, parallel.slots, decode=work.decode * ranks, prefill=work.prefill * ranks
        )
        times = layer_times(
            busy_SLP,
            activated_SLP,
            self._experts,
            self._network,
            gpus_per_node=parallel.gpus_per_node,
            cores=self._cores,
        )
        alone = sum(total_s(part) for part in (times.shared_s, times.local_s) if part is not None)
        parts = [
            experts_part(times, self._experts),
            Part("local", np.full(3, self._turns(ranks) * alone), "measured"),
        ]
        if ranks > 1 and self._network is not None:
            parts.append(exchange_part(times, self._network))
        return parts

    def _turns(self, ranks: int) -> float:
        """By what factor work takes longer where ranks share cores."""
        return 1.0 if self._cores is None else max(1.0, ranks / self._cores)


def _fit_rest(phase: str, runs: Sequence[Run], experts: ExpertCost, cores: float | None) -> Rest | None:
    """Rest of the steps of one phase; None where too few have a duration."""
    from scipy.optimize import nnls

    rows = [row for run in runs for row in _rests_of(run, phase, experts, cores)]
    if len(rows) < _FEWEST_STEPS:
        return None
    tokens_N, rest_N, inside_N = np.array(rows).T
    whole_N = rest_N + inside_N
    sizes_M = np.unique(tokens_N)
    # Medians, as single steps of a shared machine take many times as long as others.
    rest_M = np.array([np.median(rest_N[tokens_N == size]) for size in sizes_M])
    whole_M = np.array([np.median(whole_N[tokens_N == size]) for size in sizes_M])
    # One number of tokens cannot separate a call from its tokens: all of it is then the call's.
    columns = np.stack([np.ones_like(sizes_M), sizes_M * (len(sizes_M) > 1)], axis=1)
    call_s, token_s = nnls(columns / whole_M[:, None], rest_M / whole_M)[0].tolist()
    ratio_N = whole_N / (call_s + token_s * tokens_N + inside_N)
    low, high = np.quantile(ratio_N, [0.1, 0.9]).tolist()
    return Rest(call_s=call_s, token_s=token_s, low=low, high=high, most_tokens=float(sizes_M[-1]))


def _rests_of(
    run: Run, phase: str, experts: ExpertCost, cores: float | None
) -> list[tuple[float, float, float]]:
    """Tokens of a rank, and seconds of its steps without MoE layers and in them."""
    spans = run.spans()
    spans = spans[(spans["phase"] == phase) & spans["end_ns"].notna()]
    if spans.empty:
        return []
    s = (spans["end_ns"].astype("int64") - spans["start_ns"].astype("int64")) / 1e9
    keys = [spans["step"], spans["source_rank"]]
    whole = s[spans["name"] == _PHASE].groupby(keys).sum().groupby(level=0).mean()
    layers = s[spans["name"] == _LAYER].groupby(keys).sum().groupby(level=0).mean()
    loads = step_loads(run)
    top_k, ranks = experts.shape.top_k, run.manifest.topology.ranks
    if top_k is None:
        return []
    turns = 1.0 if cores is None else max(1.0, ranks / cores)
    rows = []
    assert loads.step_S is not None
    for at, step in enumerate(loads.step_S):
        if loads.phase_S[at] != phase or step not in whole.index:
            continue
        load_LE = loads.load_SLE[at]
        tokens = float(load_LE[0].sum()) / top_k / ranks
        if step in layers.index:
            inside = float(layers[step])
        elif run.manifest.topology.ep == 1 and ranks == 1:
            inside = _alone(load_LE, tokens, experts)
        else:
            continue
        rows.append((tokens, (float(whole[step]) - inside) / turns, inside / turns))
    return rows


def _alone(load_LE: NDArray[np.int64], tokens: float, experts: ExpertCost) -> float:
    """Seconds of the MoE layers of a step on one rank that holds all experts."""
    layers = len(load_LE)
    total = float(experts.seconds(load_LE.sum(axis=1), (load_LE > 0).sum(axis=1)).sum())
    for part in (experts.shared_seconds(tokens), experts.local_seconds(tokens)):
        total += 0.0 if part is None else layers * float(part)
    return total

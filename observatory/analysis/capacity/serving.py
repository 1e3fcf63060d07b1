"""Memory and time of serving steps on ranks that a hardware profile describes.

Shapes: seconds and rates have three values, (3,): fast, likely, slow. S draws, L layers, P ranks, K slots.

P ranks hold the experts (EP = P). Attention is split over ``tp`` neighbours, and the P / tp groups serve
sequences of their own (data parallel). One step, every part as long as its slowest rank::

    mixers     max(weights / memory, arithmetic) + max(cache / memory, scores) of each group
    dense      dense blocks, shared experts, router: max(weights / memory, arithmetic)
    experts    the busiest rank of each layer: max(weights of activated experts / memory, padded arithmetic)
    exchange   dispatch and combine: the busiest rank's bytes over links of the node, and over its adapter
    all-reduce of the tensor-parallel groups; head; what the program takes for a step; launches

Waiting is inside ``experts`` and ``exchange``: both are those of the busiest rank, layer by layer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from observatory.analysis.capacity.layers import exchange_part, experts_part, layer_times
from observatory.analysis.capacity.model_shape import LayerShape, ModelShape
from observatory.analysis.capacity.rates import Grade, Rate, arithmetic_rate, figure, rate
from observatory.analysis.capacity.routed import Routed
from observatory.analysis.capacity.step import Memory, Parallel, Part, Step, Work
from observatory.analysis.experts.cost import GPU_TILE, ExpertCost, of_hardware, padded
from observatory.analysis.hardware import HardwareProfile
from observatory.errors import PlanError
from observatory.run.documents.expert_bench import ELEMENT_BYTES, ExpertShape

if TYPE_CHECKING:
    from observatory.analysis.network.network import NetworkModel

Float64 = NDArray[np.float64]

_OPERATIONS = 2
#: Kernels of a layer: norms, projections, attention, router, sorting, two grouped ones, sums.
_KERNELS = 12
#: Seconds of a step that scheduling and sampling take: InferSim adds 5 ms to a decode step.
_PROGRAM_S = (0.0005, 0.003, 0.005)
#: Seconds of an exchange without bytes: aiconfigurator adds 10 us a transfer.
_EXCHANGE_S = (5e-6, 10e-6, 30e-6)
#: Part of the memory that a server takes by default (gpu_memory_utilization of vLLM).
_USABLE = 0.9
#: Bytes of program, context and captured graphs.
_PROGRAM_BYTES = 3e9


class Server:
    """A model on devices of one kind, described by a profile.

    Args:
        model: its shape.
        profile: of the devices.
        cache_bytes: bytes of a value in the cache; by default those of the activations.
        overlap: exchanges run under the computation of another micro-batch.
        experts: times of its experts on such devices, where they were measured.
        network: of exchanges between such devices, where it was fitted.

    Raises:
        PlanError: the profile lacks a rate that is always needed.
    """

    tensor_parallel: tuple[int, ...] = (1, 2, 4, 8)
    most_ranks = 1024

    def __init__(
        self,
        model: ModelShape,
        profile: HardwareProfile,
        *,
        cache_bytes: float | None = None,
        overlap: bool = False,
        experts: ExpertCost | None = None,
        network: NetworkModel | None = None,
    ) -> None:
        self._measured_experts, self._network = experts, network
        self.model, self.profile, self.overlap = model, profile, overlap
        # Scores are computed in 16 bits, whatever the weights are.
        self._score_dtype = model.dtype if ELEMENT_BYTES[model.dtype] > 1 else "bfloat16"
        self._activation_bytes = float(ELEMENT_BYTES[self._score_dtype])
        self._cache_bytes = cache_bytes or self._activation_bytes
        self._memory = rate(profile, "memory_bandwidth")
        self._weights_rate = arithmetic_rate(profile, model.dtype)
        self._score_rate = arithmetic_rate(profile, self._score_dtype)
        self._expert_rate = arithmetic_rate(profile, model.expert_dtype)
        launch = figure(profile, "launch")
        self._launch_s = 0.0 if launch is None else launch.value * 1e-6
        self._grade: Grade = _worst(self._memory, self._weights_rate, self._score_rate)

    @property
    def gpus_per_domain(self) -> int:
        """Devices that fast links join."""
        known = figure(self.profile, "scale_up_devices")
        return 8 if known is None else int(known.value)

    @property
    def power_limit_w(self) -> float | None:
        """Of one device; None where the profile does not have it."""
        known = figure(self.profile, "power_limit")
        return None if known is None else known.value

    def memory(self, parallel: Parallel, tokens: int) -> Memory:
        """Bytes of a rank that computes up to so many tokens of its group at once.

        Raises:
            PlanError: the profile has no memory size.
        """
        model, device = self.model, figure(self.profile, "memory")
        if device is None:
            raise PlanError(
                f"the hardware profile of {self.profile.name} has no memory",
                remedy="add [peak.memory] with value, unit, source and date",
            )
        tp, moe = parallel.tp, model.moe
        # Rows that a rank may get: all copies of its own tokens, there and back.
        rows = tokens / tp * (1 + moe.top_k)
        return Memory(
            device=device.value * 1e9,
            usable=_USABLE * device.value * 1e9,
            weights=model.outside_values * model.weight_bytes / tp,
            experts=model.moe_layers * parallel.slots * moe.expert_values * model.expert_weight_bytes,
            workspace=2.0 * rows * model.hidden * self._activation_bytes,
            program=_PROGRAM_BYTES,
            cache_per_token=sum(
                count * self._cached_bytes(layer, tp) for count, layer in model.layers if layer.window is None
            ),
            state_per_sequence=sum(count * layer.state_values * 4 / tp for count, layer in model.layers),
            windows=tuple(
                (layer.window, count * self._cached_bytes(layer, tp))
                for count, layer in model.layers
                if layer.window is not None
            ),
        )

    def step(self, parallel: Parallel, work: Work, routed: Routed) -> Step:
        """Time of a step in which every group does the same work.

        Args:
            parallel: how the model is spread.
            work: of one group.
            routed: what ranks get of the tokens.

        Raises:
            PlanError: the profile lacks the rate of a link that is needed.
        """
        if self.overlap and work.tokens > 1:
            once = self._parts(parallel, work.halved(), routed)
            twice = tuple(replace(part, s_3=2.0 * part.s_3) for part in once)
            parts = (*twice, self._program())
            return Step(parts=parts, is_overlapped=True)
        return Step(parts=(*self._parts(parallel, work, routed), self._program()))

    def _program(self) -> Part:
        return Part("program", np.array(_PROGRAM_S), "assumed")

    def _parts(self, parallel: Parallel, work: Work, routed: Routed) -> tuple[Part, ...]:
        model = self.model
        mixers_3, dense_3 = np.zeros(3), np.zeros(3)
        for count, layer in model.layers:
            mixers_3 += count * self._mixer(layer, parallel.tp, work)
            dense_3 += count * self._weights(layer.dense_values, parallel.tp, work.tokens)
        outputs = work.decode + (1 if work.prefill else 0)
        head_3 = self._weights(model.head_values, parallel.tp, outputs)
        layers = sum(count for count, _ in model.layers)
        launches_3 = np.full(3, layers * _KERNELS * self._launch_s)
        busy_SLP, activated_SLP = routed.rank_work(
            parallel.ranks,
            parallel.slots,
            decode=work.decode * parallel.groups,
            prefill=work.prefill * parallel.groups,
        )
        parts = [
            Part("mixers", mixers_3, self._grade),
            Part("dense", dense_3, self._grade),
            self._experts(busy_SLP, activated_SLP, parallel),
            Part("head", head_3, self._grade),
            Part("launches", launches_3, "assumed"),
        ]
        if parallel.tp > 1:
            parts.append(self._all_reduce(parallel, work))
        if parallel.ranks > 1:
            parts.append(self._exchange(parallel, work, busy_SLP, activated_SLP))
        return tuple(parts)

    def _mixer(self, layer: LayerShape, tp: int, work: Work) -> Float64:
        if layer.mixer == "none":
            return np.zeros(3)
        seconds_3 = self._weights(layer.mixer_values, tp, work.tokens)
        state_bytes = 2 * 4 * layer.state_values * work.decode / tp
        seconds_3 = seconds_3 + state_bytes / self._memory.per_s_3
        if not layer.cache_values:
            return seconds_3
        attended = layer.attended(work.context)
        # An indexer reads and scores its own keys of the whole context.
        indexed = layer.index_values / layer.cache_values
        read = attended * (1.0 - indexed) + work.context * indexed
        cache_bytes = work.decode * read * self._cached_bytes(layer, tp)
        flops = work.decode * (attended * layer.decode_flops + work.context * layer.index_flops) / tp
        # A prompt's tokens see half of it on average.
        seen = work.prompt / 2
        flops_of_token = layer.attended(seen) * layer.prefill_flops + seen * layer.index_flops
        prompt_flops = work.prefill * flops_of_token / tp
        scores_3 = np.maximum(cache_bytes / self._memory.per_s_3, flops / self._score_rate.per_s_3)
        return np.asarray(seconds_3 + scores_3 + prompt_flops / self._score_rate.per_s_3)

    def _cached_bytes(self, layer: LayerShape, tp: int) -> float:
        """Of a token of context, on one rank."""
        return layer.cache_values * self._cache_bytes / min(tp, layer.cache_parts)

    def _weights(self, values: float, tp: int, tokens: int) -> Float64:
        """Seconds of matrices that every token of the group passes."""
        if not values or not tokens:
            return np.zeros(3)
        bytes_, flops = values * self.model.weight_bytes / tp, _OPERATIONS * values * tokens / tp
        return np.asarray(np.maximum(bytes_ / self._memory.per_s_3, flops / self._weights_rate.per_s_3))

    def _experts(self, busy_SLP: Float64, activated_SLP: Float64, parallel: Parallel) -> Part:
        """The busiest rank of each layer, summed over layers, mean over draws."""
        if self._measured_experts is not None:
            cost = self._measured_experts
            times = layer_times(busy_SLP, activated_SLP, cost, None, gpus_per_node=parallel.gpus_per_node)
            return experts_part(times, cost)
        values = self.model.moe.expert_values
        read_SLP = activated_SLP * values * self.model.expert_weight_bytes
        rows_SLP = np.where(busy_SLP > 0, padded(busy_SLP, activated_SLP, GPU_TILE), 0.0)
        flops_SLP = _OPERATIONS * values * rows_SLP
        seconds_3 = [
            float(np.maximum(read_SLP / memory, flops_SLP / arithmetic).max(axis=2).sum(axis=1).mean())
            for memory, arithmetic in zip(self._memory.per_s_3, self._expert_rate.per_s_3, strict=True)
        ]
        return Part("experts", np.array(seconds_3), _worst(self._memory, self._expert_rate))

    @property
    def _expert_shape(self) -> ExpertShape:
        moe, model = self.model.moe, self.model
        return ExpertShape(
            hidden=model.hidden,
            intermediate=max(1, moe.expert_values // (3 * model.hidden)),
            experts=moe.experts,
            top_k=moe.top_k,
            dtype=self._score_dtype,
            expert_bytes=max(1, int(moe.expert_values * model.expert_weight_bytes)),
        )

    def _all_reduce(self, parallel: Parallel, work: Work) -> Part:
        """Of the outputs of every mixer and dense block, as a ring."""
        link = rate(self.profile, "link_bandwidth")
        tp = parallel.tp
        bytes_ = 2 * (tp - 1) / tp * work.tokens * self.model.hidden * self._activation_bytes
        times = sum(count * (1 + (layer.dense_values > 0)) for count, layer in self.model.layers)
        return Part("all-reduce", times * (bytes_ / link.per_s_3 + np.array(_EXCHANGE_S)), link.grade)

    def _exchange(self, parallel: Parallel, work: Work, busy_SLP: Float64, activated_SLP: Float64) -> Part:
        """Dispatch and combine of the busiest rank, with rows of this rank's experts left out.

        With prompt tokens a token crosses to a node once and is copied there, as DeepEP's normal kernels do;
        else each of its K rows travels by itself, as with those for low latency.
        """
        if self._network is not None:
            cost = self._measured_experts or of_hardware(self.profile, self._expert_shape)
            times = layer_times(
                busy_SLP, activated_SLP, cost, self._network, gpus_per_node=parallel.gpus_per_node
            )
            return exchange_part(times, self._network)
        model, ranks = self.model, parallel.ranks
        there = model.hidden * min(self._activation_bytes, max(model.weight_bytes, 1.0))
        row_bytes = there + model.hidden * self._activation_bytes
        rows_SL = np.maximum(busy_SLP.max(axis=2), work.tokens / parallel.tp * model.moe.top_k)
        inside = (min(parallel.gpus_per_node, ranks) - 1) / ranks
        across = 1.0 - min(parallel.gpus_per_node, ranks) / ranks
        links = [rate(self.profile, "link_bandwidth")]
        inside_bytes = inside * rows_SL * row_bytes
        seconds_3 = [inside_bytes.sum(axis=1).mean() / value for value in links[0].per_s_3]
        if across > 0:
            adapter = rate(self.profile, "nic_bandwidth")
            links.append(adapter)
            once = 1.0
            if work.prefill:
                nodes, top_k = parallel.nodes, model.moe.top_k
                once = nodes * (1.0 - (1.0 - 1.0 / nodes) ** top_k) / top_k
            across_bytes = across * once * rows_SL * row_bytes
            beyond_3 = np.array([across_bytes.sum(axis=1).mean() / value for value in adapter.per_s_3])
            # Both ways are used at the same time.
            seconds_3 = list(np.maximum(seconds_3, beyond_3))
        waits_3 = 2 * model.moe_layers * np.array(_EXCHANGE_S)
        return Part("exchange", np.array(seconds_3) + waits_3, _worst(*links))


def _worst(*rates: Rate) -> Grade:
    return "assumed" if any(item.grade == "assumed" for item in rates) else "published"

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

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from observatory.analysis.capacity.model_shape import LayerShape, ModelShape
from observatory.analysis.capacity.rates import Grade, Rate, arithmetic_rate, figure, rate
from observatory.analysis.capacity.routed import Routed
from observatory.analysis.experts.cost import padded
from observatory.analysis.hardware import HardwareProfile
from observatory.errors import PlanError
from observatory.run.documents.expert_bench import ELEMENT_BYTES

Float64 = NDArray[np.float64]

#: Rows of a tile of grouped kernels; block sizes of 64 and 128 rows are usual.
_TILE = 64
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
#: Batch sizes that graphs are captured for by default (vLLM); others are padded to the next.
CAPTURED = (1, 2, 4, *range(8, 257, 8), *range(272, 513, 16))


def captured_size(sequences: int) -> int:
    """Size to which a batch is padded; itself beyond the largest graph, which runs without one."""
    return next((size for size in CAPTURED if size >= sequences), sequences)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """How a model is spread.

    Attributes:
        ranks: P, over which experts are spread.
        tp: ranks that split the attention of one group.
        slots: K, experts that a rank holds in each layer.
        gpus_per_node: ranks that fast links join.
    """

    ranks: int
    tp: int
    slots: int
    gpus_per_node: int

    @property
    def groups(self) -> int:
        """Groups that serve sequences of their own."""
        return self.ranks // self.tp

    @property
    def nodes(self) -> int:
        """Nodes of one instance."""
        return -(-self.ranks // self.gpus_per_node)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one group computes in a step.

    Attributes:
        decode: sequences that get a token.
        context: tokens before it, mean.
        prefill: prompt tokens.
        prompt: length of the prompts that they are of.
    """

    decode: int
    context: float
    prefill: int = 0
    prompt: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens of the group."""
        return self.decode + self.prefill

    def halved(self) -> Work:
        """One of two micro-batches."""
        return Work(
            decode=-(-self.decode // 2),
            context=self.context,
            prefill=-(-self.prefill // 2),
            prompt=self.prompt,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Seconds of a part of a step.

    Attributes:
        name: of the part.
        s_3: fast, likely, slow.
        grade: the worst that it rests on.
    """

    name: str
    s_3: Float64
    grade: Grade


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """A step of the busiest rank.

    Attributes:
        parts: in order.
        is_overlapped: exchanges run under the computation of another micro-batch: the longer of both counts.
    """

    parts: tuple[Part, ...]
    is_overlapped: bool = False

    @property
    def s_3(self) -> Float64:
        """Seconds: fast, likely, slow."""
        exchange_3 = sum((part.s_3 for part in self.parts if part.name == "exchange"), np.zeros(3))
        others_3 = sum((part.s_3 for part in self.parts if part.name != "exchange"), np.zeros(3))
        return np.asarray(np.maximum(exchange_3, others_3) if self.is_overlapped else exchange_3 + others_3)

    def part_of(self, grade: Grade) -> float:
        """Part of the likely time that rests on a grade."""
        total = sum(float(part.s_3[1]) for part in self.parts)
        return sum(float(part.s_3[1]) for part in self.parts if part.grade == grade) / max(total, 1e-300)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        device: of the device.
        usable: what a server takes of it.
        weights: all but routed experts.
        experts: routed experts, replicas among them.
        workspace: activations and buffers of exchanges.
        program: program, context and captured graphs.
        cache_per_token: of a group's context, on one rank.
        state_per_sequence: of one sequence, on one rank.
    """

    device: float
    usable: float
    weights: float
    experts: float
    workspace: float
    program: float
    cache_per_token: float
    state_per_sequence: float

    @property
    def for_cache(self) -> float:
        """Bytes that are left for caches; negative where weights do not fit."""
        return self.usable - self.weights - self.experts - self.workspace - self.program

    def sequences(self, tokens: float) -> int:
        """Sequences of a group whose caches of so many tokens fit."""
        return max(0, int(self.for_cache // max(self.of_sequence(tokens), 1e-9)))

    def of_sequence(self, tokens: float) -> float:
        """Bytes of the cache of one sequence, on one rank."""
        return tokens * self.cache_per_token + self.state_per_sequence


class Server:
    """A model on devices of one kind.

    Args:
        model: its shape.
        profile: of the devices.
        cache_bytes: bytes of a value in the cache; by default those of the activations.
        overlap: exchanges run under the computation of another micro-batch.

    Raises:
        PlanError: the profile lacks a rate that is always needed.
    """

    def __init__(
        self,
        model: ModelShape,
        profile: HardwareProfile,
        *,
        cache_bytes: float | None = None,
        overlap: bool = False,
    ) -> None:
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
        outside = model.embedding_values + sum(
            count * (layer.mixer_values + layer.dense_values) for count, layer in model.layers
        )
        # Rows that a rank may get: all copies of its own tokens, there and back.
        rows = tokens / tp * (1 + moe.top_k)
        return Memory(
            device=device.value * 1e9,
            usable=_USABLE * device.value * 1e9,
            weights=outside * model.weight_bytes / tp,
            experts=model.moe_layers * parallel.slots * moe.expert_values * model.expert_weight_bytes,
            workspace=2.0 * rows * model.hidden * self._activation_bytes,
            program=_PROGRAM_BYTES,
            cache_per_token=sum(
                count * self._cached_bytes(layer, tp) for count, layer in model.layers if layer.window is None
            ),
            state_per_sequence=sum(
                count * (layer.state_values * 4 / tp + (layer.window or 0) * self._cached_bytes(layer, tp))
                for count, layer in model.layers
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
            twice = tuple(Part(part.name, 2.0 * part.s_3, part.grade) for part in once)
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
            Part("experts", self._experts(busy_SLP, activated_SLP), _worst(self._memory, self._expert_rate)),
            Part("head", head_3, self._grade),
            Part("launches", launches_3, "assumed"),
        ]
        if parallel.tp > 1:
            parts.append(self._all_reduce(parallel, work))
        if parallel.ranks > 1:
            parts.append(self._exchange(parallel, work, busy_SLP))
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
        cache_bytes = work.decode * attended * self._cached_bytes(layer, tp)
        flops = work.decode * attended * layer.decode_flops / tp
        # A prompt's tokens see half of it on average.
        prompt_flops = work.prefill * layer.attended(work.prompt / 2) * layer.prefill_flops / tp
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

    def _experts(self, busy_SLP: Float64, activated_SLP: Float64) -> Float64:
        """Seconds of the busiest rank of each layer, summed over layers, mean over draws."""
        values = self.model.moe.expert_values
        read_SLP = activated_SLP * values * self.model.expert_weight_bytes
        rows_SLP = np.where(busy_SLP > 0, padded(busy_SLP, activated_SLP, _TILE), 0.0)
        flops_SLP = _OPERATIONS * values * rows_SLP
        return np.array(
            [
                float(np.maximum(read_SLP / memory, flops_SLP / arithmetic).max(axis=2).sum(axis=1).mean())
                for memory, arithmetic in zip(self._memory.per_s_3, self._expert_rate.per_s_3, strict=True)
            ]
        )

    def _all_reduce(self, parallel: Parallel, work: Work) -> Part:
        """Of the outputs of every mixer and dense block, as a ring."""
        link = rate(self.profile, "link_bandwidth")
        tp = parallel.tp
        bytes_ = 2 * (tp - 1) / tp * work.tokens * self.model.hidden * self._activation_bytes
        times = sum(count * (1 + (layer.dense_values > 0)) for count, layer in self.model.layers)
        return Part("all-reduce", times * (bytes_ / link.per_s_3 + np.array(_EXCHANGE_S)), link.grade)

    def _exchange(self, parallel: Parallel, work: Work, busy_SLP: Float64) -> Part:
        """Dispatch and combine of the busiest rank, with rows of this rank's experts left out.

        With prompt tokens a token crosses to a node once and is copied there, as DeepEP's normal kernels do;
        else each of its K rows travels by itself, as with those for low latency.
        """
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

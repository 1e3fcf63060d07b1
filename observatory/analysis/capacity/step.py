"""A step of serving, the work in it and the memory for it, whatever predicts its time.

Shapes: seconds have three values, (3,): fast, likely, slow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from observatory.analysis.capacity.model_shape import ModelShape
from observatory.analysis.capacity.rates import Grade
from observatory.analysis.capacity.routed import Routed

Float64 = NDArray[np.float64]

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
        is_extrapolated: it lies outside of what was measured.
    """

    name: str
    s_3: Float64
    grade: Grade
    is_extrapolated: bool = False


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

    @property
    def extrapolated(self) -> tuple[str, ...]:
        """Names of the parts that lie outside of what was measured."""
        return tuple(part.name for part in self.parts if part.is_extrapolated)

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
        windows: tokens of a window, and bytes of each on one rank, of layers that keep no more.
    """

    device: float
    usable: float
    weights: float
    experts: float
    workspace: float
    program: float
    cache_per_token: float
    state_per_sequence: float
    windows: tuple[tuple[int, float], ...] = ()

    @property
    def for_cache(self) -> float:
        """Bytes that are left for caches; negative where weights do not fit."""
        return self.usable - self.weights - self.experts - self.workspace - self.program

    def sequences(self, tokens: float) -> int:
        """Sequences of a group whose caches of so many tokens fit."""
        return max(0, int(self.for_cache // max(self.of_sequence(tokens), 1e-9)))

    def of_sequence(self, tokens: float) -> float:
        """Bytes of the cache of one sequence, on one rank."""
        local = sum(min(tokens, window) * bytes_ for window, bytes_ in self.windows)
        return tokens * self.cache_per_token + self.state_per_sequence + local


class Host(Protocol):
    """A model on something that serves it.

    Attributes:
        tensor_parallel: numbers of ranks over which attention may be split.
    """

    tensor_parallel: tuple[int, ...]

    @property
    def model(self) -> ModelShape:
        """The model."""

    @property
    def most_ranks(self) -> int:
        """Ranks that are tried."""

    @property
    def gpus_per_domain(self) -> int:
        """Devices that fast links join."""

    @property
    def power_limit_w(self) -> float | None:
        """Of one device; None where it is not known."""

    def memory(self, parallel: Parallel, tokens: int) -> Memory:
        """Bytes on a rank that computes up to so many tokens of its group at once."""

    def step(self, parallel: Parallel, work: Work, routed: Routed) -> Step:
        """Time of a step in which every group does the same work."""

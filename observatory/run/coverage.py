"""Which rows of the routing table are not there, taken down while the blocks stream past.

Shapes: S steps or windows, P source ranks.

A rank that ended early, a damaged part, a layer that was not captured in some steps: all leave fewer rows in
a phase than the layer and rank with the most. Memory: 16 bytes per step and phase, and 8 per layer and rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from observatory.run.blocks import LoadBlock
from observatory.run.gaps import Gap
from observatory.run.manifest import Manifest

_SHOWN_RANKS = 8


class Coverage:
    """Counts of the steps that each layer and rank have rows for."""

    def __init__(self, ranks: NDArray[np.int64]) -> None:
        """Args: the source ranks of all blocks, (P,)."""
        self._ranks = ranks
        self._steps: dict[str, dict[int, int]] = defaultdict(dict)
        self._rows_P: dict[tuple[str, int], NDArray[np.int64]] = {}
        self._all_rows_P = np.zeros(ranks.size, dtype=np.int64)
        self._partial_P = np.zeros(ranks.size, dtype=np.int64)
        self._partial_steps: set[int] = set()

    def add(self, block: LoadBlock) -> None:
        """Take a block in."""
        steps = self._steps[block.phase]
        for step, length in zip(block.step_S.tolist(), block.window_steps_S.tolist(), strict=True):
            if steps.get(step, 0) < length:
                steps[step] = length
        key = (block.phase, block.layer)
        covered_P = (block.present_SP * block.window_steps_S[:, None]).sum(axis=0)
        self._rows_P[key] = self._rows_P.get(key, 0) + covered_P
        self._all_rows_P += block.present_SP.sum(axis=0)
        if block.partial_SP is not None:
            self._partial_P += block.partial_SP.sum(axis=0)
            self._partial_steps.update(block.step_S[block.partial_SP.any(axis=1)].tolist())

    def add_rank(
        self,
        phase: str,
        layer: int,
        rank: int,
        *,
        covered: int,
        rows: int,
        partial: int,
        partial_steps: Collection[int],
    ) -> None:
        """Take in what a rank has of a layer in a phase, counted elsewhere.

        Args:
            phase: one of ``PHASES``.
            layer: the layer.
            rank: the rank.
            covered: steps that its rows cover.
            rows: their number.
            partial: those that are partial.
            partial_steps: the first and the last step of these.
        """
        p = int(np.searchsorted(self._ranks, rank))
        of_layer = self._rows_P.setdefault((phase, layer), np.zeros(self._ranks.size, dtype=np.int64))
        of_layer[p] += covered
        self._all_rows_P[p] += rows
        self._partial_P[p] += partial
        self._partial_steps.update(partial_steps)

    def add_steps(self, phase: str, length_of_step: Mapping[int, int]) -> None:
        """Take in the steps of a phase, with the most steps that a row of each covers."""
        self._steps[phase].update(length_of_step)

    def gaps(self, manifest: Manifest, holds: Callable[[int, int], bool]) -> Iterator[Gap]:
        """What is missing.

        Args:
            manifest: of the run.
            holds: whether a rank may have rows of a layer.
        """
        if self._partial_P.any():
            of_run = manifest.topology.ranks == 1
            ranks = () if of_run else tuple(self._ranks[self._partial_P > 0].tolist())
            yield Gap(
                code="partial_rows",
                ranks=ranks[:_SHOWN_RANKS],
                rank_count=len(ranks),
                count=int(self._partial_P.sum()),
                of=int(self._all_rows_P.sum()),
                first_step=min(self._partial_steps),
                last_step=max(self._partial_steps),
            )
        for phase, steps in self._steps.items():
            yield from self._of_phase(phase, sum(steps.values()), manifest, holds)

    def _of_phase(
        self, phase: str, expected: int, manifest: Manifest, holds: Callable[[int, int], bool]
    ) -> Iterator[Gap]:
        everywhere = {layer for _, layer in self._rows_P}
        layers = {layer for name, layer in self._rows_P if name == phase}
        layers |= {spec.layer for spec in manifest.model.moe_layers} - everywhere
        none_P = np.zeros(self._ranks.size, dtype=np.int64)
        #: (rows, layers that have so many) of each rank, by what they have in common
        shared: dict[tuple[int, tuple[int, ...]], list[int]] = defaultdict(list)
        for p, rank in enumerate(self._ranks.tolist()):
            held = [layer for layer in sorted(layers) if holds(rank, layer)]
            counts = {layer: int(self._rows_P.get((phase, layer), none_P)[p]) for layer in held}
            for count in sorted(set(counts.values())):
                fewer = tuple(layer for layer in held if counts[layer] == count)
                if count < expected:
                    shared[count, () if len(fewer) == len(held) else fewer].append(rank)
        for (count, fewer), ranks in shared.items():
            is_all = len(ranks) == self._ranks.size and fewer
            yield Gap(
                code="short",
                ranks=() if is_all else tuple(ranks[:_SHOWN_RANKS]),
                rank_count=0 if is_all else len(ranks),
                layers=fewer,
                phase=phase,
                count=count,
                of=expected,
            )

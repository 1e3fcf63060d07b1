"""Loads of single steps, in which the busiest rank of a step is still seen.

Shapes: S steps, L layers, R captured source ranks, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from observatory.errors import PlacementError

if TYPE_CHECKING:
    from observatory.run import Run

Int64 = NDArray[np.int64]

#: Fewer steps than this on either side of a split say nothing about the steps that follow.
FEWEST_STEPS = 8
#: Loads of this many bytes are kept; of a longer run the last steps.
_MOST_BYTES = 512 << 20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepLoads:
    """Loads of the layers of a run, step by step.

    Attributes:
        layers: numbers of the MoE layers.
        top_k: experts of a token, where all layers have as many; None where it is not known.
        phase_S: phase of each step.
        load_SLE: assignments, summed over source ranks.
        step_S: number of each step in the run; None for loads that are of no run.
        load_SLRE: the same loads by source rank; None where they were not asked for.
    """

    layers: tuple[int, ...]
    top_k: int | None
    phase_S: tuple[str, ...]
    load_SLE: Int64
    step_S: tuple[int, ...] | None = None
    load_SLRE: Int64 | None = None

    @property
    def phases(self) -> tuple[str, ...]:
        """Phases of the steps, each once."""
        return tuple(dict.fromkeys(self.phase_S))

    def of_phase(self, phase: str) -> StepLoads:
        """The steps of one phase."""
        return self.of_steps(np.flatnonzero(np.array(self.phase_S) == phase))

    def of_steps(self, at_S: NDArray[np.intp]) -> StepLoads:
        """The steps at these places."""
        return replace(
            self,
            phase_S=tuple(self.phase_S[at] for at in at_S),
            load_SLE=self.load_SLE[at_S],
            step_S=None if self.step_S is None else tuple(self.step_S[at] for at in at_S),
            load_SLRE=None if self.load_SLRE is None else self.load_SLRE[at_S],
        )

    @property
    def largest_phase(self) -> str:
        """The phase with most assignments."""
        per_step_S = self.load_SLE.sum(axis=(1, 2))
        is_of = {phase: np.array(self.phase_S) == phase for phase in sorted(self.phases)}
        return max(is_of, key=lambda phase: int(per_step_S[is_of[phase]].sum()))


def step_loads(run: Run, *, phase: str | None = None, by_source: bool = False) -> StepLoads:
    """Loads of every step of which all layers and ranks have whole rows.

    Args:
        run: an open run.
        phase: only this phase.
        by_source: keep the source ranks apart as well.

    Raises:
        PlacementError: rows fold several steps, layers differ in their experts, no step is whole, or all are
            empty.
    """
    by_step: dict[tuple[int, str], dict[int, Int64]] = {}
    experts: set[int] = set()
    sources = 1
    for block in run.iter_loads(phase=phase):
        if np.any(block.window_steps_S != 1):
            raise PlacementError(
                f"rows of layer {block.layer} fold {int(block.window_steps_S.max())} steps, in which the "
                "busiest rank of a step is lost; capture the run with --window-steps 1"
            )
        experts.add(block.experts)
        sources = len(block.source_rank_P)
        whole_S = block.present_SP.all(axis=1)
        if block.partial_SP is not None:
            whole_S &= ~block.partial_SP.any(axis=1)
        load_SRE = (
            block.load_SPE[whole_S] if by_source else block.load_SPE[whole_S].sum(axis=1, keepdims=True)
        )
        for step, load_RE in zip(block.step_S[whole_S].tolist(), load_SRE, strict=True):
            by_step.setdefault((step, block.phase), {})[block.layer] = load_RE
    if phase is not None and not experts:
        raise PlacementError(f"the run has no steps of {phase}; it has other phases, or no routing rows")
    if len(experts) > 1:
        raise PlacementError(
            f"layers have {', '.join(map(str, sorted(experts)))} experts; expected as many in every layer"
        )
    layers = sorted({layer for loads in by_step.values() for layer in loads})
    whole = [key for key in sorted(by_step) if len(by_step[key]) == len(layers)]
    if not whole:
        raise PlacementError(
            f"no step of {run.path} has whole rows of all layers and ranks; expected at least "
            f"{2 * FEWEST_STEPS}: profile again with more --steps"
        )
    fit = max(1, _MOST_BYTES // (8 * len(layers) * max(experts) * (sources if by_source else 1)))
    whole = whole[-fit:]
    top_k = {spec.top_k for spec in run.manifest.model.moe_layers}
    load_SLRE = np.array([[by_step[key][layer] for layer in layers] for key in whole])
    if not load_SLRE.any():
        raise PlacementError(f"no step of {run.path} has an assignment; profile again with real tokens")
    return StepLoads(
        layers=tuple(layers),
        top_k=top_k.pop() if len(top_k) == 1 else None,
        phase_S=tuple(phase for _, phase in whole),
        load_SLE=load_SLRE.sum(axis=2),
        step_S=tuple(step for step, _ in whole),
        load_SLRE=load_SLRE if by_source else None,
    )

"""Experts that always work and experts that hardly do: information, as leaving some out makes another model.

Shapes: S steps, L layers, E experts.

The standing committee is that of COMMITTEEAUDIT (arXiv 2601.03425) as far as one run can show it: experts
that are active in every step, and among the fewest with half of the load in both halves of the steps of every
phase. Saliency is gate mass where that was captured; REAP multiplies it with activation norms, which are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from observatory.analysis.parallel.step_loads import StepLoads
from observatory.analysis.routing import standing_committee

if TYPE_CHECKING:
    from observatory.run import Run

#: An expert with less than this part of the mean load, or gate mass, is hardly used.
_RARE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerUse:
    """How evenly a layer uses its experts.

    Attributes:
        layer: its number.
        experts: E.
        committee: the standing committee, most loaded first.
        load_share, mass_share: its part of all assignments, and of all gate mass; None where that was not
            captured, and both where there is nothing.
        hardly_used: experts with less than a tenth of the mean load in every phase, and of the mean gate mass
            where that was captured.
    """

    layer: int
    experts: int
    committee: tuple[int, ...]
    load_share: float | None
    mass_share: float | None
    hardly_used: tuple[int, ...]

    def document(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "layer": self.layer,
            "experts": self.experts,
            "committee": list(self.committee),
            "load_share": self.load_share,
            "mass_share": self.mass_share,
            "hardly_used": list(self.hardly_used),
        }


def experts_in_use(run: Run, loads: StepLoads) -> tuple[LayerUse, ...]:
    """The committee and the hardly used experts of each layer.

    Args:
        run: an open run, for its gate mass.
        loads: its loads step by step.
    """
    of_phases = [loads.of_phase(phase).load_SLE for phase in loads.phases]
    mass_of = {phase: _gate_mass(run, phase) for phase in loads.phases}
    uses = []
    for index, layer in enumerate(loads.layers):
        load_P = [load_SLE[:, index] for load_SLE in of_phases]
        mass_P = [mass_of[phase].get(layer) for phase in loads.phases]
        known = [mass_E for mass_E in mass_P if mass_E is not None]
        total_E = np.sum([load_SE.sum(axis=0) for load_SE in load_P], axis=0)
        members = _committee(load_P)
        order = sorted(members, key=lambda expert: -int(total_E[expert]))
        rare_E = np.all([_is_rare(load_SE.sum(axis=0)) for load_SE in load_P], axis=0)
        if len(known) == len(mass_P):
            rare_E &= np.all([_is_rare(mass_E) for mass_E in known], axis=0)
        uses.append(
            LayerUse(
                layer=layer,
                experts=len(total_E),
                committee=tuple(order),
                load_share=_share(total_E, order),
                mass_share=_share(np.sum(known, axis=0), order) if len(known) == len(mass_P) else None,
                hardly_used=tuple(np.flatnonzero(rare_E).tolist()),
            )
        )
    return tuple(uses)


def _committee(load_P: list[NDArray[np.int64]]) -> set[int]:
    """Experts of the committees of all halves that no step leaves out."""
    members = {
        int(expert) for expert in np.flatnonzero(np.all([load.min(axis=0) > 0 for load in load_P], axis=0))
    }
    for load_SE in load_P:
        for half_SE in np.array_split(load_SE, 2):
            half = standing_committee(half_SE.sum(axis=0))
            members &= set() if half is None else set(half.tolist())
    return members


def _is_rare(used_E: NDArray[Any]) -> NDArray[np.bool_]:
    return np.asarray(used_E < _RARE * used_E.mean())


def _share(used_E: NDArray[Any], members: list[int]) -> float | None:
    total = float(used_E.sum())
    return float(used_E[members].sum()) / total if total > 0 else None


def _gate_mass(run: Run, phase: str) -> dict[int, NDArray[np.float64]]:
    """Gate mass of each expert by layer, of the layers all of whose rows have it."""
    mass: dict[int, NDArray[np.float64]] = {}
    lacking = set()
    for block in run.iter_loads(phase=phase):
        if block.gate_mass_SPE is None:
            lacking.add(block.layer)
            continue
        present_SP1 = block.present_SP[..., None]
        mass_E = np.where(present_SP1, block.gate_mass_SPE, 0.0).sum(axis=(0, 1))
        if np.isnan(mass_E).any():
            lacking.add(block.layer)
        mass[block.layer] = mass.get(block.layer, 0.0) + mass_E
    return {layer: mass_E for layer, mass_E in mass.items() if layer not in lacking}

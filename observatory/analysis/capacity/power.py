"""Power that devices of a kind were measured to draw in a phase, to plan with.

Shapes: watts have three values, (3,): low, likely, high.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from observatory.errors import ObservatoryError

if TYPE_CHECKING:
    from observatory.run import Run
    from observatory.run.manifest import DeviceSpec

Float64 = NDArray[np.float64]

#: Kind of a device whose readings are played from a recording.
_PLAYED = "replay"
#: Power of a batch is taken to be that of another within this factor.
NEAR = 2.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PhasePower:
    """Power of a rank's devices in one phase of one run.

    Attributes:
        phase: decode or prefill.
        watts_3: low, likely, high; mean over ranks.
        tokens: of a rank in a step, mean.
        ranks: number of ranks that it holds for, as ranks of this machine share its devices; None for any.
        is_simulated: the readings were played, not taken from the device that computed.
    """

    phase: str
    watts_3: Float64
    tokens: float
    ranks: int | None
    is_simulated: bool

    def is_near(self, tokens: float) -> bool:
        """Whether so many tokens of a rank are about those that were measured."""
        return max(self.tokens, tokens) <= NEAR * min(self.tokens, tokens)


def measured_power(runs: Sequence[Run], profile: str | None) -> tuple[PhasePower, ...]:
    """Power of phases of runs on devices of one kind; runs without usable samples have none.

    Args:
        runs: of the model.
        profile: name in a hardware profile of the devices that are planned; None for those of the runs.
    """
    from observatory.analysis.energy.run_energy import energy_summary

    found: list[PhasePower] = []
    for run in runs:
        specs = run.manifest.device_specs
        if not any(_is_of(spec, profile) for spec in specs.values()) or not run.row_count("power"):
            continue
        try:
            phases = energy_summary(run).phases
        except ObservatoryError:  # `observatory energy` states why
            continue
        ours = [uuid for uuid, spec in specs.items() if _is_of(spec, profile)]
        rows = phases[phases["span"].isna() & phases["device_uuid"].isin(ours)]
        rows = rows[rows["source_rank"].notna()]
        rows = rows.dropna(subset=["power_mw", "power_low_mw", "power_high_mw"])
        routed = run.routed_tokens()
        per_step = (routed["tokens"] / routed["window_steps"]).groupby(routed["phase"]).mean()
        for phase, of_phase in rows[rows["phase"].isin(per_step.index)].groupby("phase"):
            of_rank = of_phase.groupby("source_rank")[["power_low_mw", "power_mw", "power_high_mw"]].sum()
            found.append(
                PhasePower(
                    phase=str(phase),
                    watts_3=of_rank.mean().to_numpy(np.float64) / 1e3,
                    tokens=float(per_step[phase]),
                    ranks=run.manifest.topology.ranks if profile is None else None,
                    is_simulated=any(specs[uuid].kind == _PLAYED for uuid in of_phase["device_uuid"]),
                )
            )
    return tuple(found)


def nearest_power(
    measured: Sequence[PhasePower], phase: str, *, ranks: int, tokens: float
) -> PhasePower | None:
    """Of the batch nearest to so many tokens of each of the ranks; of real devices before simulated ones."""
    of_phase = [one for one in measured if one.phase == phase and one.tokens > 0]
    of_phase = [one for one in of_phase if one.ranks in (None, ranks)]
    return min(of_phase, key=lambda one: (one.is_simulated, abs(math.log(one.tokens / tokens))), default=None)


def _is_of(spec: DeviceSpec, profile: str | None) -> bool:
    """Whether a device is one of a profile: it has all words of its name, and PCIe only where that has it."""
    if profile is None:
        return True
    words, wanted = _words(spec.name or ""), _words(profile) - {"sxm"}
    return bool(wanted) and wanted <= words and ("pcie" in words) <= ("pcie" in wanted)


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", name.lower()))

"""What a change makes of a set-up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from observatory.analysis.experts.step_time import LayerWork
from observatory.analysis.parallel.dispatch_rules import DispatchRule
from observatory.run.exchange_algorithms import Algorithm

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Change:
    """What one change makes of the set-up; None keeps today's.

    Attributes:
        work: what ranks do.
        algorithm, deduplicate: how they exchange it.
        slot_LPK: new layout, which takes moving experts; None for today's.
        rule: how copies share under it.
        moved_bytes: weights that the busiest rank receives once; None for those of the layout.
        memory_bytes: what a rank needs more.
        extra_us_S: what comes on top in each step.
        assumed: something of it is assumed, not measured.
        of_phase: the other phases of the run can go on as today.
    """

    work: LayerWork
    algorithm: Algorithm | None = None
    deduplicate: bool | None = None
    slot_LPK: Int64 | None = None
    rule: DispatchRule = "equal"
    moved_bytes: float | None = None
    memory_bytes: int = 0
    extra_us_S: Float64 | None = None
    assumed: bool = False
    of_phase: bool = False

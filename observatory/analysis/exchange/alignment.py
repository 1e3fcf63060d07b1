"""Times of all ranks on one clock.

Rows keep the times of their own rank's monotonic clock; the rank's status file says how that clock relates
to the reference rank's, and the correction is applied here, so that it can be redone from the same files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from observatory.analysis.exchange.words import ExchangeCode
from observatory.reasons import Reason
from observatory.run.manifest import ClockSpec, Manifest

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

#: Where a clock was aligned once, its offset may since have moved by this much: two quartzes of 50 ppm each.
UNMEASURED_DRIFT_PPM = 100.0
_LONGEST_REASON = 200


def rank_clocks(manifest: Manifest) -> dict[int, ClockSpec | None]:
    """The clock of every rank that left a status; a run of one rank needs none.

    A rank that was not aligned, but reads the same clock as one that was (or as the reference rank itself),
    has that one's alignment.
    """
    if manifest.topology.ranks == 1:
        return {0: ClockSpec(offset_ns=0, uncertainty_ns=0, method="shared clock")}
    clocks = {status.rank: status.clock for status in manifest.ranks}
    reference = next((clock.reference_rank for clock in clocks.values() if clock and _aligned(clock)), 0)
    named = {
        clock.identity: clock for clock in clocks.values() if clock and clock.identity and _aligned(clock)
    }
    reference_clock = clocks.get(reference)
    if reference_clock is not None and reference_clock.identity and not _aligned(reference_clock):
        named.setdefault(
            reference_clock.identity,
            ClockSpec(reference_rank=reference, offset_ns=0, uncertainty_ns=0, method="shared clock"),
        )
    return {
        rank: clock if clock is None or _aligned(clock) else named.get(clock.identity or "", clock)
        for rank, clock in clocks.items()
    }


def _aligned(clock: ClockSpec) -> bool:
    return clock.offset_ns is not None and clock.uncertainty_ns is not None


def to_reference_ns(own_ns: Int64, clock: ClockSpec | None) -> tuple[Int64, Float64]:
    """Times of one rank on the reference's clock, and how far each may be off.

    Args:
        own_ns: times of the rank's own clock.
        clock: its alignment.

    Returns:
        Times and half-widths; the rank's own times and infinity when its clock is not aligned.
    """
    if clock is None or clock.offset_ns is None or clock.uncertainty_ns is None:
        return own_ns, np.full(own_ns.shape, math.inf)
    uncertainty = np.full(own_ns.shape, float(clock.uncertainty_ns))
    shifted = own_ns + np.int64(clock.offset_ns)
    if clock.method == "shared clock" or clock.measured_ns is None:
        return shifted, uncertainty
    since = (own_ns - np.int64(clock.measured_ns)).astype(np.float64)
    if clock.drift_ppm is None:
        return shifted, uncertainty + np.abs(since) * UNMEASURED_DRIFT_PPM * 1e-6
    return shifted + np.rint(since * clock.drift_ppm * 1e-6).astype(np.int64), uncertainty


def clock_problem(clocks: Mapping[int, ClockSpec | None], rank: int) -> Reason | None:
    """Why times of ``rank`` cannot be compared with those of others; None when they can."""
    clock = clocks.get(rank)
    if clock is None:
        return Reason(ExchangeCode.CLOCK_NOT_RECORDED, {"rank": rank})
    if clock.offset_ns is not None:
        return None
    detail = "" if clock.reason is None else f": {clock.reason[:_LONGEST_REASON]}"
    return Reason(ExchangeCode.CLOCK_ALIGNMENT_FAILED, {"rank": rank, "detail": detail})

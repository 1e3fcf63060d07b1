"""Why a device's clock is what it is: the bits of ``event_reasons``, as NVML defines them.

No bit says "locked"; 0 says that nothing holds the clock down.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt

#: Bit -> what it means (nvmlClocksEventReason...).
EVENT_REASONS: dict[int, str] = {
    0x1: "idle",
    0x2: "set clocks",
    0x4: "power cap",
    0x8: "hw slowdown",
    0x10: "sync boost",
    0x20: "sw thermal",
    0x40: "hw thermal",
    0x80: "power brake",
    0x100: "display clocks",
}
IDLE_BIT = 0x1
POWER_CAP_BIT = 0x4
#: What "thermal" means everywhere: software and hardware thermal slowdown, which the counter ``thermal_ns``
#: counts too. For people: heat.
THERMAL_BITS = 0x20 | 0x40
#: Hardware slowdown, whatever its cause, and the power brake.
BRAKE_BITS = 0x8 | 0x80
#: Bits that hold a busy device's clock down against its will.
HOLDING_BITS = POWER_CAP_BIT | THERMAL_BITS | BRAKE_BITS


def slowed_label(reasons: int | None) -> Literal["thermal", "braked"] | None:
    """Label of a sweep point whose clock no setting can be credited with; None where these bits say nothing.

    A hardware slowdown has bit 0x8 whatever its cause, so that one with a thermal bit as well is thermal.
    """
    if reasons is None:
        return None
    return "thermal" if reasons & THERMAL_BITS else "braked" if reasons & BRAKE_BITS else None


def reason_name(bit: int) -> str:
    """What one bit means; its number where NVML has no such bit."""
    return EVENT_REASONS.get(bit, f"0x{bit:x}")


def reason_bits(value: int) -> Iterator[int]:
    """The bits that are set, lowest first; a negative value has none."""
    while value > 0:
        bit = value & -value
        yield bit
        value ^= bit


def reason_stretches(
    time_ns_N: npt.NDArray[np.int64], reasons_N: npt.NDArray[np.int64], *, period_ns: int, longest_gap_ns: int
) -> Iterator[tuple[int, int, int]]:
    """Stretches in which a bit was seen, as (bit, start, end), by bit, then time.

    A sample stands for the time until the next one, at most ``period_ns`` where none follows within
    ``longest_gap_ns``.

    Args:
        time_ns_N: times of the samples that have reasons, ascending.
        reasons_N: bits.
        period_ns: usual time between samples.
        longest_gap_ns: a longer one breaks a stretch.
    """
    if not len(time_ns_N):
        return
    until_N = np.append(time_ns_N[1:], time_ns_N[-1] + period_ns)
    until_N = np.where(until_N - time_ns_N > longest_gap_ns, time_ns_N + period_ns, until_N)
    for bit in reason_bits(int(np.bitwise_or.reduce(np.maximum(reasons_N, 0)))):
        positions = np.flatnonzero((reasons_N > 0) & (reasons_N & bit > 0))
        first = np.ones(len(positions), dtype=bool)
        first[1:] = time_ns_N[positions[1:]] > until_N[positions[:-1]]
        starts, last = (
            positions[first],
            positions[np.append(np.flatnonzero(first)[1:] - 1, len(positions) - 1)],
        )
        yield from (
            (bit, int(start), int(end)) for start, end in zip(time_ns_N[starts], until_N[last], strict=True)
        )

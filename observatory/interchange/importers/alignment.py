"""Clocks of ranks by the exchanges that they share.

No rank's all-to-all ends before every rank that sends to it has begun. So each exchange of two ranks bounds
how far their clocks are apart, from both sides; the true offset is within the tightest bounds, and taken as
their middle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from observatory.run.manifest import ClockSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """One all-to-all on one rank.

    Attributes:
        step: its step.
        group: label of its ranks.
        sequence: its number in the group, from 0.
        start_ns, end_ns: on the rank's own clock.
        send_bytes, receive_bytes: to and from each rank of the group; None where not known.
    """

    step: int
    group: str
    sequence: int
    start_ns: int
    end_ns: int
    send_bytes: list[int] | None = None
    receive_bytes: list[int] | None = None


def align_ranks(exchanges: Mapping[int, Sequence[Exchange]]) -> tuple[dict[int, ClockSpec], str | None]:
    """Offsets to the first rank's clock, for ranks that share exchanges with it.

    Args:
        exchanges: of each rank, in order of time. Those with a part of no bytes bound nothing.

    Returns:
        The clocks, and why there is none for a rank; None where all are aligned.
    """
    reference, *others = sorted(exchanges)
    own = {(item.group, item.sequence): item for item in exchanges[reference]}
    clocks = {
        reference: _clock(reference, 0, 0),
    }
    problems: list[str] = []
    for rank in others:
        pairs = [
            (own[item.group, item.sequence], item)
            for item in exchanges[rank]
            if (item.group, item.sequence) in own and _reaches_all(item)
        ]
        pairs = [(first, second) for first, second in pairs if _reaches_all(first)]
        if not pairs:
            problems.append(f"rank {rank} shares no exchange with rank {reference}")
            continue
        # Reference clock minus this rank's: each must have started before the other has ended.
        least = max(first.start_ns - second.end_ns for first, second in pairs)
        most = min(first.end_ns - second.start_ns for first, second in pairs)
        if least > most:
            problems.append(
                f"the exchanges of rank {rank} and rank {reference} contradict one constant offset"
            )
            continue
        clocks[rank] = _clock(reference, (least + most) // 2, (most - least + 1) // 2)
    return clocks, f"clocks are not aligned: {'; '.join(problems[:4])}" if problems else None


def _reaches_all(item: Exchange) -> bool:
    parts = (item.send_bytes, item.receive_bytes)
    return all(part is None or all(part) for part in parts)


def _clock(reference: int, offset_ns: int, uncertainty_ns: int) -> ClockSpec:
    return ClockSpec(
        method="ping-pong",  # of exchanges that were made anyway
        reference_rank=reference,
        offset_ns=offset_ns,
        uncertainty_ns=uncertainty_ns,
        unix_minus_monotonic_ns=0,
    )

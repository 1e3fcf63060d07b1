"""When each phase ran, on the clock of the samples of a device: what is drawn behind its power."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from observatory.analysis.energy.device_ownership import Clocks, device_ranks
from observatory.analysis.energy.phases import rank_phases
from observatory.run import Run

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeviceBands:
    """Phases beside the samples of one device.

    Attributes:
        rank: whose phases they are; None where ``reason`` says why there are none.
        of_device: the device works for that rank alone; else it serves others too, and the phases are those
            of the rank that sampled it.
        phase: name of each band.
        start_ns, end_ns: on the sampler's clock, ascending.
        reason: why there are none; None where there are.
    """

    rank: int | None
    of_device: bool
    phase: tuple[str, ...] = ()
    start_ns: Int64
    end_ns: Int64
    reason: str | None = None


def device_bands(run: Run, sampled: list[tuple[int, str]]) -> dict[tuple[int, str], DeviceBands]:
    """Phases beside each device's samples.

    Args:
        run: the run.
        sampled: (rank that sampled, UUID) of each device.
    """
    spans = run.spans()
    places = device_ranks(run.manifest, sampled)
    return {key: _bands(run, spans, key[0], places[key]) for key in sampled}


def _bands(run: Run, spans: pd.DataFrame, sampler: int, place: int | str) -> DeviceBands:
    rank = sampler if isinstance(place, str) else place
    of_device = not isinstance(place, str)
    found = rank_phases(spans[spans["source_rank"] == rank])
    if isinstance(found, str):
        return _none(f"rank {rank}: {found}")
    phases = found.phases
    clocks = Clocks.between(
        run.manifest, rank, sampler, int((phases.start_ns_M[0] + phases.end_ns_M[-1]) // 2)
    )
    if clocks.reason is not None:
        return _none(clocks.reason)
    return DeviceBands(
        rank=rank,
        of_device=of_device,
        phase=tuple(phases.names[name] for name in phases.name_M.tolist()),
        start_ns=phases.start_ns_M + clocks.shift_ns,
        end_ns=phases.end_ns_M + clocks.shift_ns,
    )


def _none(reason: str) -> DeviceBands:
    nothing = np.zeros(0, dtype=np.int64)
    return DeviceBands(rank=None, of_device=False, start_ns=nothing, end_ns=nothing, reason=reason)

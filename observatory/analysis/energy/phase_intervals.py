"""When each phase of a rank ran, on the clock of the samples of a device.

Samples carry the clock of the host of the rank that took them; spans carry the clock of their own rank's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from observatory.analysis.energy.codes import EnergyCode
from observatory.analysis.energy.device_ownership import device_ranks
from observatory.analysis.energy.phases import rank_phases
from observatory.analysis.exchange.alignment import rank_clocks, to_reference_ns
from observatory.reasons import Reason
from observatory.run import Run
from observatory.run.manifest import Manifest

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockShift:
    """How the times of a rank's spans become times of the samples.

    Attributes:
        reason: why they do not; None when they do.
        shift_ns: to be added to a span's time, at the moment ``at_ns``.
        error_ns: half-width of the interval that holds the true shift.
    """

    reason: Reason | None = None
    shift_ns: int = 0
    error_ns: float = 0.0

    @classmethod
    def between(cls, manifest: Manifest, rank: int, sampler: int, at_ns: int) -> ClockShift:
        """Relate the clock of ``rank`` to that of the rank that sampled.

        One shift is taken for the whole run, that of its middle; drift between two hosts' clocks moves it by
        less than the sensor's own period in hours.

        Args:
            manifest: of the run.
            rank: whose spans they are.
            sampler: rank whose folder holds the samples.
            at_ns: a moment of ``rank``'s clock, in the middle of the run.
        """
        if rank == sampler or manifest.topology.ranks == 1:
            return cls()
        specs = {status.rank: status.clock for status in manifest.ranks}
        one, other = specs.get(rank), specs.get(sampler)
        if one and other and one.identity and one.identity == other.identity:
            return cls()
        clocks = rank_clocks(manifest)
        moment = np.array([at_ns], dtype=np.int64)
        reference, error = to_reference_ns(moment, clocks.get(rank))
        # The way back: the sampler's time whose reference time this is, in a few steps as drift is small.
        sampled = reference.copy()
        other_error = np.zeros(1)
        for _ in range(3):
            there, other_error = to_reference_ns(sampled, clocks.get(sampler))
            sampled = sampled + (reference - there)
        total = float(error[0] + other_error[0])
        if not np.isfinite(total):
            return cls(reason=Reason(EnergyCode.CLOCKS_NOT_ALIGNED, {"rank": rank, "sampler": sampler}))
        return cls(shift_ns=int(sampled[0] - moment[0]), error_ns=total)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeviceBands:
    """Phases on the clock of the samples of one device.

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
    reason: Reason | None = None


def device_bands(run: Run, sampled: list[tuple[int, str]]) -> dict[tuple[int, str], DeviceBands]:
    """Phases on the clock of each device's samples.

    Args:
        run: the run.
        sampled: (rank that sampled, UUID) of each device.
    """
    spans = run.spans()
    places = device_ranks(run.manifest, sampled)
    return {key: _bands(run, spans, key[0], places[key]) for key in sampled}


def _bands(run: Run, spans: pd.DataFrame, sampler: int, place: int | Reason) -> DeviceBands:
    rank = sampler if isinstance(place, Reason) else place
    ran = rank_phases(spans[spans["source_rank"] == rank])
    if isinstance(ran, Reason):
        return _none(Reason(EnergyCode.OF_RANK, {"rank": rank}, (ran,)))
    phases = ran.phases
    shift = ClockShift.between(run.manifest, rank, sampler, (phases.start_ns + phases.end_ns) // 2)
    if shift.reason is not None:
        return _none(shift.reason)
    return DeviceBands(
        rank=rank,
        of_device=not isinstance(place, Reason),
        phase=tuple(phases.names[name] for name in phases.name_M.tolist()),
        start_ns=phases.start_ns_M + shift.shift_ns,
        end_ns=phases.end_ns_M + shift.shift_ns,
    )


def _none(reason: Reason) -> DeviceBands:
    nothing = np.zeros(0, dtype=np.int64)
    return DeviceBands(rank=None, of_device=False, start_ns=nothing, end_ns=nothing, reason=reason)

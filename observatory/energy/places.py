"""Which device works for which rank, and on which clock both can be compared.

Samples lie in the folder of a node's first rank and carry that host's clock; spans carry their own rank's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import JsonValue

from observatory.exchange.clocks import rank_clocks, to_reference_ns
from observatory.records import Manifest, RankStatus

__all__ = ["Clocks", "device_ranks", "power_config", "same_node"]

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]


def power_config(manifest: Manifest) -> dict[str, JsonValue]:
    """``config.power`` of a run; empty where there is none."""
    found = manifest.config.get("power")
    return found if isinstance(found, dict) else {}


def same_node(manifest: Manifest, one: int, other: int) -> bool:
    """Whether two ranks are known to be on one node."""
    if one == other or manifest.topology.ranks == 1:
        return True
    nodes = manifest.topology.node_of_rank
    if nodes is not None and max(one, other) < len(nodes):
        return nodes[one] == nodes[other]
    first, second = _status(manifest, one), _status(manifest, other)
    if first is None or second is None:
        return False
    if first.clock and second.clock and first.clock.identity and second.clock.identity:
        return first.clock.identity == second.clock.identity
    return first.host is not None and first.host == second.host


def _status(manifest: Manifest, rank: int) -> RankStatus | None:
    return next((status for status in manifest.ranks if status.rank == rank), None)


def device_ranks(manifest: Manifest, sampled: list[tuple[int, str]]) -> dict[tuple[int, str], int | str]:
    """The rank that each sampled device works for, or why that is not known.

    A manifest may say so: ``config.power.device_of_rank`` maps ranks to a UUID or a list of them, or a device
    has a ``rank``. Otherwise the only rank of a node has all devices of the node that are no processor.

    Args:
        manifest: of the run.
        sampled: (rank that sampled, UUID) of each device.
    """
    told = _told(manifest)
    kinds = {device.uuid: device.kind for device in manifest.devices}
    result: dict[tuple[int, str], int | str] = {}
    for sampler, uuid in sampled:
        if uuid in told:
            rank = told[uuid]
            if rank >= manifest.topology.ranks or not same_node(manifest, sampler, rank):
                result[sampler, uuid] = f"the run says it is of rank {rank}, which is not on its node"
            else:
                result[sampler, uuid] = rank
            continue
        if kinds.get(uuid, "").lower() in ("rapl", "cpu") or uuid.startswith("rapl:"):
            result[sampler, uuid] = "a processor's package works for all ranks of its node"
            continue
        here = [
            rank
            for rank in range(min(manifest.topology.ranks, 1 << 16))
            if same_node(manifest, sampler, rank)
        ]
        result[sampler, uuid] = (
            here[0] if len(here) == 1
            else f"{len(here)} ranks share its node and the run does not say which of them it works for"
        )  # fmt: skip
    return result


def _told(manifest: Manifest) -> dict[str, int]:
    """UUID -> rank as the manifest says."""
    told: dict[str, int] = {}
    mapping = power_config(manifest).get("device_of_rank")
    if isinstance(mapping, dict):
        for text, devices in mapping.items():
            for uuid in devices if isinstance(devices, list) else [devices]:
                if text.isdecimal() and len(text) < 9 and isinstance(uuid, str):
                    told[uuid] = int(text)
    for device in manifest.devices:
        rank = (device.model_extra or {}).get("rank")
        if device.uuid is not None and isinstance(rank, int) and not isinstance(rank, bool) and rank >= 0:
            told.setdefault(device.uuid, rank)
    return told


@dataclass(frozen=True, slots=True, kw_only=True)
class Clocks:
    """How the times of a rank's spans become times of the samples.

    Attributes:
        reason: why they do not; None when they do.
        shift_ns: to be added to a span's time, at the moment ``at_ns``.
        error_ns: half-width of the interval that holds the true shift.
    """

    reason: str | None = None
    shift_ns: int = 0
    error_ns: float = 0.0

    @classmethod
    def between(cls, manifest: Manifest, rank: int, sampler: int, at_ns: int) -> Clocks:
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
        raw = {status.rank: status.clock for status in manifest.ranks}
        one, other = raw.get(rank), raw.get(sampler)
        if one and other and one.identity and one.identity == other.identity:
            return cls()
        clocks = rank_clocks(manifest)
        moment = np.array([at_ns], dtype=np.int64)
        reference, error = to_reference_ns(moment, clocks.get(rank))
        # The way back: the sampler's time whose reference time this is, found in two steps as drift is small.
        own = reference.copy()
        other_error = np.zeros(1)
        for _ in range(3):
            there, other_error = to_reference_ns(own, clocks.get(sampler))
            own = own + (reference - there)
        total = float(error[0] + other_error[0])
        if not np.isfinite(total):
            return cls(
                reason=f"the clocks of rank {rank} and of rank {sampler}, which sampled, were not aligned"
            )
        return cls(shift_ns=int(own[0] - moment[0]), error_ns=total)

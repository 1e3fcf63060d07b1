"""Which device works for which rank, and on which clock both can be compared.

Samples lie in the folder of a node's first rank and carry that host's clock; spans carry their own rank's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import JsonValue

from observatory.analysis.exchange.alignment import rank_clocks, to_reference_ns
from observatory.devices.sensors import PROCESSOR_KINDS, calibration_entry
from observatory.run.manifest import DeviceSpec, Manifest, RankStatus
from observatory.text import listing

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]


def power_config(manifest: Manifest) -> dict[str, JsonValue]:
    """What a run says of its power sampling: ``calibration`` by UUID and ``device_of_rank``.

    Our sampler says it in the ranks' status (``RankPower``); other writers may in ``config.power``.
    """
    found = manifest.config.get("power")
    told = dict(found) if isinstance(found, dict) else {}
    calibration: dict[str, JsonValue] = {}
    owners: dict[str, JsonValue] = {}
    for status in manifest.ranks:
        if status.power is None:
            continue
        for uuid, measured in status.power.calibration.items():
            calibration[uuid] = calibration_entry(measured)
        if status.power.own_devices:
            owners[str(status.rank)] = list(status.power.own_devices)
    return {
        **told,
        **({"calibration": calibration} if calibration else {}),
        **({"device_of_rank": owners} if owners else {}),
    }


def device_specs(manifest: Manifest) -> dict[str, DeviceSpec]:
    """What a run knows of its devices, by UUID: those of its host, and those that were sampled."""
    sampled = [spec for status in manifest.ranks if status.power for spec in status.power.sampled]
    return {spec.uuid: spec for spec in (*manifest.devices, *sampled) if spec.uuid is not None}


def ranks_of_node(manifest: Manifest, rank: int) -> list[int] | None:
    """The ranks on the node of one rank, itself among them; None where that is not known."""
    topology = manifest.topology
    if topology.ranks == 1:
        return [rank]
    nodes = topology.node_of_rank
    if nodes is not None and len(nodes) == topology.ranks and rank < topology.ranks:
        return [other for other, node in enumerate(nodes) if node == nodes[rank]]
    statuses = {status.rank: status for status in manifest.ranks}
    if rank not in statuses or len(statuses) < topology.ranks:
        return None
    places = {other: _places(status) for other, status in statuses.items()}
    # By the clock they read where all tell it, by the host's name else.
    for kind in (0, 1):
        if all(place[kind] is not None for place in places.values()):
            return sorted(other for other, place in places.items() if place[kind] == places[rank][kind])
    return None


def _places(status: RankStatus) -> tuple[str | None, str | None]:
    """What may name the node of a rank: its clock and its host."""
    return (None if status.clock is None else status.clock.identity), status.host


def device_ranks(manifest: Manifest, sampled: list[tuple[int, str]]) -> dict[tuple[int, str], int | str]:
    """The rank that each sampled device works for, or why that is not known.

    Each rank says so itself (``RankPower.own_devices``), or the manifest does: ``config.power``'s
    ``device_of_rank`` maps ranks to a UUID or a list of them, or a device has a ``rank``. Where nobody says
    anything, the only rank of a node has all devices of the node that are no processor.

    Args:
        manifest: of the run.
        sampled: (rank that sampled, UUID) of each device.
    """
    told = _told(manifest)
    specs = device_specs(manifest)
    nodes: dict[int, list[int] | None] = {}
    result: dict[tuple[int, str], int | str] = {}
    for sampler, uuid in sampled:
        if sampler not in nodes:
            nodes[sampler] = ranks_of_node(manifest, sampler)
        kind = specs[uuid].kind if uuid in specs else ""
        result[sampler, uuid] = _place(uuid, kind, sampler, nodes[sampler], told)
    return result


def _place(
    uuid: str, kind: str, sampler: int, node: list[int] | None, told: dict[str, list[int]]
) -> int | str:
    """The rank that a device works for, or why that is not known."""
    here = [rank for rank in told.get(uuid, []) if rank == sampler or (node is not None and rank in node)]
    if len(here) == 1:
        return here[0]
    if here:
        return f"ranks {_listed(here)} compute on it, and its power does not tell them apart"
    if uuid in told:
        return f"the run says that it works for rank {_listed(told[uuid])}, not known to be on its node"
    if kind.lower() in PROCESSOR_KINDS or uuid.startswith("rapl:"):
        return "a processor's package works for all ranks of its node"
    if node is None:
        return "which ranks are on its node is not known"
    owners = {rank for ranks in told.values() for rank in ranks}
    if owners.issuperset(node):
        return "no rank of the run says that it computes on it"
    if len(node) == 1:
        return node[0]
    return (
        f"{len(node)} ranks share its node and the run does not say which of them it works for (capture with "
        "profile --rank-devices or watch(own_devices=...))"
    )


def _listed(ranks: list[int]) -> str:
    return listing([str(rank) for rank in ranks], most=5)


def devices_of_rank(manifest: Manifest) -> dict[int, list[str]]:
    """UUIDs of the devices that each rank computes on, of the ranks of which the run says so."""
    owned: dict[int, list[str]] = {}
    for uuid, ranks in _told(manifest).items():
        for rank in ranks:
            owned.setdefault(rank, []).append(uuid)
    return owned


def _told(manifest: Manifest) -> dict[str, list[int]]:
    """UUID -> ranks that compute on it, ascending, as the run says."""
    told: dict[str, set[int]] = {}
    mapping = power_config(manifest).get("device_of_rank")
    if isinstance(mapping, dict):
        for text, devices in mapping.items():
            for uuid in devices if isinstance(devices, list) else [devices]:
                if text.isascii() and text.isdecimal() and len(text) < 9 and isinstance(uuid, str):
                    told.setdefault(uuid, set()).add(int(text))
    for device in manifest.devices:
        if device.uuid is not None and device.rank is not None:
            told.setdefault(device.uuid, {device.rank})
    return {uuid: sorted(ranks) for uuid, ranks in told.items()}


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

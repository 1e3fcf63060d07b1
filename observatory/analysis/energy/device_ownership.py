"""Which device works for which rank.

Samples lie in the folder of the rank that took them, which samples all devices of its node.
"""

from __future__ import annotations

from observatory.analysis.energy.codes import EnergyCode
from observatory.devices.sensors import PROCESSOR_KINDS
from observatory.reasons import Reason
from observatory.run.manifest import Manifest, RankStatus


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
    # By the clock they read where all name it, else by the host's name.
    for kind in (0, 1):
        if all(place[kind] is not None for place in places.values()):
            return sorted(other for other, place in places.items() if place[kind] == places[rank][kind])
    return None


def _places(status: RankStatus) -> tuple[str | None, str | None]:
    """What may name the node of a rank: its clock and its host."""
    return (None if status.clock is None else status.clock.identity), status.host


def device_ranks(manifest: Manifest, sampled: list[tuple[int, str]]) -> dict[tuple[int, str], int | Reason]:
    """The rank that each sampled device works for, or why that is not known.

    Each rank states it (``RankPower.own_devices``), or a device of the manifest has a ``rank``. Where nothing
    is stated, the only rank of a node has all devices of the node that are not processors.

    Args:
        manifest: of the run.
        sampled: (rank that sampled, UUID) of each device.
    """
    stated = _stated_ranks(manifest)
    specs = manifest.device_specs
    nodes: dict[int, list[int] | None] = {}
    result: dict[tuple[int, str], int | Reason] = {}
    for sampler, uuid in sampled:
        if sampler not in nodes:
            nodes[sampler] = ranks_of_node(manifest, sampler)
        kind = specs[uuid].kind if uuid in specs else ""
        result[sampler, uuid] = _place(uuid, kind, sampler, nodes[sampler], stated)
    return result


def _place(
    uuid: str, kind: str, sampler: int, node: list[int] | None, stated: dict[str, list[int]]
) -> int | Reason:
    """The rank that a device works for, or why that is not known."""
    here = [rank for rank in stated.get(uuid, []) if rank == sampler or (node is not None and rank in node)]
    if len(here) == 1:
        return here[0]
    if here:
        return Reason(EnergyCode.SHARED_BY_RANKS, {"ranks": list(here)})
    if uuid in stated:
        return Reason(EnergyCode.RANK_ON_OTHER_NODE, {"ranks": list(stated[uuid])})
    if kind.lower() in PROCESSOR_KINDS or uuid.startswith("rapl:"):
        return Reason(EnergyCode.PROCESSOR_PACKAGE)
    if node is None:
        return Reason(EnergyCode.NODE_NOT_KNOWN)
    owners = {rank for ranks in stated.values() for rank in ranks}
    if owners.issuperset(node):
        return Reason(EnergyCode.NO_RANK_NAMES_IT)
    if len(node) == 1:
        return node[0]
    return Reason(EnergyCode.RANK_NOT_KNOWN, {"ranks": len(node)})


def devices_of_rank(manifest: Manifest) -> dict[int, list[str]]:
    """UUIDs of the devices that each rank computes on, for the ranks of which the run states it."""
    owned: dict[int, list[str]] = {}
    for uuid, ranks in _stated_ranks(manifest).items():
        for rank in ranks:
            owned.setdefault(rank, []).append(uuid)
    return owned


def _stated_ranks(manifest: Manifest) -> dict[str, list[int]]:
    """UUID -> ranks that compute on it, ascending, as the run states."""
    stated: dict[str, set[int]] = {}
    for status in manifest.ranks:
        for uuid in () if status.power is None else status.power.own_devices:
            stated.setdefault(uuid, set()).add(status.rank)
    for device in manifest.devices:
        if device.uuid is not None and device.rank is not None:
            stated.setdefault(device.uuid, {device.rank})
    return {uuid: sorted(ranks) for uuid, ranks in stated.items()}

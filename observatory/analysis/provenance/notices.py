"""What limits the numbers of a run: other versions, wall clocks that are off, devices far away."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import JsonValue

from observatory.analysis.exchange.alignment import rank_clocks
from observatory.analysis.provenance.words import ProvenanceCode
from observatory.reasons import Reason
from observatory.run.manifest import Manifest, RankStatus
from observatory.run.usable_cores import from_ranges

#: Wall clocks that NTP disciplines are this close, and a rank may be preempted while it reads both clocks.
USUAL_SKEW_NS = 10_000_000


def place_name(status: RankStatus) -> str:
    """The node of a rank: the scheduler's name of it, else the host's."""
    node = None if status.provenance is None else status.provenance.node
    return node or status.host or "unknown"


def provenance_notices(manifest: Manifest) -> list[Reason]:
    """What a reader of a run should know of where its ranks ran, in the order of its weight."""
    return [*_versions(manifest), *_far_devices(manifest), *_wall_clocks(manifest)]


def wall_clock_ahead_ns(manifest: Manifest) -> dict[int, tuple[int, int]]:
    """How far each rank's wall clock is ahead of the reference rank's, and how far that may be off.

    With U the difference of a rank's wall clock and monotonic clock, and O the offset that makes a time of
    its monotonic clock one of the reference's: ahead = U - (U of the reference) - O.

    Returns:
        (ahead, uncertainty) in nanoseconds by rank; ranks whose clock was not aligned are missing.
    """
    ahead_of = {
        status.rank: status.clock.unix_minus_monotonic_ns
        for status in manifest.ranks
        if status.clock is not None and status.clock.unix_minus_monotonic_ns is not None
    }
    found = {}
    for rank, clock in rank_clocks(manifest).items():
        if clock is None or clock.offset_ns is None or clock.uncertainty_ns is None:
            continue
        own, reference = ahead_of.get(rank), ahead_of.get(clock.reference_rank)
        if own is not None and reference is not None:
            found[rank] = (own - reference - clock.offset_ns, clock.uncertainty_ns)
    return found


def _versions(manifest: Manifest) -> Iterator[Reason]:
    """Each name of which ranks state different versions."""
    ranks_of: dict[str, dict[str, list[int]]] = {}
    places = {}
    for status in manifest.ranks:
        places[status.rank] = place_name(status)
        for name, version in (status.provenance.versions if status.provenance else {}).items():
            ranks_of.setdefault(name, {}).setdefault(version, []).append(status.rank)
    for name, of_version in sorted(ranks_of.items()):
        if len(of_version) > 1:
            versions: list[JsonValue] = [
                {
                    "version": version,
                    "ranks": [*ranks],
                    "nodes": [*dict.fromkeys(places[rank] for rank in ranks)],
                }
                for version, ranks in sorted(of_version.items())
            ]
            yield Reason(ProvenanceCode.VERSIONS_DIFFER, {"name": name, "versions": versions})


def _far_devices(manifest: Manifest) -> Iterator[Reason]:
    """Ranks none of whose cores belong to the NUMA node that a device of theirs is attached to."""
    specs = manifest.device_specs
    far: list[JsonValue] = []
    for status in manifest.ranks:
        where = status.provenance
        if where is None or not where.numa_nodes or status.power is None:
            continue
        attached = {each.bus_id: each.numa_node for each in where.accelerators}
        own = [specs[uuid].bus_id for uuid in status.power.own_devices if uuid in specs]
        nodes = {attached.get(_as_in_sysfs(bus_id)) for bus_id in own if bus_id} - {None}
        if nodes - from_ranges(where.numa_nodes):
            far.append(status.rank)
    if far:
        yield Reason(ProvenanceCode.DEVICES_FAR, {"ranks": far})


def _as_in_sysfs(bus_id: str) -> str:
    """``0000:1b:00.0`` of a driver's ``00000000:1B:00.0``."""
    domain, _, rest = bus_id.lower().partition(":")
    return f"{domain[-4:]}:{rest}"


def _wall_clocks(manifest: Manifest) -> Iterator[Reason]:
    """The rank whose wall clock is furthest from the reference's, and on how many nodes it is too far."""
    places = {status.rank: place_name(status) for status in manifest.ranks}
    ahead = wall_clock_ahead_ns(manifest)
    far = {
        rank: abs(ns) - uncertainty_ns
        for rank, (ns, uncertainty_ns) in ahead.items()
        if abs(ns) > uncertainty_ns + USUAL_SKEW_NS
    }
    if far:
        rank = max(far, key=far.__getitem__)
        yield Reason(
            ProvenanceCode.WALL_CLOCKS_DIFFER,
            {
                "rank": rank,
                "node": places[rank],
                "ahead_ms": ahead[rank][0] * 1e-6,
                "uncertainty_ms": ahead[rank][1] * 1e-6,
                "nodes": len({places[each] for each in far}),
            },
        )

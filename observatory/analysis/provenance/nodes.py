"""Where the ranks of a run ran: a row for each kind of node, however many nodes and ranks there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from observatory.analysis.columns import Column
from observatory.analysis.provenance.notices import place_name
from observatory.analysis.provenance.words import (
    accelerator_words,
    ahead_words,
    fabric_words,
    gibibytes,
    job_words,
    named_words,
    others_words,
)
from observatory.run.files import one_line
from observatory.run.manifest import RankStatus
from observatory.run.provenance import SchedulerJob
from observatory.run.usable_cores import as_ranges, from_ranges
from observatory.text import counted, listing

NODE_COLUMNS = (
    Column(name="nodes", title="nodes", text=True, key=True),
    Column(name="ranks", title="ranks", text=True),
    Column(name="machine", title="machine", text=True),
    Column(
        name="cores",
        title="cores of a rank",
        text=True,
        legend="by its affinity; quota: the smallest limit of a control group, in cores",
    ),
    Column(
        name="numa_nodes",
        title="NUMA",
        text=True,
        legend="NUMA nodes of the cores; memory: those that ranks may take memory from, where they differ",
    ),
    Column(name="memory_limit", title="memory limit", text=True, otherwise="none"),
    Column(name="accelerators", title="accelerators", text=True, otherwise="none seen"),
    Column(name="fabric", title="network", text=True, otherwise="none seen"),
    Column(
        name="others",
        title="others",
        text=True,
        otherwise="not known",
        legend="other jobs and users with processes on the node, system accounts left out",
    ),
    Column(
        name="wall_clock",
        title="wall clock",
        text=True,
        otherwise="not compared",
        legend="ahead of the first rank's; of the node that is furthest off",
    ),
)


def node_rows(
    statuses: Sequence[RankStatus], ahead: Mapping[int, tuple[int, int]] | None = None
) -> list[dict[str, Any]]:
    """One row of text for nodes that agree in everything; ranks that state nothing are left out.

    Args:
        statuses: of the ranks.
        ahead: of `wall_clock_ahead_ns`.
    """
    of_place: dict[str, list[RankStatus]] = {}
    for status in statuses:
        if status.provenance is not None:
            of_place.setdefault(place_name(status), []).append(status)
    alike: dict[tuple[tuple[str, Any], ...], list[tuple[str, list[RankStatus]]]] = {}
    for place, ranks in of_place.items():
        alike.setdefault(tuple(_facts(ranks).items()), []).append((place, ranks))
    rows = []
    for facts, places in alike.items():
        numbers = [status.rank for _, of_one in places for status in of_one]
        # Of nodes that are alike in all else the clock that is furthest off.
        clocks = [ahead[rank] for rank in numbers if rank in ahead] if ahead and len(of_place) > 1 else []
        furthest = max(clocks, key=lambda item: abs(item[0]), default=None)
        rows.append(
            {
                "nodes": _place_words([place for place, _ in places]),
                "ranks": as_ranges(numbers),
                **dict(facts),
                "wall_clock": None if furthest is None else ahead_words(*furthest),
            }
        )
    return rows


def common_facts(statuses: Sequence[RankStatus], job: SchedulerJob | None) -> list[tuple[str, str]]:
    """(name, text) of what the ranks have in common, and of what each has for itself."""
    facts = {
        "batch job": None if job is None else job_words(job),
        "common versions": named_words(common_versions(statuses)),
        "common settings": named_words(common_settings(statuses), "="),
        "settings of single ranks": ", ".join(one_line(name, 60) for name in other_settings(statuses)),
    }
    return [(name, text) for name, text in facts.items() if text]


def common_versions(statuses: Sequence[RankStatus]) -> dict[str, str]:
    """Versions that no rank contradicts, by name."""
    return _agreed([status.provenance.versions for status in statuses if status.provenance])


def common_settings(statuses: Sequence[RankStatus]) -> dict[str, str]:
    """Settings that all ranks have alike, by name."""
    stated = [status.provenance.environment for status in statuses if status.provenance]
    return {
        name: value
        for name, value in _agreed(stated).items()
        if all(name in environment for environment in stated)
    }


def other_settings(statuses: Sequence[RankStatus]) -> list[str]:
    """Names of settings that are not the same on all ranks, as those that bind a rank to a device are."""
    stated = [status.provenance.environment for status in statuses if status.provenance]
    return sorted({name for environment in stated for name in environment} - common_settings(statuses).keys())


def _agreed(stated: Sequence[dict[str, str]]) -> dict[str, str]:
    values: dict[str, set[str]] = {}
    for each in stated:
        for name, value in each.items():
            values.setdefault(name, set()).add(value)
    return {name: next(iter(found)) for name, found in sorted(values.items()) if len(found) == 1}


def _facts(statuses: Sequence[RankStatus]) -> dict[str, Any]:
    """What a row states of one node."""
    stated = [status.provenance for status in statuses if status.provenance is not None]
    first, machine = stated[0], stated[0].machine
    limits = sorted({each.memory_limit_bytes for each in stated if each.memory_limit_bytes is not None})
    jobs = [each.other_jobs for each in stated if each.other_jobs is not None]
    users = [each.other_users for each in stated if each.other_users is not None]
    hardware = [
        one_line(machine.cpu, 60) if machine.cpu else None,
        None if machine.cpus is None else counted(machine.cpus, "CPU"),
        None if machine.memory_bytes is None else gibibytes(machine.memory_bytes),
    ]
    return {
        "machine": ", ".join(filter(None, hardware)) or None,
        "cores": _cores_words(statuses),
        "numa_nodes": _numa_words(
            stated[0].numa_nodes, {each.numa_nodes for each in stated}, first.memory_nodes
        ),
        "memory_limit": " to ".join(dict.fromkeys((gibibytes(limits[0]), gibibytes(limits[-1]))))
        if limits
        else None,
        "accelerators": accelerator_words(first.accelerators),
        "fabric": fabric_words(first.fabric),
        "others": others_words(max(jobs, default=None), max(users, default=None)),
    }


def _cores_words(statuses: Sequence[RankStatus]) -> str | None:
    """Cores of one rank's affinity, and the smallest quota of their control groups."""
    stated = [status.cores for status in statuses if status.cores and status.cores.cpus]
    counts = sorted({len(from_ranges(cores.cpus)) for cores in stated})
    quotas = [quota.cpus for cores in stated for quota in cores.quotas]
    if not counts:
        return None
    text = "-".join(dict.fromkeys((str(counts[0]), str(counts[-1]))))
    return f"{text}; quota {min(quotas):.3g}" if quotas else text


def _numa_words(first: str | None, of_ranks: set[str | None], memory: str | None) -> str | None:
    known = sorted(text for text in of_ranks if text)
    cores = as_ranges({node for text in known for node in from_ranges(text)}) if known else first
    if cores is None or memory in (None, cores):
        return cores
    return f"{cores}; memory {one_line(memory, 40)}"


def _place_words(places: Sequence[str]) -> str:
    names = [one_line(place, 60) for place in places]
    return listing(names) if len(names) < 5 else f"{listing(names)} ({len(names)} nodes)"

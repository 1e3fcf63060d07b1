"""Codes of notices about where ranks ran, and the words of these and of what is recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from observatory.reasons import Reason
from observatory.run.files import one_line
from observatory.run.provenance import Accelerator, FabricLink, SchedulerJob
from observatory.run.usable_cores import as_ranges
from observatory.text import counted, listing

_LONGEST = 60
_KINDS = {"infiniband": "InfiniBand", "roce": "RoCE", "rdma": "RDMA", "hsn": "HSN", "ethernet": "Ethernet"}
_VENDORS = {"nvidia": "NVIDIA", "amd": "AMD", "intel": "Intel", "habana": "Habana"}
_SCHEDULERS = {"slurm": "Slurm", "pbs": "PBS", "lsf": "LSF"}


class ProvenanceCode(StrEnum):
    """What a notice states; the values of each are those that its words read."""

    VERSIONS_DIFFER = "versions_differ"
    DEVICES_FAR = "devices_far"
    WALL_CLOCKS_DIFFER = "wall_clocks_differ"


def notice_sentence(reason: Reason) -> str:
    """A notice in words."""
    values: Mapping[str, Any] = reason.values
    if reason.code == ProvenanceCode.VERSIONS_DIFFER:
        parts = [_version_words(entry) for entry in values["versions"]]
        return f"ranks ran different versions of {_short(values['name'])}: {listing(parts)}"
    if reason.code == ProvenanceCode.DEVICES_FAR:
        ranks = values["ranks"]
        return (
            f"{_rank_words(ranks)} ran on cores of other NUMA nodes than "
            f"{'its' if len(ranks) == 1 else 'their'} device is attached to: every launch and copy crosses "
            "between them"
        )
    ahead_ms, nodes = values["ahead_ms"], values["nodes"]
    several = f" ({nodes} nodes are off, this one most)" if nodes > 1 else ""
    return (
        f"the wall clock of {_short(values['node'])} (rank {values['rank']}) was {_time(abs(ahead_ms))} "
        f"{'ahead of' if ahead_ms > 0 else 'behind'} that of the first rank, known within "
        f"{_time(values['uncertainty_ms'])}{several}: dates of these nodes do not fit together; "
        "times of exchanges are of aligned clocks and do"
    )


def job_words(job: SchedulerJob) -> str:
    """A batch job in one line: what it is, where, what it was given, until when."""
    name = " ".join(filter(None, (_SCHEDULERS.get(job.kind, _short(job.kind)), job.version)))
    parts = [f"{name} job {_short(job.job_id or 'without a number')}"]
    if job.array_task_id is not None:
        parts.append(f"element {_short(job.array_task_id)} of array {_short(job.array_job_id or 'unknown')}")
    for label, value in (("cluster", job.cluster), ("partition", job.partition), ("QOS", job.qos)):
        parts += [f"{label} {_short(value)}"] if value else []
    parts += [f"reservation {_short(job.reservation)}"] if job.reservation else []
    if job.nodes or job.node_count:
        count = "" if job.node_count is None else f"{counted(job.node_count, 'node')} "
        parts.append(f"{count}{_short(job.nodes or '')}".strip())
    parts += [f"{_short(job.cpus_per_node)} CPUs of the nodes"] if job.cpus_per_node else []
    for size, of in ((job.memory_per_node_bytes, "node"), (job.memory_per_cpu_bytes, "CPU")):
        parts += [f"{gibibytes(size)} of memory for each {of}"] if size else []
    if job.gpus or job.gpus_on_node:
        count = "" if job.gpus_on_node is None else f"{counted(job.gpus_on_node, 'GPU')} on the first node"
        parts.append(f"{count or 'GPUs'}{f' ({_short(job.gpus)})' if job.gpus else ''}")
    parts += [f"began {_moment(job.start_unix_s)}"] if job.start_unix_s else []
    parts += [f"time up {_moment(job.end_unix_s)}"] if job.end_unix_s else []
    parts += [f"requeued {counted(job.restarts, 'time')}"] if job.restarts else []
    return ", ".join(parts)


def accelerator_words(accelerators: Iterable[Accelerator]) -> str | None:
    """``8 NVIDIA (4 on NUMA node 0, 4 on 1)``; None where the node shows none."""
    of_vendor: dict[str, list[int | None]] = {}
    for each in accelerators:
        of_vendor.setdefault(each.vendor, []).append(each.numa_node)
    parts = []
    for vendor, nodes in sorted(of_vendor.items()):
        known = Counter(node for node in nodes if node is not None)
        where = ", ".join(f"{count} on NUMA node {node}" for node, count in sorted(known.items())[:8])
        parts.append(f"{len(nodes)} {_VENDORS.get(vendor, _short(vendor))}{f' ({where})' if where else ''}")
    return ", ".join(parts) or None


def fabric_words(links: Iterable[FabricLink]) -> str | None:
    """``4 x InfiniBand 400 Gbit/s, Ethernet``; links that are down are left out; None without any."""
    kinds = Counter((link.kind, link.rate_gbit_s) for link in links if link.up is not False)
    parts = [
        f"{f'{count} x ' if count > 1 else ''}{_KINDS[kind]}{'' if rate is None else f' {rate:g} Gbit/s'}"
        for (kind, rate), count in sorted(kinds.items(), key=lambda item: (item[0][0], item[0][1] or 0.0))
    ]
    return ", ".join(parts) or None


def others_words(jobs: int | None, users: int | None) -> str | None:
    """Who else was on the node; None where it is not known."""
    parts = [] if jobs is None else [counted(jobs, "job")]
    parts += [] if users is None else [counted(users, "user")]
    return ", ".join(parts) or None


def named_words(values: Mapping[str, str], joint: str = " ") -> str | None:
    """Names with their values; None without any."""
    return ", ".join(f"{_short(name)}{joint}{_short(value)}" for name, value in values.items()) or None


def gibibytes(value: int) -> str:
    """A size of memory."""
    return f"{value / (1 << 30):.3g} GiB"


def ahead_words(ns: int, uncertainty_ns: int) -> str:
    """How far a wall clock is ahead (+) or behind, and how well that is known."""
    sign = "+" if ns > 0 else "-" if ns < 0 else ""
    return f"{sign}{_time(abs(ns) * 1e-6)} within {_time(uncertainty_ns * 1e-6)}"


def _version_words(entry: Mapping[str, Any]) -> str:
    nodes = listing([_short(node) for node in entry["nodes"]])
    return f"{_short(entry['version'])} on {nodes} ({_rank_words(entry['ranks'])})"


def _rank_words(ranks: Sequence[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {as_ranges(ranks)}"


def _time(ms: float) -> str:
    if ms >= 1000.0:
        return f"{ms / 1000.0:.3g} s" if ms < 1e6 else f"{ms / 1000.0:.0f} s"
    return f"{ms:.2g} ms" if ms >= 1.0 else f"{ms * 1000.0:.2g} us"


def _moment(unix_s: float | None) -> str:
    return datetime.fromtimestamp(unix_s or 0.0, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _short(text: object) -> str:
    return one_line(text, _LONGEST)

"""What Slurm reports of its cluster, what a job of a site would get there, and a site file to start from."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from observatory.errors import BatchError
from observatory.hpc import slurm
from observatory.hpc.scripts import JobScript, job_script, seconds, templates
from observatory.hpc.site import Site
from observatory.run.files import one_line

_PAIR = re.compile(r"(?:^|\s)([A-Za-z][A-Za-z_/:]*)=(\S*)")
_GPU = re.compile(r"gpu(?::([A-Za-z0-9_.-]+))?:(\d{1,4})", re.ASCII)
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}", re.ASCII)
_TIME = re.compile(r"(\d{1,3}-)?\d{1,3}:[0-5]\d:[0-5]\d", re.ASCII)
_MOST_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeKind:
    """What a node has.

    Attributes:
        cpus: processors that Slurm gives out.
        sockets: of them.
        memory_mb: MiB.
        gres: its GPUs as a job asks for them, such as ``gpu:a100:4``; None without.
        gpus: how many.
        features: for ``constraint``.
    """

    cpus: int
    sockets: int
    memory_mb: int
    gres: str | None
    gpus: int
    features: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{self.cpus} CPUs", f"{self.memory_mb >> 10} GiB", *([self.gres] if self.gres else [])]
        return ", ".join([*parts, *([f"features {', '.join(self.features)}"] if self.features else [])])


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """A partition, with the limits of its jobs.

    Attributes:
        name: as Slurm has it.
        default: whether jobs that name none go there.
        up: whether it takes jobs.
        longest, usual: wall time at most, and of jobs that ask for none; None without.
        most_nodes: nodes of a job at most; None without.
        kinds: its nodes by kind, the most frequent first.
    """

    name: str
    default: bool
    up: bool
    longest: str | None
    usual: str | None
    most_nodes: int | None
    kinds: tuple[tuple[NodeKind, int], ...]

    @property
    def nodes(self) -> int:
        """How many it has."""
        return sum(count for _, count in self.kinds)

    def __str__(self) -> str:
        head = f"{self.name}{' (default)' if self.default else ''}{'' if self.up else ' (takes no jobs)'}"
        limits = [f"at most {self.longest}" if self.longest else "no limit of time"]
        limits += [] if self.most_nodes is None else [f"{self.most_nodes} nodes a job"]
        kinds = "; ".join(f"{count} x {kind}" for kind, count in self.kinds) or "no nodes"
        return f"{head}: {', '.join(limits)}; {kinds}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What Slurm reports.

    Attributes:
        name, version: of the cluster, and of Slurm.
        max_array: elements of an array at most; None where Slurm states none.
        accounting: whether ``sacct`` can be asked for jobs that have ended.
        gpu_freq: the clock that Slurm sets by itself for GPUs; None where it states none.
        account: the user's account; None where it is not known.
        partitions: the default one first.
    """

    name: str
    version: str
    max_array: int | None
    accounting: bool
    gpu_freq: str | None
    account: str | None = None
    partitions: Sequence[Partition] = field(default_factory=tuple)

    def partition(self, name: str | None) -> Partition | None:
        """The partition of a name, or the default one; None where there is none."""
        return next(
            (each for each in self.partitions if each.name == name or (not name and each.default)), None
        )


def read_cluster() -> Cluster:
    """Ask Slurm for its settings, partitions and nodes.

    Raises:
        BatchError: there is no Slurm here, or it does not answer.
    """
    if shutil.which("scontrol") is None:
        other = "PBS" if shutil.which("qsub") else "LSF" if shutil.which("bsub") else None
        raise BatchError(
            "there is no Slurm here" + (f", but {other}" if other else ""),
            expected="the login node of a site",
            remedy=f"start from `observatory site example {(other or 'slurm-gpu').lower()}.toml`",
        )
    config, partitions, nodes = (
        slurm.read("scontrol", *words)
        for words in (("show", "config"), ("show", "partition", "-o"), ("show", "node", "-o"))
    )
    account = ""
    with contextlib.suppress(BatchError, KeyError, ImportError):
        import getpass

        account = slurm.read(
            *("sacctmgr", "--noheader", "--parsable2", "show", "user", getpass.getuser()),
            "format=DefaultAccount",
        )
    return parse_cluster(config, partitions, nodes, account)


def parse_cluster(config: str, partitions: str, nodes: str, account: str = "") -> Cluster:
    """A cluster from what ``scontrol show config``, ``partition`` and ``node`` print."""
    settings = dict(re.findall(r"^([A-Za-z_]+)\s*=\s*(.*?)\s*$", config, re.MULTILINE))
    members: dict[str, Counter[NodeKind]] = {}
    for line in nodes.splitlines():
        pairs = dict(_PAIR.findall(line))
        for name in pairs.get("Partitions", "").split(","):
            members.setdefault(name, Counter())[_node_kind(pairs)] += 1
    found = [
        _partition(dict(_PAIR.findall(line)), members) for line in partitions.splitlines() if line.strip()
    ]
    most = _number(settings.get("MaxArraySize", ""))
    first = account.strip().splitlines()[:1]
    return Cluster(
        name=_word(settings.get("ClusterName")) or "site",
        version=one_line(settings.get("SLURM_VERSION", "unknown"), 40),
        max_array=None if most is None else max(1, min(most - 1, 65536)),
        accounting=settings.get("AccountingStorageType", "").endswith("slurmdbd"),
        gpu_freq=_stated(settings.get("GpuFreqDef")),
        account=_word(first[0]) if first else None,
        partitions=sorted((each for each in found if each), key=lambda each: not each.default),
    )


def site_text(cluster: Cluster, partition: str | None, *, program: str | None) -> str:
    """A site file for the jobs of one partition, for the user to edit.

    Args:
        cluster: what Slurm reports.
        partition: its name; None for the default one.
        program: where the observatory is installed; None where it is not known.

    Raises:
        BatchError: the cluster has no such partition.
    """
    chosen = cluster.partition(partition)
    if chosen is None:
        names = ", ".join(each.name for each in cluster.partitions[:_MOST_SHOWN]) or "none"
        raise BatchError(
            f"the cluster has no partition {partition!r}"
            if partition
            else "the cluster has no default partition",
            expected=f"one of {names}",
            remedy="name one with --partition",
        )
    kind = chosen.kinds[0][0] if chosen.kinds else None
    tasks = (kind.gpus or kind.sockets) if kind else 1
    shortest = min((time for time in (chosen.usual, chosen.longest, "01:00:00") if time), key=seconds)
    return (
        templates()
        .get_template("site.toml.j2")
        .render(
            cluster=cluster,
            chosen=chosen,
            partitions=[one_line(str(each), 400) for each in cluster.partitions[:_MOST_SHOWN]],
            left_out=max(0, len(cluster.partitions) - _MOST_SHOWN),
            kind=kind,
            tasks=tasks,
            cpus_per_task=max(1, kind.cpus // tasks) if kind else None,
            time=chosen.usual or shortest,
            signal_s=max(10, min(180, seconds(chosen.usual or shortest) // 4)),
            program=program,
            quoted=json.dumps,
        )
    )


def complaints(site: Site, cluster: Cluster) -> list[str]:
    """What of a site file this cluster would not run as it stands, a sentence each."""
    batch, node = site.batch, site.node
    found = []
    if cluster.max_array is not None and batch.max_array > cluster.max_array:
        found.append(
            f"batch.max_array is {batch.max_array}, Slurm takes arrays of {cluster.max_array} at most"
        )
    names = (batch.partition or "").split(",")
    for name in names:
        chosen = cluster.partition(name or None)
        if chosen is None:
            known = ", ".join(each.name for each in cluster.partitions[:_MOST_SHOWN])
            found.append(
                (
                    f"partition {name} does not exist"
                    if name
                    else "no partition is named, and none is the default"
                )
                + f"; there are {known}"
            )
            continue
        if not chosen.up:
            found.append(f"partition {chosen.name} takes no jobs at present")
        if chosen.longest is not None and seconds(batch.time) > seconds(chosen.longest):
            found.append(f"batch.time is {batch.time}, partition {chosen.name} allows {chosen.longest}")
        found += _too_much(chosen, tasks=node.tasks, cpus_per_task=node.cpus_per_task or 1, gpus=node.gpus)
    return found


def refusal(site: Site) -> str | None:
    """Why Slurm would refuse a job that fills one node of a site; None when it would take it.

    It asks ``sbatch --test-only``, which submits nothing.
    """
    with tempfile.TemporaryDirectory(prefix="observatory-site-") as folder:
        job = JobScript(
            name="check", folder=Path(folder), points=("check",), tasks=site.node.tasks, time=site.batch.time
        )
        script = Path(folder, "check.sh")
        script.write_text(job_script(site, job), encoding="utf-8")
        try:
            slurm.read("sbatch", "--test-only", str(script))
        except BatchError as error:
            return error.what
    return None


def _too_much(partition: Partition, *, tasks: int, cpus_per_task: int, gpus: int) -> list[str]:
    if not partition.kinds:
        return [f"partition {partition.name} has no nodes"]
    cpus = max(kind.cpus for kind, _ in partition.kinds)
    most_gpus = max(kind.gpus for kind, _ in partition.kinds)
    found = []
    if tasks * cpus_per_task > cpus:
        found.append(
            f"{tasks} ranks of {cpus_per_task} CPUs take {tasks * cpus_per_task} CPUs of a node, "
            f"nodes of partition {partition.name} have {cpus}"
        )
    if gpus > most_gpus:
        found.append(f"node.gpus is {gpus}, nodes of partition {partition.name} have {most_gpus}")
    return found


def _partition(pairs: Mapping[str, str], members: Mapping[str, Counter[NodeKind]]) -> Partition | None:
    name = _word(pairs.get("PartitionName"))
    if name is None:
        return None
    return Partition(
        name=name,
        default=pairs.get("Default") == "YES",
        up=pairs.get("State") == "UP",
        longest=_time(pairs.get("MaxTime")),
        usual=_time(pairs.get("DefaultTime")),
        most_nodes=_number(pairs.get("MaxNodes", "")),
        kinds=tuple(members.get(name, Counter()).most_common()),
    )


def _node_kind(pairs: Mapping[str, str]) -> NodeKind:
    gpus = [(kind, int(count)) for kind, count in _GPU.findall(pairs.get("Gres", ""))]
    return NodeKind(
        cpus=_number(pairs.get("CPUEfctv", "")) or _number(pairs.get("CPUTot", "")) or 1,
        sockets=_number(pairs.get("Sockets", "")) or 1,
        memory_mb=_number(pairs.get("RealMemory", "")) or 0,
        gres=",".join(f"gpu:{kind}:{count}" if kind else f"gpu:{count}" for kind, count in gpus) or None,
        gpus=sum(count for _, count in gpus),
        features=tuple(
            word for word in (_stated(pairs.get("AvailableFeatures")) or "").split(",") if _word(word)
        )[:_MOST_SHOWN],
    )


def _word(text: str | None) -> str | None:
    return text if text is not None and _WORD.fullmatch(text) else None


def _time(text: str | None) -> str | None:
    return text if text is not None and _TIME.fullmatch(text) else None


def _stated(text: str | None) -> str | None:
    return None if text in (None, "", "(null)", "none", "n/a") else one_line(str(text), 200)


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"\d{1,12}", text, re.ASCII) else None

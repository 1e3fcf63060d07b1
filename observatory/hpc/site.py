"""What a site's batch system wants of a job: read from the site's TOML file (docs/hpc.md).

Every value that goes into a directive or a command line is checked against what such a value can be; only
``environment.setup`` is shell, written by the user for the user's own jobs.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from observatory.errors import BatchError
from observatory.run.bounded import read_toml

_MOST_BYTES = 256 << 10
#: A word of a directive: no space, quote, or anything that a shell or a batch system expands.
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:,+=/@&|*()\[\]-]*$", max_length=200)]
_Option = Annotated[str, Field(pattern=r"^-[A-Za-z0-9._:,+=/@&|*()\[\] \"-]*$", max_length=300)]
_Line = Annotated[str, Field(pattern=r"^[^\x00-\x08\x0a-\x1f\x7f]*$", max_length=2000)]
#: A path in double quotes: variables of the job are filled in, ``$NAME`` or ``${NAME}``, and nothing else is.
_Path = Annotated[
    str,
    Field(
        pattern=r"^(?:[A-Za-z0-9_/.%:+-]|\$[A-Za-z_][A-Za-z0-9_]*|\$\{[A-Za-z_][A-Za-z0-9_]*\})+$",
        max_length=1000,
    ),
]
_Few = Annotated[int, Field(ge=1, le=65536)]
#: ``HH:MM:SS`` or ``D-HH:MM:SS``.
WallTime = Annotated[str, Field(pattern=r"^([0-9]{1,3}-)?[0-9]{1,3}:[0-5][0-9]:[0-5][0-9]$")]
SchedulerKind = Literal["slurm", "pbs", "lsf"]


#: Keys that a scheduler's scripts have no directive for.
_UNKNOWN: dict[SchedulerKind, tuple[str, ...]] = {
    "slurm": (),
    "pbs": ("batch.qos", "batch.reservation", "batch.constraint", "node.gres", "node.gpu_freq"),
    "lsf": ("batch.qos", "batch.constraint", "node.gres", "node.gpu_freq", "node.memory"),
}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


#: Directives of sbatch that make a script what it is: which points it runs, where, and how it ends.
_OWN_SLURM_OPTION = re.compile(
    r"(--(array|chdir|error|export|export-file|no-requeue|open-mode|output|requeue|signal|wrap)(=|$|\s)|-[aDeo])"
)


class BatchSettings(_Part):
    """What the batch system is asked for.

    Attributes:
        partition: partition (Slurm) or queue (PBS, LSF); None for the site's default.
        account: what the time is charged to.
        qos, reservation, constraint: as the site names them.
        time: wall time of a job.
        max_array: elements of one array at most (Slurm: MaxArraySize, less one).
        array_limit: elements of an array that run at once; None: as many as fit.
        signal_s: seconds before the end of the wall time at which a job is signalled to write what it has;
            PBS has no such signal, LSF counts in whole minutes.
        restarts: how often a job that can continue is started again.
        extra: further directives, such as ``--mail-type=END``.
    """

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    reservation: Word | None = None
    constraint: Word | None = None
    time: WallTime = "01:00:00"
    max_array: _Few = 1000
    array_limit: _Few | None = None
    signal_s: Annotated[int, Field(ge=10, le=3600)] = 180
    restarts: Annotated[int, Field(ge=0, le=100)] = 2
    extra: Annotated[tuple[_Option, ...], Field(max_length=50)] = ()


class NodeSettings(_Part):
    """What one node has, and how jobs share it.

    Attributes:
        tasks: ranks on one node at most; as a rule its GPUs.
        gpus: GPUs of a node that a job takes; 0 on a site without.
        gres: generic resource that stands for them, such as ``gpu:a100:4``; None asks for ``gpus``.
        cpus_per_task: processors of one rank; None: as the site has it.
        memory: of a node, such as ``64G``, in Slurm also ``0`` for all; None: as the site has it.
        exclusive: whole nodes ``always``, where ``power`` is measured, or ``never``.
        gpu_freq: whether Slurm may set a clock for a step (``--gpu-freq``).
    """

    tasks: _Few = 1
    gpus: Annotated[int, Field(ge=0, le=1024)] = 0
    gres: Word | None = None
    cpus_per_task: _Few | None = None
    memory: Annotated[str, Field(pattern=r"^[0-9]{1,12}[KMGT]?$")] | None = None
    exclusive: Literal["always", "power", "never"] = "power"
    gpu_freq: bool = False


class EnvironmentSettings(_Part):
    """What a job finds.

    Attributes:
        modules: loaded in this order.
        setup: lines of shell, such as the activation of a virtual environment.
        variables: environment variables of all commands.
        observatory: how the observatory is called.
        launcher: what starts ranks: ``srun`` or ``mpiexec``.
        scratch: folder on each node's own disk, such as ``$TMPDIR``; runs are written there and copied back.
    """

    modules: Annotated[tuple[Word, ...], Field(max_length=100)] = ()
    setup: Annotated[tuple[_Line, ...], Field(max_length=100)] = ()
    variables: Annotated[
        dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,99}$")], _Line], Field(max_length=200)
    ] = {}
    observatory: Annotated[tuple[_Line, ...], Field(min_length=1, max_length=50)] = ("observatory",)
    launcher: Literal["srun", "mpiexec"] = "srun"
    scratch: _Path | None = None


class ContainerSettings(_Part):
    """An Apptainer image that has the observatory.

    Attributes:
        image: its file.
        binds: folders that it sees, ``SOURCE[:DESTINATION[:OPTIONS]]``; the campaign's is always among them.
        nv: pass the NVIDIA driver in.
    """

    image: _Path
    binds: Annotated[tuple[_Path, ...], Field(max_length=100)] = ()
    nv: bool = True


class Site(_Part):
    """A site.

    Attributes:
        name: for people.
        scheduler: its batch system; ``pbs`` and ``lsf`` scripts are written, but were never run.
        batch, node, environment, container: see there.
        job_monitor: address of a job in the site's monitor, with ``{job_id}``; it is printed, never fetched.
        hardware: what the site's links and power are; for ``observatory plan`` (docs/plan.md).
    """

    name: Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{1,100}$")] = "site"
    scheduler: SchedulerKind = "slurm"
    batch: BatchSettings = BatchSettings()
    node: NodeSettings = NodeSettings()
    environment: EnvironmentSettings = EnvironmentSettings()
    container: ContainerSettings | None = None
    job_monitor: Annotated[str, Field(pattern=r"^https?://[!#-%(-;=?-~]+$", max_length=500)] | None = None
    hardware: dict[str, Any] = {}

    @model_validator(mode="after")
    def _fits(self) -> Site:
        if self.job_monitor is not None and "{job_id}" not in self.job_monitor:
            raise ValueError("job_monitor has no {job_id}")
        if self.scheduler != "slurm" and self.environment.launcher == "srun":
            raise ValueError("environment.launcher is srun, which Slurm alone has; name mpiexec")
        unknown = [key for key in _UNKNOWN[self.scheduler] if self._has(key)]
        if unknown:
            raise ValueError(f"{unknown[0]} has no meaning in {self.scheduler} scripts; use batch.extra")
        own = [option for option in self.batch.extra if _OWN_SLURM_OPTION.match(option)]
        if self.scheduler == "slurm" and own:
            raise ValueError(f"batch.extra holds {own[0][:40]}, which the script sets by itself")
        if self.scheduler == "pbs" and (self.node.memory or "G")[-1].isdecimal():
            raise ValueError("node.memory needs a unit in pbs scripts, such as 64G")
        if self.environment.scratch is not None and self.environment.launcher != "srun":
            raise ValueError("environment.scratch needs the launcher srun, which copies back from every node")
        return self

    def _has(self, key: str) -> bool:
        part, _, name = key.partition(".")
        return bool(getattr(getattr(self, part), name))

    def nodes_for(self, tasks: int) -> int:
        """Nodes that so many ranks take."""
        return -(-tasks // self.node.tasks)

    def monitor_link(self, job_id: str) -> str | None:
        """Where the site's monitor shows a job; None where the site names no monitor."""
        return None if self.job_monitor is None else self.job_monitor.replace("{job_id}", job_id)


def load_site(path: Path) -> Site:
    """Read a site file.

    Raises:
        BatchError: it cannot be read, or says something that no site has; names the key.
    """
    return read_toml(
        path,
        Site,
        most_bytes=_MOST_BYTES,
        failure=BatchError,
        what="site file",
        remedy="see docs/hpc.md for its form, or write one with `observatory site init`",
    )

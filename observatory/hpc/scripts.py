"""Text of batch scripts: a pure function of a site and a job.

A script names its points in full, so that a job that waits does what was submitted, whatever happens to the
campaign file. Slurm scripts are tested on a real Slurm; those of PBS and LSF are text that was never run.
"""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from observatory.errors import BatchError
from observatory.hpc.site import SchedulerKind, Site
from observatory.run.files import one_line

_PLAIN_PATH = re.compile(r"^/[A-Za-z0-9_./+@,=-]*$")
_PREFIXES: dict[SchedulerKind, str] = {"slurm": "#SBATCH", "pbs": "#PBS", "lsf": "#BSUB"}
#: Array of a job, elements that run at once: how a scheduler names its log.
_LOGS: dict[SchedulerKind, tuple[str, str]] = {
    "slurm": ("%A_%a.log", "%j.log"),
    "pbs": ("", ""),  # a folder: PBS names the file
    "lsf": ("%J_%I.log", "%J.log"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobScript:
    """What a batch job does, on what.

    Attributes:
        name: of the job.
        folder: the campaign's directory, absolute.
        points: names of its points, one for each element of an array; empty for a job of one command.
        command: its command, where it has no points.
        tasks: ranks of a point.
        time: wall time.
        exclusive: whether it takes whole nodes.
        clock_mhz: clock that its steps ask for; None leaves clocks alone.
        resumes: whether a further attempt continues where the last one ended.
        array_limit: elements that run at once; None: as many as fit.
    """

    name: str
    folder: Path
    points: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    tasks: int = 1
    time: str
    exclusive: bool = False
    clock_mhz: int | None = None
    resumes: bool = False
    array_limit: int | None = None


def job_script(site: Site, job: JobScript) -> str:
    """The batch script of a job.

    Raises:
        BatchError: the path cannot stand in a directive, the wall time leaves none to write what was
            captured, or the clock cannot be set here.
    """
    if _PLAIN_PATH.fullmatch(str(job.folder)) is None:
        raise BatchError(
            f"{str(job.folder)!r} cannot stand in the directives of a batch script",
            expected="a path of letters, digits and _./+@,=-",
            remedy="choose another --out",
        )
    if seconds(job.time) <= site.batch.signal_s:
        raise BatchError(
            f"the wall time {job.time} is over when a job is signalled, {site.batch.signal_s} s before",
            remedy="give a longer time, or a smaller batch.signal_s in the site file",
        )
    if job.clock_mhz is not None and not (site.node.gpu_freq and site.environment.launcher == "srun"):
        raise BatchError(
            f"a clock of {job.clock_mhz} MHz is asked for, but the site does not let jobs set clocks",
            expected="launcher srun and node.gpu_freq = true, where `srun --gpu-freq` is allowed",
            remedy="mend the site file, or leave clocks_mhz and clock_mhz out of the campaign",
        )
    nodes = site.nodes_for(job.tasks)
    environment = site.environment
    return (
        templates()
        .get_template("job.sh.j2")
        .render(
            prefix=_PREFIXES[site.scheduler],
            scheduler=site.scheduler,
            directives=_DIRECTIVES[site.scheduler](site, job, nodes),
            about=f"{job.name}: {len(job.points) or 1} {'points' if len(job.points) > 1 else 'point'} "
            f"of {job.tasks} rank(s) on {nodes} node(s)"
            if job.points
            else job.name,
            folder=shlex.quote(str(job.folder)),
            environment=_environment_lines(site),
            launcher=environment.launcher,
            points=[shlex.quote(point) for point in job.points],
            command=_called(site, job.command, job.folder),
            start=_start(site, job, nodes),
            start_per_node=f"srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1",
            scratch=None if environment.scratch is None else f'"{environment.scratch}"',
            resumes=job.resumes,
            restarts=site.batch.restarts,
        )
    )


def command_script(site: Site, argv: Sequence[str], folder: Path, *, about: str) -> str:
    """The script that each rank of a point runs; ``{out}`` of the command is its first argument."""
    bind_scratch = site.container is not None and site.environment.scratch is not None
    text = _called(site, argv, folder, further='--bind "$1"' if bind_scratch else "")
    return f"#!/bin/bash\n# {one_line(about, 500)}\nexec {text}\n"


def _called(site: Site, argv: Sequence[str], folder: Path, *, further: str = "") -> str:
    """A command line in shell, as it is called at a site: ``observatory`` by the site's name, in its image.

    ``further`` are options for the image, in shell.
    """
    if not argv:
        return ""
    words = [*site.environment.observatory, *argv[1:]] if argv[0] == "observatory" else list(argv)
    text = " ".join(_quoted(word) for word in words)
    if site.container is None:
        return text
    # A site's paths may hold variables of the job, as `environment.scratch` may, and no quotes.
    paths = ",".join((str(folder), *site.container.binds))
    options = " ".join(filter(None, ("--nv" if site.container.nv else "", further)))
    return f'apptainer exec {options} --bind "{paths}" "{site.container.image}" {text}'


def _quoted(word: str) -> str:
    """A word that the shell leaves alone, but for ``{out}``: its first argument."""
    return '"$1"'.join(shlex.quote(part) if part else "" for part in word.split("{out}")) or "''"


def _start(site: Site, job: JobScript, nodes: int) -> str:
    if site.environment.launcher == "mpiexec":
        return "" if job.tasks == 1 else f"mpiexec -n {job.tasks}"
    words = ["srun", f"--nodes={nodes}", f"--ntasks={job.tasks}", "--export=ALL", "--kill-on-bad-exit=0"]
    if site.node.cpus_per_task is not None:  # steps do not inherit it from their job since Slurm 22.05
        words.append(f"--cpus-per-task={site.node.cpus_per_task}")
    if job.clock_mhz is not None:
        words.append(f"--gpu-freq={job.clock_mhz}")
    return " ".join(words)


def _environment_lines(site: Site) -> list[str]:
    """Lines of the function that sets a job's environment up; the first that fails ends it."""
    environment = site.environment
    lines = [
        f'module load {shlex.quote(name)} || {{ say "the module {name} cannot be loaded"; return 1; }}'
        for name in environment.modules
    ]
    for line in environment.setup:  # on a line of its own, since a line of shell may end in a comment
        lines += [line, '[ "$?" -eq 0 ] || return 1']
    lines += [f"export {name}={shlex.quote(value)}" for name, value in environment.variables.items()]
    return lines


def _slurm(site: Site, job: JobScript, nodes: int) -> list[str]:
    batch, node = site.batch, site.node
    log = _LOGS["slurm"][0 if job.points else 1]
    lines = [f"--job-name={job.name}"]
    if job.points:
        limit = "" if job.array_limit is None else f"%{job.array_limit}"
        lines.append(f"--array=0-{len(job.points) - 1}{limit}")
    lines += [
        f"--nodes={nodes}",
        f"--ntasks={job.tasks}",
        f"--ntasks-per-node={-(-job.tasks // nodes)}",
        f"--time={job.time}",
    ]
    named = {
        "partition": batch.partition,
        "account": batch.account,
        "qos": batch.qos,
        "reservation": batch.reservation,
        "constraint": batch.constraint,
        "cpus-per-task": node.cpus_per_task,
        "mem": node.memory,
        "gres": node.gres,
        "gpus-per-node": node.gpus if node.gpus and node.gres is None else None,
    }
    lines += [f"--{name}={value}" for name, value in named.items() if value is not None]
    lines += ["--exclusive"] if job.exclusive else []
    lines += [f"--chdir={job.folder}", f"--output={job.folder}/logs/{log}", "--open-mode=append"]
    # The default of a site may be either; a job that was requeued continues or repeats its own point only.
    lines += ["--requeue", f"--signal=B:USR1@{batch.signal_s}", "--export=NONE"]
    return [*lines, *batch.extra]


def _pbs(site: Site, job: JobScript, nodes: int) -> list[str]:
    batch, node = site.batch, site.node
    limit = "" if job.array_limit is None else f"%{job.array_limit}"  # since PBS 2020.1 and OpenPBS 20
    tasks = -(-job.tasks // nodes)
    chunk = f"select={nodes}:ncpus={tasks * (node.cpus_per_task or 1)}:mpiprocs={tasks}"
    chunk += f":ngpus={node.gpus}" if node.gpus else ""
    chunk += "" if node.memory is None else f":mem={node.memory}B"
    lines = [f"-N {job.name[:15]}", "-S /bin/bash"]  # else the login shell of the user reads the script
    # An array of one element does not exist in PBS.
    lines += [f"-J 0-{len(job.points) - 1}{limit}"] if len(job.points) > 1 else []
    place = "scatter:exclhost" if job.exclusive else "scatter"
    lines += [f"-l {chunk}", f"-l place={place}", f"-l walltime={_hours(job.time)}"]
    named = {"-q": batch.partition, "-A": batch.account}
    lines += [f"{name} {value}" for name, value in named.items() if value is not None]
    # The script writes its own log; what PBS itself has to say gets a name by PBS.
    return [*lines, "-j oe", f"-o {job.folder}/logs/", "-r y", *batch.extra]


def _lsf(site: Site, job: JobScript, nodes: int) -> list[str]:
    batch, node = site.batch, site.node
    limit = "" if job.array_limit is None else f"%{job.array_limit}"
    array = f"[1-{len(job.points)}]{limit}" if job.points else ""
    log = _LOGS["lsf"][0 if job.points else 1]
    minutes = -(-seconds(job.time) // 60)
    lines = [f'-J "{job.name}{array}"', f"-n {job.tasks}", f'-R "span[ptile={-(-job.tasks // nodes)}]"']
    lines += [] if node.cpus_per_task is None else [f'-R "affinity[core({node.cpus_per_task})]"']
    lines += [f"-W {minutes // 60}:{minutes % 60:02d}"]
    named = {"-q": batch.partition, "-P": batch.account, "-U": batch.reservation}
    lines += [f"{name} {value}" for name, value in named.items() if value is not None]
    lines += [f'-gpu "num={node.gpus}"'] if node.gpus else []
    lines += ["-x"] if job.exclusive else []
    lines += [f"-o {job.folder}/logs/{log}", "-r", f"-wa USR1 -wt {max(1, batch.signal_s // 60)}"]
    return [*lines, '-env "none"', *batch.extra]


def seconds(time: str) -> int:
    """A wall time in seconds."""
    days, _, clock = time.rpartition("-")
    hours, minutes, rest = clock.split(":")
    return ((int(days or 0) * 24 + int(hours)) * 60 + int(minutes)) * 60 + int(rest)


def _hours(time: str) -> str:
    """A wall time as ``HH:MM:SS``, days among the hours."""
    minutes, rest = divmod(seconds(time), 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest:02d}"


_DIRECTIVES = {"slurm": _slurm, "pbs": _pbs, "lsf": _lsf}


@functools.cache
def templates() -> jinja2.Environment:
    """The texts of this room that have gaps to fill."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("observatory.hpc", "templates"),
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )

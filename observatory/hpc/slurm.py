"""Slurm's commands: submit, ask, cancel. Each call is one command; none is repeated by itself."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from observatory.errors import BatchError
from observatory.run.files import one_line

_TIMEOUT_S = 60.0
_JOB_ID = re.compile(r"\d{1,18}", re.ASCII)
#: ``123``, ``123_4``, ``123_[4-7%2]``.
_ELEMENT = re.compile(r"(\d{1,18})(?:_(\d{1,9}|\[[0-9,%-]{1,4000}\]))?", re.ASCII)
_MOST_BYTES = 64 << 20
#: Job ids of one command.
_MOST_ASKED = 1000
#: States in which a job waits for its start, also for one after the first: squeue(1), job state codes.
_WAITING = frozenset(
    ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT", "EXPEDITING")
)
_RUNNING = frozenset(
    (
        *("RUNNING", "CONFIGURING", "POWER_UP_NODE", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT"),
        *("STOPPED", "SUSPENDED"),
    )
)
_FULL = "run the same command again once jobs have ended: what is queued is not submitted twice"
_SILENT = "run the same command again when the scheduler answers"
#: What to do about a job that sbatch does not take, by words of its message.
_REMEDIES = {
    "Job violates accounting/QOS policy": _FULL,
    "MaxSubmitJob": _FULL,
    "Unable to contact slurm controller": _SILENT,
    "Socket timed out": _SILENT,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """What the scheduler reports of a job, or of one element of an array.

    Attributes:
        state: as Slurm names it, such as ``RUNNING``.
        exit_code: of its script; None while it has none.
        reason: why it waits; None where none is stated.
        nodes: where it runs or ran.
    """

    state: str
    exit_code: int | None = None
    reason: str | None = None
    nodes: str | None = None

    @property
    def active(self) -> bool:
        """Whether it waits or runs."""
        return self.waits or self.state in _RUNNING

    @property
    def waits(self) -> bool:
        """Whether it waits for its start, be it for a further one."""
        return self.state in _WAITING


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueAnswer:
    """What a query brought.

    Attributes:
        source: ``sacct`` (with squeue for jobs that it does not know yet), ``squeue``, or None where neither
            answered.
        states: by job id, such as ``123`` or ``123_4``; jobs that the scheduler has forgotten are missing.
        problem: why there is no answer, or not about all jobs; None where there is one.
    """

    source: str | None
    states: Mapping[str, JobState]
    problem: str | None = None


def submit(script: Path, *, after: Sequence[str] = ()) -> str:
    """Submit a batch script.

    Args:
        script: its file.
        after: jobs that have to end first, in whatever way.

    Returns:
        The job's id.

    Raises:
        BatchError: there is no Slurm, or it refuses the job; with Slurm's own reason.
    """
    dependency = [f"--dependency=afterany:{':'.join(after)}"] if after else []
    done = _call(
        *("sbatch", "--parsable", *dependency, str(script)),
        late="run the same command again later: should the job be in the queue after all, "
        "each point still runs once",
    )
    job_id = done.stdout.strip().split(";")[0]
    if done.returncode != 0 or _JOB_ID.fullmatch(job_id) is None:
        said = _complaint(done)
        remedy = next(
            (remedy for words, remedy in _REMEDIES.items() if words in done.stderr),
            "mend the site file, and run the same command again",
        )
        raise BatchError(f"sbatch refuses {script.name}: {said}", remedy=remedy)
    return job_id


def ask(job_ids: Sequence[str]) -> QueueAnswer:
    """The state of jobs: a question to sacct, and one to squeue for what accounting does not know.

    Args:
        job_ids: of jobs, not of elements; whatever is no id of a job is left out.
    """
    asked = [job_id for job_id in job_ids if _JOB_ID.fullmatch(job_id)]
    if not asked:
        return QueueAnswer(source=None, states={})
    accounted = _asked("sacct", asked)
    states = {} if isinstance(accounted, str) else accounted
    known = {name.partition("_")[0] for name in states}
    left = [job_id for job_id in asked if job_id not in known]
    if not left:
        return QueueAnswer(source="sacct", states=states)
    queued = _asked("squeue", left)
    if isinstance(queued, str):
        return QueueAnswer(source="sacct" if states else None, states=states, problem=queued)
    return QueueAnswer(source="sacct" if states else "squeue", states={**states, **queued})


_QUESTIONS = {
    "sacct": (
        *("sacct", "--allocations", "--noheader", "--parsable2", "--array"),
        "--format=JobID,State,ExitCode,NodeList",
    ),
    "squeue": ("squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%r|%N"),
}


def _asked(program: str, job_ids: Sequence[str]) -> dict[str, JobState] | str:
    """What sacct or squeue has to say about jobs; why not, where it does not answer."""
    states: dict[str, JobState] = {}
    for start in range(0, len(job_ids), _MOST_ASKED):
        jobs = ",".join(job_ids[start : start + _MOST_ASKED])
        try:
            done = _call(*_QUESTIONS[program], f"--jobs={jobs}")
        except BatchError as error:
            return error.what
        # squeue so answers a question about one job that it has forgotten.
        if done.returncode != 0 and "Invalid job id" not in done.stderr:
            return f"{program} does not answer: {_complaint(done)}"
        states |= (_accounted if program == "sacct" else _queued)(done.stdout)
    asked = set(job_ids)  # nothing else may be followed, or cancelled
    return {name: state for name, state in states.items() if name.partition("_")[0] in asked}


def cancel(job_ids: Sequence[str]) -> None:
    """Cancel jobs; those that have ended are left alone.

    Raises:
        BatchError: there is no Slurm, or it does not answer.
    """
    for start in range(0, len(job_ids), _MOST_ASKED):
        _cancel(job_ids[start : start + _MOST_ASKED])


def _cancel(job_ids: Sequence[str]) -> None:
    done = _call("scancel", *job_ids)
    lines = [line for line in done.stderr.splitlines() if "Invalid job id" not in line and line.strip()]
    if done.returncode != 0 and lines:
        raise BatchError(f"scancel failed: {one_line(lines[0], 300)}", remedy="run it again")


def read(*command: str) -> str:
    """What a command of Slurm prints.

    Raises:
        BatchError: there is none, or it fails.
    """
    done = _call(*command)
    if done.returncode != 0:
        raise BatchError(
            f"{command[0]} failed: {_complaint(done)}",
            remedy="see whether the scheduler runs, then run it again",
        )
    return done.stdout


def _call(*command: str, late: str = "run it again later") -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            capture_output=True,
            check=False,
            stdin=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=_TIMEOUT_S,
        )
    except FileNotFoundError:
        raise BatchError(
            f"there is no {command[0]} here",
            expected="a machine where jobs of Slurm can be submitted",
            remedy="log in to the site's login node, or use --dry-run to see the scripts",
        ) from None
    except subprocess.TimeoutExpired:
        raise BatchError(
            f"{command[0]} did not answer within {_TIMEOUT_S:g} s",
            remedy=late,
        ) from None
    except OSError as error:
        raise BatchError(f"{command[0]} cannot be started ({error.strerror})") from None


def _complaint(done: subprocess.CompletedProcess[str]) -> str:
    """The last line of what a command wrote: the ones before it are details."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    line = lines[-1] if lines else f"it ended with exit code {done.returncode} and no message"
    return one_line(re.sub(r"^\w+:? (error|fatal): ", "", line), 300)


def _accounted(text: str) -> dict[str, JobState]:
    states = {}
    for line in text[:_MOST_BYTES].splitlines():
        job_id, state, code, nodes, *_ = [*line.split("|"), "", "", "", ""]
        number = code.partition(":")[0]
        word = state.split(maxsplit=1)[0] if state.split() else "UNKNOWN"  # "CANCELLED by 1000"
        value = JobState(
            state=one_line(word, 40),
            exit_code=int(number) if number.isdecimal() else None,
            nodes=one_line(nodes, 200) or None,
        )
        states.update(dict.fromkeys(_elements(job_id), value))
    return states


def _queued(text: str) -> dict[str, JobState]:
    states = {}
    for line in text[:_MOST_BYTES].splitlines():
        job_id, state, reason, nodes, *_ = [*line.split("|"), "", "", "", ""]
        value = JobState(
            state=one_line(state, 40) or "UNKNOWN",
            reason=None if reason in ("", "None") else one_line(reason, 80),
            nodes=one_line(nodes, 200) or None,
        )
        states.update(dict.fromkeys(_elements(job_id), value))
    return states


def _elements(job_id: str) -> list[str]:
    """Ids behind one of Slurm's; waiting elements of an array may come as one line."""
    match = _ELEMENT.fullmatch(job_id)
    if match is None:
        return []
    array, element = match.groups()
    if element is None:
        return [array]
    if not element.startswith("["):
        return [f"{array}_{element}"]
    found: list[str] = []
    for part in element.strip("[]").partition("%")[0].split(","):
        first, _, last = part.partition("-")
        if first.isdecimal() and (last.isdecimal() or not last):
            found += [f"{array}_{number}" for number in range(int(first), int(last or first) + 1)][:65536]
    return found

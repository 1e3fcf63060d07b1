"""The batch job that this process is part of, from what its scheduler puts into the environment.

Variables as their manuals document them: sbatch(1) and srun(1) of Slurm, qsub(1B) of PBS Professional and of
Torque, "Environment variables set for job execution" of IBM Spectrum LSF. The environment is untrusted: a
value that is not what it should be counts as not stated, and names are cut to one bounded line. Names of
users and accounts are not read.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import subprocess
from collections.abc import Callable, Mapping
from typing import Any

from observatory.run.files import one_line
from observatory.run.provenance import SchedulerJob

_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+\[\]@-]{0,127}", re.ASCII)
_NUMBER = re.compile(r"\d{1,15}", re.ASCII)
_LONGEST_NODES, _LONGEST_NAME = 1000, 120
_MOST_BYTES_OF_NODES = 1 << 20
_MEBIBYTE = 1 << 20
_LATEST_UNIX_S = 253_402_300_799
_ANSWER_TIMEOUT_S = 2.0
_PAIR = re.compile(r"(?:^|\s)(StartTime|EndTime|Restarts)=(\d{1,15})(?=\s|$)", re.ASCII)


def find_scheduler(environment: Mapping[str, str]) -> SchedulerJob | None:
    """The batch job of an environment; None outside one or when the job id is no id."""
    readers: tuple[tuple[str, str, Callable[[Mapping[str, str]], dict[str, Any]]], ...] = (
        ("slurm", "SLURM_JOB_ID", _slurm),
        ("pbs", "PBS_JOBID", _pbs),
        ("lsf", "LSB_JOBID", _lsf),
    )
    for kind, variable, reader in readers:
        job_id = environment.get(variable, "").strip()
        if _JOB_ID.fullmatch(job_id):
            return SchedulerJob(kind=kind, job_id=job_id, **reader(environment))
    return None


def with_answers(job: SchedulerJob) -> SchedulerJob:
    """A job with what Slurm's own commands add: its version, and the times that only newer ones export.

    Two short commands, the second with one question to the controller; one that is missing or does not answer
    within seconds adds nothing. For one rank of a run.
    """
    if job.kind != "slurm" or job.job_id is None:
        return job
    words = _answer("scontrol", "--version").split()  # "slurm-wlm 22.05.8"
    found: dict[str, Any] = {"version": one_line(words[1], 60) if len(words) > 1 else None}
    if job.end_unix_s is None:
        pairs = dict(_PAIR.findall(_answer("scontrol", "--oneliner", "show", "job", job.job_id)))
        found["start_unix_s"] = _moment(pairs, "StartTime")
        found["end_unix_s"] = _moment(pairs, "EndTime")
        found["restarts"] = _number(pairs, "Restarts")
    return job.model_copy(update={name: value for name, value in found.items() if value is not None})


def _answer(*command: str) -> str:
    """What a command prints; empty where it fails."""
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        done = subprocess.run(
            command,
            capture_output=True,
            check=False,
            env={**os.environ, "SLURM_TIME_FORMAT": "%s"},  # seconds since 1970
            stdin=subprocess.DEVNULL,
            timeout=_ANSWER_TIMEOUT_S,
        )
        if done.returncode == 0:
            return done.stdout[:_MOST_BYTES_OF_NODES].decode("utf-8", "replace")
    return ""


def _slurm(environment: Mapping[str, str]) -> dict[str, Any]:
    per_node, per_cpu = (_number(environment, f"SLURM_MEM_PER_{unit}") for unit in ("NODE", "CPU"))  # MiB
    return {
        "nodes": _nodes(environment, "SLURM_JOB_NODELIST"),
        "cluster": _name(environment, "SLURM_CLUSTER_NAME"),
        "array_job_id": _name(environment, "SLURM_ARRAY_JOB_ID"),
        "array_task_id": _name(environment, "SLURM_ARRAY_TASK_ID"),
        "partition": _name(environment, "SLURM_JOB_PARTITION"),
        "qos": _name(environment, "SLURM_JOB_QOS"),
        "reservation": _name(environment, "SLURM_JOB_RESERVATION"),
        "node_count": _number(environment, "SLURM_JOB_NUM_NODES"),
        "cpus_per_node": _nodes(environment, "SLURM_JOB_CPUS_PER_NODE"),
        # 0 stands for all the memory of a node.
        "memory_per_node_bytes": per_node * _MEBIBYTE if per_node else None,
        "memory_per_cpu_bytes": per_cpu * _MEBIBYTE if per_cpu else None,
        "gpus": _name(environment, "SLURM_JOB_GPUS") or _name(environment, "SLURM_STEP_GPUS"),
        "gpus_on_node": _number(environment, "SLURM_GPUS_ON_NODE"),
        "start_unix_s": _moment(environment, "SLURM_JOB_START_TIME"),
        "end_unix_s": _moment(environment, "SLURM_JOB_END_TIME"),
        "restarts": _number(environment, "SLURM_RESTART_COUNT"),
    }


def _pbs(environment: Mapping[str, str]) -> dict[str, Any]:
    nodes = _names_in(environment.get("PBS_NODEFILE", ""))
    element = _name(environment, "PBS_ARRAY_INDEX") or _name(environment, "PBS_ARRAYID")
    return {
        "nodes": one_line(",".join(nodes), _LONGEST_NODES) or None,
        "node_count": len(nodes) or _number(environment, "PBS_NUM_NODES"),
        "partition": _name(environment, "PBS_QUEUE"),
        "array_job_id": _name(environment, "PBS_ARRAY_ID"),
        "array_task_id": element,
        "cpus_per_node": _name(environment, "NCPUS"),
    }


def _lsf(environment: Mapping[str, str]) -> dict[str, Any]:
    slots = environment.get("LSB_MCPU_HOSTS", "")[:_MOST_BYTES_OF_NODES].split()  # "node1 16 node2 16"
    cpus = [count for count in slots[1::2] if _NUMBER.fullmatch(count)]
    element = _number(environment, "LSB_JOBINDEX")  # 0 outside an array
    listed = " ".join(slots[::2]) if slots else environment.get("LSB_HOSTS", "")
    return {
        "nodes": one_line(listed, _LONGEST_NODES) or None,
        "node_count": len(slots) // 2 or None,
        "cpus_per_node": one_line(",".join(cpus), _LONGEST_NODES) or None,
        "partition": _name(environment, "LSB_QUEUE"),
        "array_job_id": _name(environment, "LSB_JOBID") if element else None,
        "array_task_id": str(element) if element else None,
    }


def _names_in(path: str) -> list[str]:
    """The different lines of PBS's list of nodes, in order; empty where it is no such file."""
    # The variable may name anything: a pipe would block, and a device never ends.
    with contextlib.suppress(OSError, ValueError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, encoding="utf-8", errors="replace") as file:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                lines = file.read(_MOST_BYTES_OF_NODES).splitlines()
                return list(dict.fromkeys(line for line in lines if _JOB_ID.fullmatch(line)))
    return []


def _name(environment: Mapping[str, str], variable: str) -> str | None:
    return one_line(environment.get(variable, ""), _LONGEST_NAME) or None


def _nodes(environment: Mapping[str, str], variable: str) -> str | None:
    return one_line(environment.get(variable, ""), _LONGEST_NODES) or None


def _number(environment: Mapping[str, str], variable: str) -> int | None:
    text = environment.get(variable, "").strip()
    return int(text) if _NUMBER.fullmatch(text) else None


def _moment(environment: Mapping[str, str], variable: str) -> float | None:
    seconds = _number(environment, variable)
    return float(seconds) if seconds is not None and 0 < seconds <= _LATEST_UNIX_S else None

"""The batch job is read from what its scheduler exports; what is no such value is not stated."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from observatory.host import scheduler
from observatory.host.scheduler import find_scheduler, with_answers
from observatory.run.provenance import SchedulerJob


def test_a_job_of_slurm() -> None:
    slurm = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "gpu[001-004]",
        "SLURM_CLUSTER_NAME": "alps",
        "SLURM_ARRAY_JOB_ID": "4700",
        "SLURM_ARRAY_TASK_ID": "11",
        "SLURM_JOB_PARTITION": "gpu",
        "SLURM_JOB_QOS": "normal",
        "SLURM_JOB_NUM_NODES": "4",
        "SLURM_JOB_CPUS_PER_NODE": "64(x4)",
        "SLURM_MEM_PER_NODE": "1024",
        "SLURM_JOB_GPUS": "0,1",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_JOB_START_TIME": "1700000000",
        "SLURM_JOB_END_TIME": "1700003600",
        "SLURM_RESTART_COUNT": "1",
        "SLURM_JOB_USER": "somebody",
        "SLURM_JOB_ACCOUNT": "project",
    }
    assert find_scheduler(slurm) == SchedulerJob(
        kind="slurm",
        job_id="4711",
        nodes="gpu[001-004]",
        cluster="alps",
        array_job_id="4700",
        array_task_id="11",
        partition="gpu",
        qos="normal",
        node_count=4,
        cpus_per_node="64(x4)",
        memory_per_node_bytes=1 << 30,
        gpus="0,1",
        gpus_on_node=2,
        start_unix_s=1700000000.0,
        end_unix_s=1700003600.0,
        restarts=1,
    )
    assert find_scheduler({}) is None


def test_a_job_of_pbs_with_its_file_of_nodes(tmp_path: Path) -> None:
    (tmp_path / "nodes").write_text("a1\na1\nb2\n\n<script>\n")
    pbs = {"PBS_JOBID": "12[3].server", "PBS_NODEFILE": str(tmp_path / "nodes"), "PBS_QUEUE": "workq"}
    array = {"PBS_ARRAY_ID": "12[].server", "PBS_ARRAY_INDEX": "3", "NCPUS": "8"}
    assert find_scheduler({**pbs, **array}) == SchedulerJob(
        kind="pbs",
        job_id="12[3].server",
        nodes="a1,b2",
        node_count=2,
        cpus_per_node="8",
        partition="workq",
        array_job_id="12[].server",
        array_task_id="3",
    )
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero", "/nowhere", "a\0b"):
        job = find_scheduler({**pbs, "PBS_NODEFILE": str(path)})
        assert job is not None
        assert (job.nodes, job.node_count) == (None, None)


def test_a_job_of_lsf() -> None:
    lsf = {"LSB_JOBID": "5", "LSB_JOBINDEX": "2", "LSB_QUEUE": "batch", "LSB_MCPU_HOSTS": "h1 16 h2 8"}
    job = SchedulerJob(
        kind="lsf",
        job_id="5",
        nodes="h1 h2",
        node_count=2,
        cpus_per_node="16,8",
        partition="batch",
        array_job_id="5",
        array_task_id="2",
    )
    assert find_scheduler(lsf) == job
    alone = find_scheduler({"LSB_JOBID": "5", "LSB_JOBINDEX": "0", "LSB_HOSTS": "h1 h1"})
    assert alone == SchedulerJob(kind="lsf", job_id="5", nodes="h1 h1")


@pytest.mark.parametrize("job_id", ["", "a\nb", "\x1b[31m", "<script>", "9" * 200, "\udcff", "; rm -rf"])
def test_a_job_id_that_is_none_is_ignored(job_id: str) -> None:
    assert find_scheduler({"SLURM_JOB_ID": job_id}) is None


_NAMES = "JOB_NODELIST CLUSTER_NAME ARRAY_TASK_ID JOB_PARTITION JOB_NUM_NODES JOB_GPUS MEM_PER_NODE"
_TIMES = "JOB_START_TIME JOB_END_TIME RESTART_COUNT"


@given(st.text(max_size=200))
def test_any_value_becomes_one_bounded_line_or_nothing(text: str) -> None:
    variables = [f"SLURM_{name}" for name in f"{_NAMES} {_TIMES}".split()]
    values = (text + "\udcff\x00" * 500, "9" * 400, f"-{text}")
    for value in values:
        job = find_scheduler({"SLURM_JOB_ID": "1", **dict.fromkeys(variables, value)})
        assert job is not None
        assert (job.node_count, job.end_unix_s, job.restarts) == (None, None, None)
        for shown in (job.nodes or "", job.cluster or "", job.gpus or ""):
            assert len(shown) <= 1000
            assert shown.isprintable()
            shown.encode("utf-8")


def scontrol(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "scontrol").write_text(f"#!/bin/sh\n{text}\n")
    (folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_slurm_is_asked_for_what_older_ones_do_not_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = "JobId=7 UserId=me(1) Restarts=2 StartTime=1700000000 EndTime=1700003600 Comment=EndTime=1"
    scontrol(
        tmp_path,
        f'[ "$1" = --version ] && echo slurm 23.02.7 || echo "{answer}" $SLURM_TIME_FORMAT',
        monkeypatch,
    )
    job = SchedulerJob(kind="slurm", job_id="7")
    assert with_answers(job) == SchedulerJob(
        kind="slurm",
        job_id="7",
        version="23.02.7",
        start_unix_s=1700000000.0,
        end_unix_s=1700003600.0,
        restarts=2,
    )
    stated = SchedulerJob(kind="slurm", job_id="7", end_unix_s=5.0, restarts=0)
    assert with_answers(stated) == stated.model_copy(update={"version": "23.02.7"})
    assert with_answers(SchedulerJob(kind="pbs", job_id="7")).version is None


@pytest.mark.parametrize(
    "text", ["exit 1", "exec sleep 9", "head -c 3000000 /dev/zero", r"printf '\377 \377'"]
)
def test_a_slurm_that_does_not_answer_adds_nothing(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "_ANSWER_TIMEOUT_S", 0.3)
    scontrol(tmp_path, text, monkeypatch)
    job = SchedulerJob(kind="slurm", job_id="7")
    began = time.monotonic()
    found = with_answers(job)
    assert found.model_copy(update={"version": None}) == job
    assert (found.version or "").isprintable()
    assert time.monotonic() - began < 9

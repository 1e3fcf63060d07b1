"""Which rank this is, from whichever launcher started it."""

from __future__ import annotations

import pytest

from collectives.rendezvous import meeting_point
from observatory.errors import CaptureError, ExchangeError
from observatory.ranks import RankOf, find_rank

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x",
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "node[03-04]",
}


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        (TORCHRUN, RankOf(rank=5, world=8, local_rank=1, local_world=4, node=1, launcher="torchrun")),
        (OPEN_MPI, RankOf(rank=5, world=8, local_rank=1, local_world=4, launcher="mpiexec")),
        (
            {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"},
            RankOf(rank=5, world=8, local_rank=1, local_world=4, launcher="mpiexec"),
        ),
        (SRUN, RankOf(rank=5, world=8, local_rank=1, node=1, launcher="srun")),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "n1"},
            RankOf(rank=5, world=8, launcher="torchrun"),
        ),
        ({"RANK": "5", "WORLD_SIZE": "8"}, RankOf(rank=0, world=1)),
        ({}, RankOf(rank=0, world=1)),
    ],
)
def test_each_launcher_is_understood(environment: dict[str, str], found: RankOf) -> None:
    assert find_rank(environment=environment) == found


def test_a_batch_script_is_no_step_of_its_job() -> None:
    batch = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}
    assert find_rank(environment=batch).world == 1
    assert find_rank(environment={**batch, "SLURM_STEP_ID": "4294967291"}).world == 1


def test_launchers_that_agree_complete_each_other() -> None:
    found = find_rank(environment={**OPEN_MPI, **SRUN})
    assert (found.launcher, found.local_world, found.node) == ("mpiexec", 4, 1)


def test_one_torchrun_per_node_inside_srun_is_no_disagreement() -> None:
    outer = {**SRUN, "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    assert find_rank(environment={**TORCHRUN, **outer}).rank == 5
    alone = {**SRUN, "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
    assert find_rank(environment={**OPEN_MPI, **alone}).rank == 5


def test_launchers_that_disagree_are_both_named() -> None:
    with pytest.raises(CaptureError, match=r"torchrun says rank 5 of 8, mpiexec says rank 4 of 8"):
        find_rank(environment={**TORCHRUN, **OPEN_MPI, "OMPI_COMM_WORLD_RANK": "4"})
    with pytest.raises(CaptureError, match=r"mpiexec says rank 5 of 8, srun says rank 1 of 3"):
        find_rank(environment={**OPEN_MPI, **SRUN, "SLURM_PROCID": "1", "SLURM_NTASKS": "3"})


def test_variables_that_are_no_ranks_are_refused() -> None:
    with pytest.raises(CaptureError, match="RANK is 'five'"):
        find_rank(environment={**TORCHRUN, "RANK": "five"})
    with pytest.raises(CaptureError, match="RANK=8 and WORLD_SIZE=8"):
        find_rank(environment={**TORCHRUN, "RANK": "8"})
    with pytest.raises(CaptureError, match="PMI_SIZE=None"):
        find_rank(environment={"PMI_RANK": "0"})


def test_ranks_meet_where_the_launcher_says() -> None:
    where = find_rank(environment=SRUN)
    assert meeting_point(where, SRUN) == ("node03", 20000 + 7 * 31)
    assert meeting_point(where, {**SRUN, "MASTER_ADDR": "x", "MASTER_PORT": "9"}) == ("x", 9)
    with pytest.raises(ExchangeError, match="MASTER_PORT is None"):
        meeting_point(find_rank(environment=OPEN_MPI), OPEN_MPI)

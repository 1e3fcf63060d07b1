"""Which rank this is, from whichever launcher started it."""

from __future__ import annotations

import socket
import time

import pytest

from observatory.collectives.transport.rendezvous import Rendezvous, meeting_point
from observatory.errors import CaptureError, ExchangeError
from observatory.host.ranks import RankOf, find_rank, launch_name

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
            {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4(x2)"},
            RankOf(rank=5, world=8, local_rank=1, local_world=4, node=1, launcher="srun"),
        ),
        (
            {**SRUN, "SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1,3"},
            RankOf(rank=5, world=8, local_rank=1, local_world=1, node=2, launcher="srun"),
        ),
        (
            {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "many"},
            RankOf(rank=5, world=8, local_rank=1, node=1, launcher="srun"),
        ),
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


@pytest.mark.parametrize(("daemons", "number"), [("2", "0"), ("1", "0"), ("4", "3"), ("8", "2")])
def test_the_daemons_that_mpiexec_starts_with_srun_are_no_ranks(daemons: str, number: str) -> None:
    """One on each node of the job, but for the node where mpiexec runs; some may have nothing to do."""
    step = {"SLURM_NTASKS": daemons, "SLURM_STEP_NUM_TASKS": daemons, "SLURM_PROCID": number}
    daemon = {**SRUN, **step, "SLURM_NODEID": number, "SLURM_STEP_TASKS_PER_NODE": f"1(x{daemons})"}
    found = find_rank(environment={**OPEN_MPI, **daemon})
    assert (found.rank, found.world, found.launcher) == (5, 8, "mpiexec")
    assert found.node == (None if daemons == "1" else int(number))


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


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n7", "n7"), ("n[03-07,9],m1", "n03"), ("m1,n[1-2]", "m1"), ("r[1-2]n[4-5]-ib", "r1n4-ib")],
)
def test_ranks_meet_on_the_first_node_of_the_step(nodes: str, first: str) -> None:
    environment = {**SRUN, "SLURM_STEP_NODELIST": nodes}
    assert meeting_point(find_rank(environment=environment), environment)[0] == first


def test_tasks_that_srun_tells_their_rank_through_pmi_as_well_meet_on_the_first_node() -> None:
    environment = {**SRUN, "SLURM_STEP_NUM_TASKS": "8", "PMI_RANK": "5", "PMI_SIZE": "8"}
    where = find_rank(environment=environment)
    assert (where.launcher, where.node) == ("mpiexec", 1)
    assert meeting_point(where, environment)[0] == "node03"


def test_a_meeting_point_where_nobody_listens_is_given_up_in_time_and_named() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        environment = {**TORCHRUN, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        start = time.monotonic()
        with pytest.raises(ExchangeError) as caught:
            Rendezvous(find_rank(environment=environment), environment, timeout_s=0.5)
        assert time.monotonic() - start < 5
    assert f"rank 5 of 8 does not reach rank 0 at 127.0.0.1:{port} within 0.5 s" in str(caught.value)
    assert "Connection refused" in str(caught.value)


def test_a_port_that_is_taken_is_said_by_the_rank_that_wanted_it() -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = str(other.getsockname()[1])
        environment = {**TORCHRUN, "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        with pytest.raises(ExchangeError, match=r"rank 0 of 8 cannot keep the list of ranks at 127\.0\.0\.1"):
            Rendezvous(find_rank(environment=environment), environment, timeout_s=5)


OF_SRUN = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}
OF_MPIEXEC = {"PMIX_NAMESPACE": "prterun-n1-77@1", "OMPI_COMM_WORLD_RANK": "1"}
OF_TORCHRUN = {"TORCHELASTIC_RUN_ID": "a", "MASTER_PORT": "1", "RANK": "0"}


@pytest.mark.parametrize(
    ("environment", "another"),
    [
        (OF_SRUN, {"SLURM_STEP_ID": "1"}),
        (OF_SRUN, {"SLURM_RESTART_COUNT": "1"}),
        (OF_MPIEXEC, {"PMIX_NAMESPACE": "prterun-n1-78@1"}),
        ({**OF_SRUN, **OF_MPIEXEC}, {"PMIX_NAMESPACE": "prterun-n1-78@1"}),
        (OF_TORCHRUN, {"MASTER_PORT": "2"}),
        ({**OF_SRUN, **OF_TORCHRUN}, {"TORCHELASTIC_RUN_ID": "b"}),
    ],
)
def test_ranks_of_one_launch_have_a_name_in_common(
    environment: dict[str, str], another: dict[str, str]
) -> None:
    numbers = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "RANK")
    sibling = {name: "5" if name in numbers else value for name, value in environment.items()}
    assert launch_name(environment) == launch_name(sibling) != launch_name({**environment, **another})
    assert launch_name({}) is None

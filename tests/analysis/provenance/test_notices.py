"""Ranks that differ where they should not are noticed, nodes that are alike take one row."""

from __future__ import annotations

import pytest

from observatory.analysis.provenance.nodes import common_facts, node_rows, other_settings
from observatory.analysis.provenance.notices import provenance_notices, wall_clock_ahead_ns
from observatory.analysis.provenance.words import (
    ProvenanceCode,
    accelerator_words,
    fabric_words,
    job_words,
    notice_sentence,
)
from observatory.run.manifest import (
    CoreQuota,
    CoreSpec,
    DeviceSpec,
    Manifest,
    ModelSpec,
    RankPower,
    RankStatus,
    Topology,
)
from observatory.run.provenance import Accelerator, FabricLink, SchedulerJob
from tests.analysis.provenance.made import placed_rank


def manifest(*ranks: RankStatus) -> Manifest:
    return Manifest(
        run_id="r",
        created_unix_s=1.0,
        model=ModelSpec(name="m"),
        topology=Topology(ranks=len(ranks)),
        ranks=ranks,
    )


def test_nodes_with_other_versions_are_named_with_their_ranks() -> None:
    old = {"torch": "2.12.0", "nccl": "2.26.2"}
    ranks = [
        placed_rank(rank, node=rank // 2, versions=old if rank > 3 else {"nccl": "2.27.5"})
        for rank in range(6)
    ]
    nccl, torch = provenance_notices(manifest(*ranks))
    assert (nccl.code, nccl.values["name"]) == (ProvenanceCode.VERSIONS_DIFFER, "nccl")
    assert torch.document()["versions"] == [
        {"version": "2.12.0", "ranks": [4, 5], "nodes": ["n2"]},
        {"version": "2.13.0", "ranks": [0, 1, 2, 3], "nodes": ["n0", "n1"]},
    ]
    assert notice_sentence(torch) == (
        "ranks ran different versions of torch: 2.12.0 on n2 (ranks 4-5) and 2.13.0 on n0 and n1 (ranks 0-3)"
    )


def test_a_library_that_one_rank_alone_has_loaded_is_no_difference() -> None:
    ranks = [placed_rank(0, node=0, versions={"mpi": "Open MPI v5.0.8"}), placed_rank(1, node=1)]
    assert provenance_notices(manifest(*ranks)) == []


def test_ranks_far_from_their_device_are_named_where_all_is_known() -> None:
    device = DeviceSpec(kind="nvidia", uuid="GPU-1", bus_id="00000000:1B:00.0")  # on NUMA node 1
    own = RankPower(own_devices=("GPU-1",), sampled=(device,))
    ranks = [
        placed_rank(rank, node=0, numa_nodes=nodes).model_copy(update={"power": power})
        for rank, (nodes, power) in enumerate(
            [("0", own), ("0-1", own), ("1", own), ("0", None), (None, own)]
        )
    ]
    (notice,) = provenance_notices(manifest(*ranks))
    assert notice.document() == {"code": "devices_far", "ranks": [0]}
    assert notice_sentence(notice).startswith("rank 0 ran on cores of other NUMA nodes than its device")


@pytest.mark.parametrize(
    ("ahead_ms", "uncertainty_ms", "noticed"),
    [
        (0.0, 0.02, False),
        (9.0, 0.02, False),
        (12.0, 0.02, True),
        (12.0, 5.0, False),  # less than what is known
        (-2500.0, 0.02, True),
        (None, 0.02, False),
    ],
)
def test_a_wall_clock_is_noticed_when_it_is_surely_off(
    ahead_ms: float | None, uncertainty_ms: float, noticed: bool
) -> None:
    other = [placed_rank(rank, node=1, ahead_ms=ahead_ms, uncertainty_ms=uncertainty_ms) for rank in (1, 2)]
    notices = provenance_notices(manifest(placed_rank(0, node=0), *other))
    assert [notice.code for notice in notices] == [ProvenanceCode.WALL_CLOCKS_DIFFER] * noticed
    for notice in notices:
        assert notice.values["ahead_ms"] == ahead_ms
        assert (notice.values["rank"], notice.values["node"], notice.values["nodes"]) == (1, "n1", 1)


def test_the_clock_that_is_furthest_off_is_named() -> None:
    ranks = [placed_rank(rank, node=rank, ahead_ms=ahead) for rank, ahead in enumerate((0, 20, -1500, 3))]
    (notice,) = provenance_notices(manifest(*ranks))
    assert notice_sentence(notice).startswith(
        "the wall clock of n2 (rank 2) was 1.5 s behind that of the first rank, known within 20 us (2 nodes "
        "are off, this one most):"
    )


def test_ranks_of_one_host_share_a_wall_clock() -> None:
    ranks = [placed_rank(rank, node=0) for rank in range(3)]
    assert wall_clock_ahead_ns(manifest(*ranks)) == {0: (0, 0), 1: (0, 0), 2: (0, 0)}


def test_sixty_four_ranks_on_nodes_that_are_alike_take_one_row_and_another_node_its_own() -> None:
    ranks = [
        placed_rank(
            rank,
            node=rank // 4,
            numa_nodes=str(rank % 2),
            environment={"CUDA_VISIBLE_DEVICES": str(rank % 4)},
        )
        for rank in range(64)
    ]
    (row,) = node_rows(ranks)
    assert row == {
        "nodes": "n0, n1, n2 and 13 more (16 nodes)",
        "ranks": "0-63",
        "machine": "EPYC 9654, 96 CPUs, 512 GiB",
        "cores": "8",
        "numa_nodes": "0-1; memory 0",
        "memory_limit": "64 GiB",
        "accelerators": "2 NVIDIA (1 on NUMA node 0, 1 on NUMA node 1)",
        "fabric": "InfiniBand 400 Gbit/s",
        "others": "0 jobs, 0 users",
        "wall_clock": None,
    }
    assert other_settings(ranks) == ["CUDA_VISIBLE_DEVICES"]
    assert dict(common_facts(ranks, None)) == {
        "common versions": "python 3.11.7, torch 2.13.0",
        "common settings": "OMP_NUM_THREADS=8",
        "settings of single ranks": "CUDA_VISIBLE_DEVICES",
    }
    ranks[5] = placed_rank(5, node=1, other_users=2, memory_limit_bytes=None)
    quota = CoreQuota(cpus=2.5, group="1:2")
    cores = CoreSpec(host="host1", cpus="0-3", quotas=(quota,))
    ranks[4] = ranks[4].model_copy(update={"cores": cores})
    alike, single = node_rows(ranks, wall_clock_ahead_ns(manifest(*ranks)))
    assert (alike["ranks"], single["ranks"], single["others"]) == ("0-3,8-63", "4-7", "0 jobs, 2 users")
    assert (alike["cores"], single["cores"]) == ("8", "4-8; quota 2.5")
    assert single["wall_clock"] == "0 us within 20 us"


def test_runs_of_earlier_schemas_state_nothing_and_are_no_error() -> None:
    ranks = [RankStatus(rank=rank, state="complete", host="a") for rank in range(2)]
    assert (node_rows(ranks), common_facts(ranks, None), provenance_notices(manifest(*ranks))) == ([], [], [])


def test_words_of_a_job_name_what_it_was_given() -> None:
    job = SchedulerJob(
        kind="slurm",
        version="23.02.7",
        job_id="7",
        array_job_id="5",
        array_task_id="2",
        partition="gpu",
        nodes="n[1-4]",
        node_count=4,
        memory_per_node_bytes=1 << 36,
        gpus="0,1",
        gpus_on_node=2,
        end_unix_s=0.5 + 1_700_000_000,
        restarts=1,
    )
    assert job_words(job) == (
        "Slurm 23.02.7 job 7, element 2 of array 5, partition gpu, 4 nodes n[1-4], 64 GiB of memory for each "
        "node, 2 GPUs on the first node (0,1), time up 2023-11-14 22:13 UTC, requeued 1 time"
    )
    assert job_words(SchedulerJob(kind="lsf", job_id="7")) == "LSF job 7"


def test_words_of_devices_leave_out_what_is_down_or_not_known() -> None:
    links = [
        FabricLink(kind="infiniband", name="a", rate_gbit_s=200.0, up=True),
        FabricLink(kind="infiniband", name="b", rate_gbit_s=200.0),
        FabricLink(kind="ethernet", name="c", up=False),
        FabricLink(kind="hsn", name="d", up=True),
    ]
    assert fabric_words(links) == "HSN, 2 x InfiniBand 200 Gbit/s"
    assert accelerator_words([Accelerator(bus_id="0000:1b:00.0", vendor="amd")]) == "1 AMD"
    assert (fabric_words([]), accelerator_words([])) == (None, None)


def test_hostile_texts_stay_on_one_short_line() -> None:
    bad = "\x1b[2J\n</script>" * 15
    rank = placed_rank(0, node=0, versions={"torch": bad}, environment={bad[:90]: bad[:90]})
    other = placed_rank(1, node=1, machine={"name": bad, "cpu": bad})
    texts = [notice_sentence(notice) for notice in provenance_notices(manifest(rank, other))]
    texts += [str(value) for row in node_rows([rank, other]) for value in row.values()]
    texts += [text for _, text in common_facts([rank], SchedulerJob(kind=bad, job_id=bad, nodes=bad))]
    assert texts
    for text in texts:
        assert text.isprintable()
        assert len(text) < 400

"""Several ranks write one run; their model is wrapped as it is in training."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import observatory
from observatory.host.ranks import RankOf, find_rank
from observatory.probes.watch import Watch
from observatory.run import RunWriter
from observatory.run.manifest import Manifest, ModelSpec, Topology
from tests.probes.tiny import ScriptedModel, ids, scripted_adapter

pytestmark = pytest.mark.slow

_RANK = """
    import os, sys, time
    import torch
    import torch.distributed as dist
    import observatory
    import observatory.run.writer
    from tests.probes.tiny import ScriptedModel, ids, scripted_adapter
    out, rank, dies = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "dies"
    dist.init_process_group("gloo", init_method="file://" + out + ".rendezvous", rank=rank, world_size=2)
    model = torch.nn.parallel.DistributedDataParallel(ScriptedModel())
    observatory.run.writer._FIRST_PAUSE_S = 600.0  # rank 1 has word of rank 0, and does not look at files
    time.sleep(0.5 * (1 - rank))
    with observatory.watch(model, out, adapters=[scripted_adapter(3)], flush_s=0.1) as watch:
        dist.barrier()
        for step in range(2):
            model([ids([rank, 2])])
            watch.step()
        if dies and rank == 1:
            os._exit(9)
    if not dies:
        dist.barrier()
        dist.destroy_process_group()
    else:
        os._exit(0)
"""


def run_ranks(out: Path, ending: str) -> list[int]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", textwrap.dedent(_RANK), str(out), str(rank), ending],
            env=environment,
        )
        for rank in range(2)
    ]
    return [process.wait(timeout=400) for process in processes]


def test_two_gloo_ranks_write_one_run(tmp_path: Path) -> None:
    assert run_ranks(tmp_path / "r", "lives") == [0, 0]
    run = observatory.open_run(tmp_path / "r")
    assert run.manifest.topology.ranks == 2
    assert [(status.rank, status.state, status.steps) for status in run.manifest.ranks] == [
        (0, "complete", 2),
        (1, "complete", 2),
    ]
    frame = run.expert_load()
    merged = frame.groupby(["source_rank", "expert"]).load.sum().unstack(fill_value=0)
    assert merged.to_numpy().tolist() == [[2, 0, 2], [0, 2, 2]]
    assert run.problems == ()
    settings = [rank.provenance.environment for rank in run.manifest.ranks if rank.provenance]
    assert [setting["OMP_NUM_THREADS"] for setting in settings] == ["1", "1"]


def test_a_rank_that_dies_leaves_the_data_of_the_other(tmp_path: Path) -> None:
    assert run_ranks(tmp_path / "r", "dies") == [0, 9]
    run = observatory.open_run(tmp_path / "r")
    assert any("rank 1" in problem for problem in run.problems)
    frame = run.expert_load()
    assert frame[frame.source_rank == 0].groupby("expert").load.sum().to_dict() == {0: 2, 1: 0, 2: 2}


def test_several_ranks_replace_a_run_by_the_id_that_all_were_given(tmp_path: Path) -> None:
    """A rank that is early waits for the new run, although the old one still says that it is running."""
    model, out = ScriptedModel(), tmp_path / "r"

    def watching(rank: int, run_id: str, *, overwrite: bool) -> Watch:
        return observatory.watch(
            model, out, adapters=[scripted_adapter(3)], rank=rank, world=2, run_id=run_id, overwrite=overwrite
        )

    RunWriter.create(
        out,
        Manifest(run_id="old", created_unix_s=0.0, model=ModelSpec(name="m"), topology=Topology(ranks=2)),
    )
    with ThreadPoolExecutor() as pool:
        early = pool.submit(RunWriter.join, out, rank=1, run_id="new", timeout_s=20)
        time.sleep(0.3)
        assert not early.done()
        with watching(0, "new", overwrite=True) as watch:
            model([ids([0])])
            watch.step()
            early.result().close(steps=1)
    run = observatory.open_run(out)
    assert run.manifest.run_id == "new"
    assert [status.steps for status in run.manifest.ranks] == [1, 1]


def test_the_rank_is_told_or_found_in_torchrun_s_environment() -> None:
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "WORLD_SIZE": "8"}
    assert find_rank(environment=torchrun) == RankOf(rank=3, world=8, launcher="torchrun")
    assert find_rank(1, 2, environment=torchrun) == RankOf(rank=1, world=2, launcher="caller")
    assert find_rank(environment={"RANK": "3", "WORLD_SIZE": "8"}) == RankOf(rank=0, world=1)


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (0, 2)])
def test_the_manifest_states_the_number_of_ranks(tmp_path: Path, rank: int, world: int) -> None:
    model = ScriptedModel()
    with observatory.watch(
        model, tmp_path / "r", adapters=[scripted_adapter(3)], rank=rank, world=world
    ) as watch:
        model([ids([0])])
        watch.step()
    assert observatory.open_run(tmp_path / "r").manifest.topology.ranks == world

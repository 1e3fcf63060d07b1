"""Several ranks write one run; their model is wrapped as it is in training."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import observatory
from observatory.host.ranks import RankOf, find_rank
from observatory.probes.watch import Watch
from observatory.run import RunWriter
from observatory.run.manifest import Manifest, ModelSpec, Topology
from tests.probes.spawned import run_ranks
from tests.probes.tiny import ScriptedModel, ids, scripted_adapter

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ranks")
    codes = run_ranks("tests.probes.writing_cases", out, world=2, timeout_s=400)
    said = "\n".join((out / f"rank-{rank}.log").read_text(encoding="utf-8")[-1500:] for rank in range(2))
    assert codes == [0, 9], said
    return out


def test_two_gloo_ranks_write_one_run(ranks: Path) -> None:
    run = observatory.open_run(ranks / "lives")
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


def test_a_rank_that_dies_leaves_the_data_of_the_other(ranks: Path) -> None:
    run = observatory.open_run(ranks / "dies")
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

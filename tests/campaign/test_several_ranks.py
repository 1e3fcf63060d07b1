"""Commands under a launcher that has started several ranks, where one process or ``--ep`` is meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from observatory.campaign.ranks import requested_ep
from observatory.cli import main
from observatory.errors import RunError
from observatory.run import RunWriter
from observatory.run.manifest import Manifest, ModelSpec
from tests.conftest import MakeRun

LAUNCHED = {
    "torchrun": {
        "TORCHELASTIC_RUN_ID": "r", "RANK": "{}", "WORLD_SIZE": "2", "LOCAL_RANK": "{}",
        "LOCAL_WORLD_SIZE": "2",
    },
    "mpiexec": {
        "OMPI_COMM_WORLD_RANK": "{}", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "{}",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    },
    "srun": {
        "SLURM_STEP_ID": "0", "SLURM_PROCID": "{}", "SLURM_NTASKS": "2", "SLURM_LOCALID": "{}",
        "SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": "2",
    },
}  # fmt: skip
LIGHT = ("--data", "mock", "--batch-size", "1", "--sequence-length", "16", "--steps", "1")


def launch(launcher: str, rank: int, monkeypatch: pytest.MonkeyPatch, **changed: str) -> None:
    """Let this process look like one of two ranks."""
    for name, value in {**LAUNCHED[launcher], **changed}.items():
        monkeypatch.setenv(name, value.format(rank))


def said(capture: pytest.CaptureFixture[str]) -> list[str]:
    return capture.readouterr().err.splitlines()


@pytest.mark.parametrize("launcher", list(LAUNCHED))
def test_a_profile_on_ranks_that_were_not_asked_for_is_refused_by_one_sentence(
    launcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    for rank in (0, 1):
        launch(launcher, rank, monkeypatch)
        assert main(["profile", "tiny-gqa", "--out", str(out), *LIGHT]) == 1
        sentence = (
            f"observatory: {launcher} started 2 ranks, but --ep is not given; give --ep 2 to spread the "
            "experts over them, or --ep 1 to run the whole model on each"
        )
        assert said(capsys) == ([sentence] if rank == 0 else [])
    assert not out.exists()


def test_whole_models_on_several_ranks_are_run_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launch("mpiexec", 1, monkeypatch)
    assert [requested_ep(1), requested_ep(2)] == [1, 2]


ONE_PROCESS = {
    "quickstart": ("quickstart", "--out", "OUT"),
    "grid": ("grid", "grid.toml", "--out", "OUT"),
    "power": ("power", "--out", "OUT"),
    "clocks sweep": ("clocks", "sweep", "--device", "GPU-1", "--out", "OUT"),
    "reuse measure": ("reuse", "measure", "tiny-gqa", "--device", "GPU-1", "--out", "OUT"),
}


@pytest.mark.parametrize("launcher", list(LAUNCHED))
@pytest.mark.parametrize("command", list(ONE_PROCESS))
def test_commands_of_one_process_are_refused_on_several_ranks(
    command: str,
    launcher: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = [str(tmp_path / "out") if word == "OUT" else word for word in ONE_PROCESS[command]]
    fitting = "without the launcher" if command in ("quickstart", "grid") else "with one process on each node"
    for rank in (0, 1):
        launch(launcher, rank, monkeypatch)
        assert main(argv) == 1
        sentence = f"observatory: {command} runs in one process, but {launcher} started 2; run it {fitting}"
        assert said(capsys) == ([sentence] if rank == 0 else [])
    assert not (tmp_path / "out").exists()


def test_a_device_of_each_node_may_be_sampled_under_a_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch("srun", 1, monkeypatch, SLURM_LOCALID="0", SLURM_NODEID="1", SLURM_STEP_TASKS_PER_NODE="1(x2)")
    assert main(["power", "--device", "replay:/nowhere", "--out", str(tmp_path / "out")]) == 1
    assert "neither a run directory nor a file" in said(capsys)[-1]


@pytest.mark.parametrize("rank", [0, 1])
def test_analysis_on_several_ranks_runs_and_one_of_them_says_that_it_is_done_twice(
    rank: int, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch("mpiexec", rank, monkeypatch)
    assert main(["routing", str(make_run())]) == 0
    sentence = (
        "note: routing runs in one process; mpiexec started 2, and each that runs it does the same work"
    )
    assert (sentence in " ".join(said(capsys))) == (rank == 0)


def test_two_processes_that_make_one_run_at_the_same_moment_do_not_mix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have found the place free; one of them makes the run."""
    manifest = Manifest(run_id="r", created_unix_s=1.0, model=ModelSpec(name="m"))
    with RunWriter.create(tmp_path / "run", manifest):
        monkeypatch.setattr("observatory.run.writer.check_free", lambda *_, **__: None)
        monkeypatch.setattr("observatory.run.writer.empty_run", lambda *_: None)
        with pytest.raises(RunError, match="made by another process at this moment"):
            RunWriter.create(tmp_path / "run", manifest)

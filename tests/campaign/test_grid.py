"""Grids: resumable, and one cell's failure is its own."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from observatory.campaign.grid import GridConfig, grid_cells, load_grid, run_grid
from observatory.campaign.job import ProfileOptions
from observatory.campaign.run_folders import expand_runs
from observatory.cli import main
from observatory.errors import DataError, PlacementError, RunError

SMALL = ProfileOptions(batch_size=2, sequence_length=16, steps=2)


def test_a_finished_cell_is_never_run_twice_and_a_changed_option_makes_new_cells(
    foreign_checkpoint: Path, tmp_path: Path
) -> None:
    config = GridConfig(models=(str(foreign_checkpoint),), data=("mock", "prose"), ep=(2, 3), profile=SMALL)
    first = run_grid(config, tmp_path / "grid")
    written = {result.run: (result.run / "run.json").stat().st_mtime_ns for result in first}
    assert [result.state for result in first] == ["done", "done"]
    second = run_grid(config, tmp_path / "grid")
    assert [result.state for result in second] == ["kept", "kept"]
    assert {result.run: (result.run / "run.json").stat().st_mtime_ns for result in second} == written
    longer = config.model_copy(update={"profile": replace(SMALL, steps=3)})
    assert [result.state for result in run_grid(longer, tmp_path / "grid")] == ["done", "done"]
    scan = json.loads((tmp_path / "grid" / "scan.json").read_text())
    assert {row["ep"] for row in scan["rows"]} == {2, 3}
    assert scan["skipped"] == []


def test_an_unfinished_cell_is_run_again(foreign_checkpoint: Path, tmp_path: Path) -> None:
    config = GridConfig(models=(str(foreign_checkpoint),), data=("mock",), ep=(), profile=SMALL)
    (result,) = run_grid(config, tmp_path / "grid")
    manifest = json.loads((result.run / "run.json").read_text())
    (result.run / "run.json").write_text(json.dumps({**manifest, "state": "running"}))
    (again,) = run_grid(config, tmp_path / "grid")
    assert again.state == "done"


def test_a_failing_cell_leaves_the_others_done_and_the_command_says_which(
    foreign_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = tmp_path / "grid.toml"
    grid.write_text(
        f'models = ["{foreign_checkpoint}"]\ndata = ["{tmp_path}/missing.txt", "mock"]\nep = [4]\n'
        "[profile]\nbatch_size = 2\nsequence_length = 16\nsteps = 2\n"
    )
    assert main(["grid", str(grid), "--out", str(tmp_path / "out"), "--json"]) == 1
    captured = capsys.readouterr()
    states = [cell["state"] for cell in json.loads(captured.out)["cells"]]
    assert states == ["failed", "done"]
    assert "missing.txt" in captured.err
    assert len(expand_runs([tmp_path / "out"])) == 1
    # 4 ranks do not divide 6 experts: said in the scan, not guessed
    scan = json.loads((tmp_path / "out" / "scan.json").read_text())
    assert scan["rows"] == []
    assert scan["skipped"][0]["ep"] == 4


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("models = ['a']\ndata = ['b']\nmodles = 3\n", "modles"),
        ("models = []\ndata = ['b']\n", "models"),
        ("models = ['a']\ndata = ['b']\nep = [0]\n", "ep"),
        ("models = ['a']\ndata = ['b']\n[profile]\nsteps = -1\n", "steps"),
        ("models = ['a']\ndata = ['b']\n[profile]\nstesp = 1\n", "stesp"),
        ("models = ['a'\n", "TOML"),
        ("\x00\x01", "TOML"),
    ],
)
def test_a_wrong_grid_file_is_named_with_its_key(text: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "grid.toml").write_text(text)
    with pytest.raises(DataError, match=named):
        load_grid(tmp_path / "grid.toml")


def test_a_model_named_twice_is_refused() -> None:
    with pytest.raises(DataError, match="twice"):
        grid_cells(GridConfig(models=("tiny-gqa", "tiny-gqa"), data=("mock",)))


def test_models_of_one_folder_name_get_cells_of_their_own() -> None:
    config = GridConfig(models=("a/model", "b/model"), data=("mock",))
    names = [cell.name for cell in grid_cells(config)]
    assert len(set(names)) == 2


def test_a_directory_that_is_no_grid_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match="no grid"):
        run_grid(GridConfig(models=("a",), data=("mock",)), tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_index_that_names_runs_elsewhere_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    (tmp_path / "grid.json").write_text(json.dumps({"cells": [{"name": "../../etc"}]}))
    with pytest.raises(RunError, match="no finished run"):
        expand_runs([tmp_path])


def test_the_index_names_every_cell_from_the_start(foreign_checkpoint: Path, tmp_path: Path) -> None:
    config = GridConfig(models=(str(foreign_checkpoint),), data=("mock", "prose"), ep=(), profile=SMALL)
    seen: list[list[str]] = []

    def look(_cell: object, result: object) -> None:
        if result is None:
            index = json.loads((tmp_path / "grid" / "grid.json").read_text())
            seen.append([cell["state"] for cell in index["cells"]])

    run_grid(config, tmp_path / "grid", cell_progress=look)
    assert seen == [["pending", "pending"], ["complete", "pending"]]


def test_a_grid_is_run_by_one_process_at_a_time(foreign_checkpoint: Path, tmp_path: Path) -> None:
    config = GridConfig(models=(str(foreign_checkpoint),), data=("mock",), ep=(), profile=SMALL)

    def start_it_again(_cell: object, result: object) -> None:
        if result is None:
            with pytest.raises(RunError, match="another process"):
                run_grid(config, tmp_path / "grid")

    (result,) = run_grid(config, tmp_path / "grid", cell_progress=start_it_again)
    assert result.state == "done"
    assert [result.state for result in run_grid(config, tmp_path / "grid")] == ["kept"]


def test_new_weights_in_the_same_directory_make_new_cells(tmp_path: Path) -> None:
    checkpoint = tmp_path / "model"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(b"old weights")
    config = GridConfig(models=(str(checkpoint),), data=("mock",))
    folder = checkpoint.stat()
    (before,) = grid_cells(config)
    (checkpoint / "model.safetensors").write_bytes(b"weights trained longer")
    os.utime(checkpoint, ns=(folder.st_atime_ns, folder.st_mtime_ns))
    (after,) = grid_cells(config)
    assert before.name != after.name


def test_a_wrong_placement_file_is_told_before_any_cell_runs(tmp_path: Path) -> None:
    config = GridConfig(models=("tiny-gqa",), data=("mock",), placement=str(tmp_path / "missing.json"))
    with pytest.raises(PlacementError, match=r"missing\.json"):
        run_grid(config, tmp_path / "grid", cell_progress=lambda *_: pytest.fail("a cell was started"))

"""``observatory run``: programs that know nothing of it are watched, and are none the worse for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from observatory.cli import main
from observatory.probes.programs import startup
from observatory.run import Run, open_run
from tests.paths import ROOT

PROGRAM = str(Path(__file__).with_name("program.py"))


def run(out: Path, *command: str, options: tuple[str, ...] = ()) -> int:
    return main(["run", "--out", str(out), *options, "--", *command])


def loads(run: Run) -> dict[str, Counter[int]]:
    found: dict[str, Counter[int]] = {}
    for block in run.iter_loads():
        of_layer = found.setdefault(str(block.layer), Counter())
        for expert, load in enumerate(block.load_SE.sum(axis=0).tolist()):
            of_layer[expert] += load
    return found


def said(document: dict[str, Any]) -> dict[str, Counter[int]]:
    counted = document["counted"].items()
    return {layer: Counter({int(e): n for e, n in of_layer.items()}) for layer, of_layer in counted}


@pytest.mark.slow
def test_a_program_is_counted_exactly_and_keeps_its_output_and_its_code(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('the site was here', flush=True)")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assert run(tmp_path / "run", sys.executable, PROGRAM, "", "--its", "own") == 5
    printed = capfd.readouterr()
    greeting, line = printed.out.splitlines()
    document = json.loads(line)
    assert greeting == "the site was here"
    assert document["argv"][1:] == ["", "--its", "own"]
    assert not set(startup.__path__) & set(document["path"])
    assert f"run written to {tmp_path / 'run'}" in printed.err
    captured = open_run(tmp_path / "run")
    assert captured.problems == ()
    assert captured.manifest.model.name == "Model"
    assert loads(captured) == said(document)
    routed = captured.routed_tokens()
    tokens = routed.groupby(["step", "phase"])["tokens"].sum()
    # Both micro-batches of an optimiser step are one step; each evaluation is one of its own.
    assert [(step, n) for (step, _), n in tokens.items()] == [(0, 10), (1, 10), (2, 10), (3, 3), (4, 3)]
    assert [phase for _, phase in tokens.index][:3] == ["train_forward"] * 3


@pytest.mark.slow
def test_every_second_step_of_training_and_evaluation_is_captured_whole(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "run", sys.executable, PROGRAM, "", options=("--every", "2")) == 5
    capfd.readouterr()
    captured = open_run(tmp_path / "run")
    assert captured.problems == ()
    tokens = captured.routed_tokens()
    assert tokens[["step", "tokens"]].to_numpy().tolist() == [[0, 10], [2, 10], [4, 3]]
    assert "captured were steps 0 to 4, one in 2, as was asked for" in captured.manifest.notes[-1]


@pytest.mark.slow
def test_a_capture_that_nobody_started_leaves_an_empty_run_and_a_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "run", sys.executable, PROGRAM, "", options=("--stopped",)) == 5
    (remark, _) = capfd.readouterr().err.splitlines()
    assert "a model (Model) ran 5 steps, none of which was to be captured" in remark
    captured = open_run(tmp_path / "run")
    assert (captured.row_count("routing"), captured.manifest.state) == (0, "complete")
    assert "no step was captured, as was asked for" in captured.manifest.notes


@pytest.mark.slow
def test_an_exception_ends_the_run_as_failed_and_each_model_has_its_own(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "run", sys.executable, PROGRAM, "raises") == 1
    error = capfd.readouterr().err
    assert "RuntimeError: the program's own error" in error
    first, second = (open_run(tmp_path / name).manifest for name in ("run", "run-2"))
    for manifest in (first, second):
        (rank,) = manifest.ranks
        assert (rank.state, rank.error) == ("failed", "RuntimeError: the program's own error")
        assert manifest.model.name == "Model"
    assert (first.ranks[0].steps, second.ranks[0].steps) == (5, 2)


@pytest.mark.slow
def test_a_killed_program_keeps_what_was_flushed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shell = f"{sys.executable} {PROGRAM} killed"
    assert run(tmp_path / "run", "sh", "-c", shell) == 137
    printed = capfd.readouterr()
    assert f"run written to {tmp_path / 'run'}" in printed.err
    (line,) = [line for line in printed.out.splitlines() if line.startswith("{")]
    captured = open_run(tmp_path / "run")
    assert captured.problems
    of_run, counted = loads(captured), said(json.loads(line))
    # The last step had not ended.
    assert 0 <= counted["0"].total() - of_run["0"].total() <= 6


@pytest.mark.slow
@pytest.mark.parametrize("outer", ["observatory", "launcher"])
def test_ranks_of_a_launcher_make_one_run_of_the_steps_asked_for(
    outer: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    if outer == "observatory":
        code = run(tmp_path / "run", *launcher, PROGRAM, "ranks", options=("--steps", "1:3"))
    else:  # as in `srun observatory run -- python train.py`: once for each rank
        watched = [
            sys.executable,
            "-m",
            "observatory",
            "run",
            "--out",
            str(tmp_path / "run"),
            "--steps",
            "1:3",
        ]
        command = [*launcher, "--no-python", *watched, "--", sys.executable, PROGRAM, "ranks"]
        code = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False).returncode
    assert (code, capfd.readouterr().err.count("run written to")) == (0, 1)
    captured = open_run(tmp_path / "run")
    assert captured.problems == ()
    assert [(rank.rank, rank.state, rank.steps) for rank in captured.manifest.ranks] == [
        (0, "complete", 3),
        (1, "complete", 3),
    ]
    assert sorted(captured.routed_tokens()["step"].unique()) == [1, 2]
    assert "captured were steps 1 to 2, as was asked for" in captured.manifest.notes[-1]
    assert {layer: load.total() for layer, load in loads(captured).items()} == {"0": 80, "1": 80}


@pytest.mark.slow
def test_a_python_without_the_observatory_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "path" / "observatory"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('no such thing here')")
    monkeypatch.setenv("PYTHONPATH", str(broken.parent))
    assert run(tmp_path / "run", sys.executable, PROGRAM, "") == 5
    printed = capfd.readouterr()
    assert "cannot load the observatory: ImportError: no such thing here" in printed.err
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "code", "expected"),
    [
        (("no-such-command",), 127, "no-such-command cannot be started (No such file or directory)"),
        (("/etc/passwd",), 126, "/etc/passwd cannot be started (Permission denied)"),
        (("sh", "-c", "exit 3"), 3, "no run was written: no Python process"),
        (("sh", "-c", "kill -TERM $$"), 143, "no run was written: no Python process"),
    ],
)
def test_what_has_no_model_keeps_its_code(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], command: tuple[str, ...], code: int, expected: str
) -> None:
    assert run(tmp_path / "run", *command) == code
    error = capfd.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--steps", "5:5"), "--steps is '5:5'; expected A:B with A below B"),
        (("--steps", "x"), "--steps is 'x'"),
        (("--stopped", "--steps", "1:2"), "--stopped and --steps exclude each other"),
        (("--max-minutes", "0"), "--max-minutes is 0; expected more than 0"),
        (("--max-minutes", "nan"), "--max-minutes is nan; expected more than 0"),
        (("--control-signal", "KILL"), "--control-signal is 'KILL'; expected one of none, USR1, USR2"),
        (("--power", "maybe"), "--power is 'maybe'; expected one of auto, on, off"),
    ],
)
def test_options_that_mean_nothing_start_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], options: tuple[str, ...], expected: str
) -> None:
    assert run(tmp_path / "run", "touch", str(tmp_path / "started"), options=options) == 1
    assert expected in capfd.readouterr().err
    assert not (tmp_path / "started").exists()


def test_an_existing_run_is_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    assert run(tmp_path / "run", "touch", str(tmp_path / "started")) == 1
    assert "exists and is not empty" in capfd.readouterr().err
    assert not (tmp_path / "started").exists()

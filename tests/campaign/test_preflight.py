"""Mistakes that a glance finds are refused before torch is imported and before any rank is started."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from observatory.campaign.job import ProfileJob
from observatory.campaign.preflight import check_job
from observatory.errors import ObservatoryError
from tests.paths import ROOT

#: Runs a command, some libraries hidden, and says which libraries it has loaded.
WITHOUT = """
import importlib.util, sys
sys.path.insert(0, sys.argv.pop(1))
hidden = sys.argv.pop(1).split(",")
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in hidden else find_spec(name, *rest)
from observatory.cli import main
code = main(sys.argv[1:])
print("loaded:", *({"torch", "transformers", "mpi4py"} & set(sys.modules)))
sys.exit(code)
"""


def refused(*arguments: str, hidden: str = "") -> str:
    """The one line that a command ends with, which has not imported torch."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(ROOT), hidden, *arguments],
        env={**os.environ, "PYTHONPATH": "", "OBSERVATORY_DEBUG": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded:"
    *notes, line = done.stderr.splitlines()
    assert all(note.startswith("failed: ") for note in notes), "no progress bar before a refusal"
    assert line.startswith("observatory: ")
    return line


def skip_where_torch_is_built_for_gpus() -> None:
    torch = find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    if "cuda: Optional[str] = None" not in Path(torch.origin).with_name("version.py").read_text():
        pytest.skip("the installed torch is built for GPUs")


@pytest.fixture
def checkpoint(foreign_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to damage: Mixtral of 6 experts, 128 positions."""
    return Path(shutil.copytree(foreign_checkpoint, tmp_path / "mine"))


def _dense(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    kept = {name: value for name, value in config.items() if "expert" not in name and "router" not in name}
    (path / "config.json").write_text(json.dumps({**kept, "model_type": "llama"}))


def _without_tokenizer(path: Path) -> None:
    for file in path.glob("tokenizer*"):
        file.unlink()


def _without_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def _cut_off(path: Path) -> None:
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[:-10])


def _shard_missing(path: Path) -> None:
    index = {"metadata": {}, "weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_dense, "looks dense: no experts in config.json"),
        (_without_tokenizer, "has no tokenizer"),
        (_without_weights, "has no .safetensors weights"),
        (_cut_off, "cut off"),
        (_shard_missing, "lacks 1 of 2 files of weights, first 'model-00002.safetensors'"),
    ],
)
def test_a_checkpoint_that_cannot_be_run_is_refused(
    damage: Callable[[Path], None], said: str, checkpoint: Path
) -> None:
    check_job(ProfileJob(model=str(checkpoint), sequence_length=16))
    damage(checkpoint)
    with pytest.raises(ObservatoryError, match=said) as refusal:
        check_job(ProfileJob(model=str(checkpoint), sequence_length=16))
    assert refusal.value.of_all_ranks


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ep", "4"], "EP 4 does not divide 6 experts; degrees that fit: 1, 2, 3, 6"),
        (["--ep", "7"], "EP 7 is more ranks than the 6 experts"),
        (["--data", "no/such.txt"], "no data 'no/such.txt'"),
        (["--data", "prosa"], "no data 'prosa'; expected one of prose"),
        (["--sequence-length", "200"], "200 positions per sequence were requested, the model has 128"),
        (["--dtype", "int8"], "unknown dtype"),
    ],
)
def test_options_that_do_not_fit_are_refused_without_torch(
    options: list[str], said: str, foreign_checkpoint: Path, tmp_path: Path
) -> None:
    arguments = ["--sequence-length", "16", *options, "--out", str(tmp_path / "run")]
    assert said in refused("profile", str(foreign_checkpoint), *arguments)
    assert not (tmp_path / "run").exists()


def test_bundled_models_are_checked_as_well(tmp_path: Path) -> None:
    assert "EP 5 does not divide 32 experts" in refused(
        "profile", "tiny-gqa", "--ep", "5", "--out", str(tmp_path / "run")
    )


def test_a_gpu_is_refused_where_torch_is_built_for_cpus(tmp_path: Path) -> None:
    skip_where_torch_is_built_for_gpus()
    assert "built for CPUs only" in refused(
        "profile", "tiny-gqa", "--device", "cuda", "--out", str(tmp_path / "run")
    )


@pytest.mark.parametrize("command", ["profile", "quickstart", "grid"])
def test_missing_libraries_are_one_sentence(command: str, tmp_path: Path) -> None:
    (tmp_path / "grid.toml").write_text('models = ["tiny-gqa", "tiny-mla"]\ndata = ["prose", "code"]\n')
    first = {"profile": ["tiny-gqa"], "quickstart": [], "grid": [str(tmp_path / "grid.toml")]}[command]
    line = refused(command, *first, "--out", str(tmp_path / "out"), hidden="torch,transformers")
    assert "needs torch and transformers, which is not installed; run `pip install" in line


def test_a_taken_place_is_refused_with_the_option_that_replaces_it(tmp_path: Path) -> None:
    (tmp_path / "run.json").touch()
    line = refused("profile", "tiny-gqa", "--out", str(tmp_path))
    assert line.endswith("exists and is not empty; choose another place, or replace it (--force)")


def test_cells_of_a_grid_that_cannot_run_are_stated_without_torch(tmp_path: Path) -> None:
    (tmp_path / "grid.toml").write_text(
        'models = ["tiny-gqa"]\ndata = ["a.txt", "b.txt"]\n[profile]\nsteps = 2\n'
    )
    assert "2 of 2 cells failed" in refused(
        "grid", str(tmp_path / "grid.toml"), "--out", str(tmp_path / "out")
    )


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("reuse measure tiny-gqa --device rapl:x", "torch device 'cuda' was requested"),
        ("reuse measure nonsense --device rapl:x", "no model 'nonsense'"),
        ("reuse measure tiny-gqa --device rapl:x --torch-device cpu --prompt-tokens 5000", "has 4096"),
        ("reuse measure tiny-gqa --device rapl:x --prompt-tokens 4 --fractions 0,.1", "has no room"),
        ("clocks sweep --model nonsense --device GPU-1", "no model 'nonsense'"),
        ("clocks sweep --model tiny-gqa --device GPU-1 --torch-device cpu --context 4096", "has 4096"),
        ("clocks sweep --model tiny-gqa --device GPU-1 --torch-device cpu", "no GPU of this machine"),
        ("bench alltoall --sizes 3x", "is not a size"),
        ("bench alltoall --patterns x", "pattern 'x' is unknown; expected uniform"),
        ("bench alltoall --algorithm x", "algorithm 'x' is unknown; expected flat"),
    ],
)
def test_what_starts_a_model_or_ranks_refuses_without_torch(command: str, said: str, tmp_path: Path) -> None:
    if "cuda" in said:
        skip_where_torch_is_built_for_gpus()
    assert said in refused(*command.split(), "--out", str(tmp_path / "x.json"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("reuse measure tiny-gqa --device rapl:x", "torch and transformers"),
        ("clocks sweep --model tiny-gqa --device GPU-1", "torch and transformers"),
        ("bench alltoall", "torch"),
    ],
)
def test_what_starts_a_model_or_ranks_names_missing_libraries(
    command: str, missing: str, tmp_path: Path
) -> None:
    line = refused(*command.split(), "--out", str(tmp_path / "x.json"), hidden="torch,transformers")
    assert f"needs {missing}, which is not installed; run `pip install" in line


def test_a_dense_model_is_refused_by_the_doctor_too(checkpoint: Path) -> None:
    _dense(checkpoint)
    assert "looks dense: no experts in config.json" in refused("doctor", "--model", str(checkpoint))

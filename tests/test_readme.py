"""The blocks of README.md run as they are written, on a model of the reader's own."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest
import torch

import observatory
from observatory.cli import main
from tests.paths import ROOT

TEXT = (ROOT / "README.md").read_text("utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's folder: a tiny random Mixtral of 16 experts and a text."""
    from transformers import MixtralConfig, MixtralForCausalLM

    folder = tmp_path_factory.mktemp("reader")
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=16, num_experts_per_tok=2, max_position_embeddings=512,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder / "my-moe")
    vocabulary = resources.files("observatory.zoo") / "vocabulary"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        with resources.as_file(vocabulary / name) as source:
            shutil.copy(source, folder / "my-moe" / name)
    (folder / "corpus.txt").write_text(
        "".join(f"Rank {i} sends {i * 37 % 101} tokens. " for i in range(4000))
    )
    return folder


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def commands() -> Iterator[str]:
    """Lines for a shell, but those of make and pip, which the tests themselves were made by."""
    for block in blocks("sh"):
        for line in block.splitlines():
            if line.strip() and not line.lstrip().startswith(("make ", "pip ", "#")):
                yield line


def run(line: str) -> int:
    """Exit code of a command; those of ours run in this process, as imports would take most of the time."""
    program, *arguments = shlex.split(line, comments=True)
    if program == "observatory":
        return main(arguments)
    assert program == "python"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], env=environment, timeout=400, check=False).returncode


@pytest.mark.slow
def test_each_command_runs_as_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    lines = list(commands())
    assert len(lines) >= 12
    for line in lines:
        assert run(line) == 0, (line, capfd.readouterr().err)
    assert (folder / "report.html").stat().st_size > 100_000


@pytest.mark.slow
def test_the_program_runs_as_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(folder)
    model = AutoModelForCausalLM.from_pretrained("my-moe")
    batches = [{"input_ids": torch.randint(4096, (2, 32))} for _ in range(3)]
    (block,) = blocks("python")
    with torch.inference_mode():
        exec(compile(block, "README.md", "exec"), {"model": model, "batches": batches})
    assert "source_rank  expert  load" in capsys.readouterr().out
    assert observatory.open_run("runs/b").manifest.state == "complete"


def test_links_of_the_page_are_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)", TEXT):
        assert target.startswith("http") or (ROOT / target).exists(), target

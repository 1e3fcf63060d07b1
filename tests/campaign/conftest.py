"""A model that is not one of the bundled ones, made on the spot."""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def foreign_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral of 2 layers, 6 experts, top-2, saved as users save theirs."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoints") / "my-mixtral"
    config = MixtralConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=6,
        num_experts_per_tok=2,
        max_position_embeddings=128,
    )
    MixtralForCausalLM(config).save_pretrained(path)
    vocabulary = resources.files("observatory.zoo") / "vocabulary"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        with resources.as_file(vocabulary / name) as source:
            shutil.copy(source, path / name)
    return path


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A text of a few hundred different sentences."""
    path = tmp_path / "text.txt"
    path.write_text(
        "".join(f"Rank {i} sends {i * 37 % 101} tokens to rank {i % 7}. " for i in range(400)),
        encoding="utf-8",
    )
    return path

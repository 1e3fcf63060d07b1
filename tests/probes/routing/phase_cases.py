"""Tiny models and calls for the tests of phases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig

import observatory

PROMPT = torch.arange(1, 6).reshape(1, 5)
ONE = PROMPT[:, :1]
EOS = 31


class Paged:
    """A cache that says nothing."""


def config(top_k: int = 1) -> MixtralConfig:
    return MixtralConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=top_k,
        vocab_size=32,
        pad_token_id=0,
        eos_token_id=EOS,
    )


def mixtral() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config()).eval()


class Watched:
    """Tokens per (layer, phase) and notes about phases of ``calls`` while ``model`` is watched."""

    def __init__(self, path: Path, model: nn.Module, calls: Callable[[], Any], **options: Any) -> None:
        with torch.no_grad(), observatory.watch(model, path, **options) as watch:
            calls()
            watch.step()
        run = observatory.open_run(path)
        self.tokens: Counter[tuple[int, str]] = Counter()
        for block in run.iter_loads():
            self.tokens[block.layer, block.phase] += int(block.tokens_SP.sum())
        self.notes = [note for note in run.manifest.notes if "phase unknown" in note]


def then_decode(call: Callable[..., Any]) -> None:
    """A prompt, and one token with the cache that its call made."""
    cache = call(PROMPT, use_cache=True).past_key_values
    call(ONE, past_key_values=cache)


def generate(model: Any, prompt: torch.Tensor = PROMPT) -> None:
    model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
    )

"""What the GPU suite does to a GPU, in parts that a CPU and the fake driver can run as well.

Nothing here sets anything of a device. Models have the shapes of published ones, random weights, few layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DeepseekV2Config, Qwen3MoeConfig

import observatory
from observatory.analysis.energy import EnergySummary, energy_summary

#: By name: configuration class, its values, all layers of the published model, and its parameters.
SHAPES: dict[str, tuple[type[Any], dict[str, Any], int, float]] = {
    "deepseek-v2-lite": (
        DeepseekV2Config,
        {
            "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
            "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
            "first_k_dense_replace": 1, "num_attention_heads": 16, "num_key_value_heads": 16,
            "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
            "v_head_dim": 128, "topk_method": "greedy", "n_group": None, "topk_group": None,
            "vocab_size": 102_400, "tie_word_embeddings": False,
        },
        27,
        15.7e9,
    ),
    "qwen3-30b-a3b": (
        Qwen3MoeConfig,
        {
            "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
            "num_experts_per_tok": 8, "norm_topk_prob": True, "num_attention_heads": 32,
            "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151_936, "tie_word_embeddings": False,
        },
        48,
        30.5e9,
    ),
}  # fmt: skip


def make_stack(name: str, *, layers: int, device: str, dtype: torch.dtype, **smaller: Any) -> Any:
    """A published shape with so many layers and random weights; ``smaller`` replaces values of the shape."""
    kind, values, _, _ = SHAPES[name]
    torch.manual_seed(0)
    config = kind(**{**values, "num_hidden_layers": layers, **smaller})
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def repeat_for(seconds: float, work: Callable[[], Any]) -> int:
    """Do it again and again for so long, the device's work included; how often."""
    done, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        work()
        done += 1
        if torch.cuda.is_available() and done % 8 == 0:
            torch.cuda.synchronize()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return done


def alternate(
    watch: Any, work: Mapping[str, Callable[[float], Any]], *, seconds: float,
    mean_s: float = 0.4, seed: int = 0,
) -> None:  # fmt: skip
    """Phases in random order and of random length: a square wave that no sensor can fall in step with.

    Args:
        watch: that runs.
        work: by phase, what keeps the device at one power for so many seconds.
        seconds: of all together.
        mean_s: typical length of a phase.
        seed: of the order and the lengths.
    """
    generator = np.random.default_rng(seed)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        phase = str(generator.choice(list(work)))
        with watch.phase(phase):  # type: ignore[arg-type]
            work[phase](mean_s * float(np.exp(0.5 * generator.standard_normal())))
        watch.step()


def decode_step(model: Any, batch: int, context: int, vocabulary: int) -> Callable[[], Any]:
    """One token for each sequence on top of a context that does not grow: every call does the same work."""
    device = next(model.parameters()).device
    ids = torch.randint(0, vocabulary, (batch, context), device=device)
    cache = model(ids, use_cache=True).past_key_values
    token = ids[:, :1]

    def step() -> None:
        model(token, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


def profile_stack(
    model: Any, run: Path, *, device_uuid: str, batch: int, context: int, vocabulary: int, seconds: float
) -> EnergySummary:
    """Prefill, then decode, each long enough to be measured by repetition; what energy it took."""
    device = next(model.parameters()).device
    ids = torch.randint(0, vocabulary, (batch, context), device=device)
    with torch.no_grad():
        step = decode_step(model, batch, context, vocabulary)
        with observatory.watch(model, run, power=[device_uuid]) as watch:

            def one(phase: str, work: Callable[[], Any]) -> None:
                with watch.phase(phase):  # type: ignore[arg-type]
                    work()
                watch.step()

            for phase, work in (("prefill", lambda: model(ids)), ("decode", step)):
                repeat_for(seconds, partial(one, phase, work))
                time.sleep(1.5)
    return energy_summary(observatory.open_run(run))

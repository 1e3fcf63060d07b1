"""A tiny model, vLLM's server on loopback, and what it answers."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LAYERS, EXPERTS, TOP_K = 3, 16, 4
_START_S, _ANSWER_S, _END_S = 900.0, 300.0, 120.0
_SITE = Path(__file__).with_name("site")


def save_model(
    folder: Path, *, layers: int = LAYERS, experts: int = EXPERTS, top_k: int = TOP_K, hidden: int = 64
) -> None:
    """A random Qwen3-MoE whose routers differ from token to token."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(5)
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=hidden, intermediate_size=hidden, moe_intermediate_size=hidden // 2,
        head_dim=64, num_hidden_layers=layers, num_attention_heads=max(2, hidden // 64),
        num_key_value_heads=1, num_experts=experts, num_experts_per_tok=top_k, max_position_embeddings=256,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            torch.nn.init.normal_(weight)
    model.save_pretrained(folder)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the server made of one prompt.

    Attributes:
        prompt: its tokens.
        made: tokens that were generated.
        routes: (prompt + made - 1, LAYERS, TOP_K) the engine's own; None where it returns none.
        cached: tokens of the prompt that were not computed again.
    """

    prompt: tuple[int, ...]
    made: tuple[int, ...]
    routes: NDArray[np.integer] | None
    cached: int


class Server:
    """A server that answers at a port of loopback."""

    def __init__(self, model: Path, port: int) -> None:
        self._model = str(model)
        self._url = f"http://127.0.0.1:{port}"

    def is_up(self) -> bool:
        """Whether it answers."""
        with contextlib.suppress(OSError):
            return bool(urllib.request.urlopen(f"{self._url}/health", timeout=10).status == 200)
        return False

    def complete(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Answer]:
        """Answers to prompts that one request brings, so that the engine has all of them at once."""
        body = {
            "model": self._model, "prompt": [list(prompt) for prompt in prompts], "max_tokens": tokens,
            "temperature": 0, "ignore_eos": True, "return_token_ids": True,
        }  # fmt: skip
        request = urllib.request.Request(
            f"{self._url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=_ANSWER_S) as response:
            document = json.load(response)
        details = document["usage"].get("prompt_tokens_details") or {}
        cached = int(details.get("cached_tokens") or 0)
        assert cached == 0 or len(prompts) == 1  # the sum over all of them is stated
        return [self._answer(choice, cached) for choice in document["choices"]]

    def complete_at_once(self, requests: Sequence[Sequence[Sequence[int]]], tokens: int) -> list[Answer]:
        """The same for several requests side by side."""
        with ThreadPoolExecutor(len(requests)) as pool:
            return [
                answer
                for many in pool.map(lambda one: self.complete(one, tokens), requests)
                for answer in many
            ]

    @staticmethod
    def _answer(choice: Mapping[str, Any], cached: int) -> Answer:
        routes = choice.get("routed_experts")
        return Answer(
            prompt=tuple(choice["prompt_token_ids"]),
            made=tuple(choice["token_ids"]),
            routes=None
            if routes is None
            else np.load(io.BytesIO(base64.b64decode(routes)), allow_pickle=False),
            cached=cached,
        )


@contextlib.contextmanager
def serving(
    model: Path,
    log: Path,
    *options: str,
    prefix: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Run ``vllm serve`` until the block is left, and end it as its user would, by SIGTERM.

    Args:
        model: the model's folder.
        log: where its output goes.
        options: of ``vllm serve``.
        prefix: words before the command.
        environment: variables besides those of this process.
    """
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    command = [
        *prefix, str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--host", "127.0.0.1",
        "--port", str(port), "--skip-tokenizer-init", "--dtype", "float32", "--max-model-len", "128",
        "--max-num-batched-tokens", "32", "--block-size", "32", "--gpu-memory-utilization", "0.3", *options,
    ]  # fmt: skip
    variables = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(log.parent / "cache"),
    }  # fmt: skip
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT,
            env={**os.environ, **variables, **(environment or {})},
        )  # fmt: skip
    server = Server(model, port)
    try:
        until = time.monotonic() + _START_S
        while not server.is_up():
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < until, log.read_text()[-4000:]
            time.sleep(0.5)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def second_runner() -> dict[str, str]:
    """Variables with which vLLM takes its second model runner, the only one that returns routes."""
    path = os.pathsep.join([str(_SITE), os.environ.get("PYTHONPATH", "")])
    return {"TRITON_INTERPRET": "1", "PYTHONPATH": path}

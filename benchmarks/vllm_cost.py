"""What watching costs a vLLM server, in tokens per second of its users.

Protocol: two servers of the same random Qwen3-MoE (16 layers, hidden size 256, 64 experts, top-8) run next to
each other, one of them under ``observatory run``. The same request (a prompt of 16 tokens, 32 tokens
generated, prompts drawn anew each time) goes to one and then to the other, in the order off, on, on, off, so
that one server is idle while the other answers and what drifts falls on both alike. The ratio of a group of
four is that of the sums of times; given are the geometric mean over groups and its 90 % bootstrap interval.

Run, in the environment of ``make test-engines``: ``python -m benchmarks.vllm_cost [--groups 50] [--eager]``.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.interleaved import interleaved
from observatory.run import open_run
from tests.engines.server import save_model, serving

LAYERS, HIDDEN, EXPERTS, TOP_K = 16, 256, 64, 8
PROMPT, TOKENS, VOCABULARY = 16, 32, 256
_WARM_UP = 4


def main() -> None:
    """Print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, default=50)
    parser.add_argument("--eager", action="store_true")
    given = parser.parse_args()
    options = ["--enforce-eager"] if given.eager else []
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "model", layers=LAYERS, experts=EXPERTS, top_k=TOP_K, hidden=HIDDEN)
        watched = [sys.executable, "-m", "observatory", "run", "--out", str(folder / "run"), "--"]
        (folder / "off").mkdir()
        (folder / "on").mkdir()
        with (
            serving(folder / "model", folder / "off" / "log", *options) as off,
            serving(folder / "model", folder / "on" / "log", *options, prefix=watched) as on,
        ):
            chosen = off

            def switch(is_on: bool) -> None:
                nonlocal chosen
                chosen = on if is_on else off

            def block() -> tuple[float, ...]:
                prompt = draw.integers(2, VOCABULARY, PROMPT).tolist()
                start = time.perf_counter()
                chosen.complete([prompt], TOKENS)
                taken.append(time.perf_counter() - start)
                return (taken[-1],)

            taken: list[float] = []
            for is_on in (False, True) * _WARM_UP:
                switch(is_on)
                block()
            taken.clear()
            ((ratio, low, high),) = interleaved(block, switch, groups=given.groups)
        tokens = int(open_run(folder / "run").routed_tokens()["tokens"].sum())
    print(
        json.dumps(
            {
                "machine": platform.processor() or platform.machine(),
                "torch": torch.__version__,
                "eager": given.eager,
                "requests": 4 * given.groups,
                "tokens_captured": tokens,
                "median_request_ms": float(np.median(taken)) * 1e3,
                "time_ratio": ratio,
                "interval_90": [low, high],
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()

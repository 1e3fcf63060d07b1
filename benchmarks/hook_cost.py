"""What watching costs per MoE layer call, compared with the usual ways to look at routing.

Protocol, per call size (decode-like: 8 tokens, prefill-like: 2048 tokens): warm-up of every variant; then
rounds in which every variant runs once, in an order drawn anew each round, on the same model and input. A
variant runs two forward passes and the second is timed: the first one after a profiler is slower whatever
follows it, which must not fall on one variant. Setting up and taking down is not timed. On the CPU the clock
is the thread's processor time and torch uses one thread, so that other programs disturb less; on a GPU it is
the wall clock between synchronisations. ``hook alone`` is our hook called by itself, over and over, on the
arguments of a real call: the median of 300. Between the layers of a model its code is cold and costs more.
The cost of a variant is the median over rounds of (its time - the plain time of the same round) / MoE layers;
the interval is the distribution-free 95 % interval of that median. Variants:

    watch           our hooks, counts only; the copy at the end of a step is timed on its own
    watch_all       our hooks with gate mass and samples of 64 tokens
    router_logits   the model's own ``output_router_logits=True`` (logits kept, nothing counted)
    profiler        torch.profiler on the CPU (and GPU), without reading its result

Run: ``python -m benchmarks.hook_cost [--rounds 60] [--json FILE]``.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from observatory.probes.options import RoutingOptions
from observatory.probes.routing.discover import find_sites
from observatory.probes.routing.probe import RoutingProbe

LAYERS, EXPERTS, TOP_K, HIDDEN = 4, 64, 4, 64
SIZES = {"decode": (8, 1), "prefill": (1, 2048)}


def tiny_model(device: str) -> Any:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        moe_intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        vocab_size=512,
    )
    return AutoModelForCausalLM.from_config(config).eval().to(device)


@contextmanager
def attached(probe: RoutingProbe) -> Iterator[None]:
    probe.attach()
    try:
        yield
    finally:
        probe.detach()


def profiled() -> AbstractContextManager[Any]:
    return torch.profiler.profile()


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def measure(model: Any, shape: tuple[int, int], rounds: int, device: str) -> dict[str, Any]:
    """Raw and summarised times of every variant for one call size."""
    ids = torch.randint(0, 512, shape, device=device)
    sites = find_sites(model)
    clock_ns = time.thread_time_ns if device == "cpu" else time.perf_counter_ns
    probes = {
        "watch": RoutingProbe(model, sites),
        "watch_all": RoutingProbe(model, sites, RoutingOptions(gate_mass=True, sample_tokens=64)),
    }
    setups: dict[str, tuple[Callable[[], AbstractContextManager[Any]], dict[str, Any]]] = {
        "plain": (nullcontext, {}),
        "watch": (lambda: attached(probes["watch"]), {}),
        "watch_all": (lambda: attached(probes["watch_all"]), {}),
        "router_logits": (nullcontext, {"output_router_logits": True}),
        "profiler": (profiled, {}),
    }
    names = list(setups)
    order = np.random.default_rng(0)
    times_us: dict[str, list[float]] = {name: [] for name in names}
    steps_us: list[float] = []
    for number in range(-3, rounds):
        for name in order.permutation(names):
            setup, options = setups[name]
            with setup():
                model(ids, use_cache=False, logits_to_keep=1, **options)
                synchronise(device)
                start_ns = clock_ns()
                model(ids, use_cache=False, logits_to_keep=1, **options)
                synchronise(device)
                taken_us = (clock_ns() - start_ns) / 1000
            if number >= 0:
                times_us[name].append(taken_us)
        start_ns = clock_ns()
        probes["watch"].take(step=0, stated_phase=None, ends_step=True)
        steps_us.append((clock_ns() - start_ns) / 1000)
        probes["watch_all"].take(step=0, stated_phase=None, ends_step=True)
    alone_us = {name: hook_alone(model, ids, probe, clock_ns) for name, probe in probes.items()}
    for probe in probes.values():
        probe.release()
    return {
        "tokens": shape[0] * shape[1],
        "forward_us": float(np.median(times_us["plain"])),
        "step_boundary_us": float(np.median(steps_us)),
        "cost_us_per_layer_call": {
            name: per_layer(times_us[name], times_us["plain"]) for name in names if name != "plain"
        },
        "hook_alone_us": alone_us,
        "raw_us": times_us,
    }


def hook_alone(model: Any, ids: torch.Tensor, probe: RoutingProbe, clock_ns: Callable[[], int]) -> float:
    """Median time of our hook on the arguments of a real call of the first MoE layer."""
    module, calls = probe.sites[0].module, list[Any]()
    handle = module.register_forward_pre_hook(lambda *call: calls.append(call), with_kwargs=True)
    model(ids, use_cache=False, logits_to_keep=1)
    handle.remove()
    times_us = []
    with attached(probe):
        (hook,) = module._forward_pre_hooks.values()
        for _ in range(300):
            start_ns = clock_ns()
            hook(*calls[0])
            times_us.append((clock_ns() - start_ns) / 1000)
    probe.take(step=0, stated_phase=None, ends_step=True)
    return float(np.median(times_us))


def per_layer(variant_us: list[float], plain_us: list[float]) -> dict[str, float]:
    """Median of the paired differences per layer and its 95 % interval (binomial order statistics)."""
    difference = np.sort((np.array(variant_us) - np.array(plain_us)) / LAYERS)
    half = 1.96 * np.sqrt(len(difference)) / 2
    middle = len(difference) / 2
    low, high = int(max(0, middle - half)), int(min(len(difference) - 1, middle + half))
    return {
        "median": float(np.median(difference)),
        "low": float(difference[low]),
        "high": float(difference[high]),
        "share_of_forward": float(np.median(difference) * LAYERS / np.median(plain_us)),
    }


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    lines = [f"{'call':8} {'variant':14} {'us per layer call':>18} {'95 % interval':>20} {'of forward':>11}"]
    for size, result in results.items():
        for name, cost in result["cost_us_per_layer_call"].items():
            interval = f"{cost['low']:.1f} .. {cost['high']:.1f}"
            lines.append(
                f"{size:8} {name:14} {cost['median']:18.1f} {interval:>20} {cost['share_of_forward']:11.1%}"
            )
        alone = ", ".join(f"{name} {value:.1f} us" for name, value in result["hook_alone_us"].items())
        lines.append(
            f"{size:8} forward {result['forward_us']:.0f} us, end of a step "
            f"{result['step_boundary_us']:.1f} us, hook alone: {alone}"
        )
    return lines


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=60, help="of prefill; five times as many of decode")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = tiny_model(device)
    results = {
        size: measure(model, shape, options.rounds * (5 if size == "decode" else 1), device)
        for size, shape in SIZES.items()
    }
    print("\n".join(table(results)))
    document = {
        "benchmark": "hook_cost",
        "argv": sys.argv[1:],
        "model": {
            "family": "qwen3_moe",
            "layers": LAYERS,
            "experts": EXPERTS,
            "top_k": TOP_K,
            "hidden": HIDDEN,
        },
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "machine": platform.platform(),
        "threads": 1,
        "rounds": options.rounds,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "results": results,
    }
    if options.json is not None:
        options.json.write_text(json.dumps(document), encoding="utf-8")
    else:
        for result in results.values():
            del result["raw_us"]
        print(json.dumps(document, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

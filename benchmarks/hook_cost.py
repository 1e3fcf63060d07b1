"""What watching costs a forward pass, compared with the usual ways to look at routing.

Protocol, per call size (decode: 8 sequences of one token with 16 tokens in the cache; prefill: 1024 tokens):
on one random Qwen3-MoE two variants alternate in the order A, B, B, A (``interleaved.py``). After a switch
one pass is not timed, then those of the block are: processor time of the thread, one torch thread, CPU. What
is given is the ratio of their times, as geometric mean over groups with its 90 % bootstrap interval.
Switching on and off is not timed. Variants:

    plain          nothing is watched
    watch          all that ``observatory.watch`` attaches, and every pass is a step; without the checks of
                   the first, second, fourth ... call, which ``verification_cost.py`` measures
    pass           the same, but the end of the step is not timed: the hooks alone
    bare hook      a pre-hook on the experts of each layer that adds ids to preallocated counts, no more
    router logits  the model's own ``output_router_logits=True``: logits are kept, nothing is counted
    profiler       ``torch.profiler``, whose result is not read

"In place" is the time inside all hooks of a pass, those on the model included, by layer call: between the
layers of a model, whose weights displace our code and data from the caches. By the wall clock, median of
passes. "Hot" is what the hooks on one layer add to calls of its modules without work, over and over: median
of 300.

Run: ``python -m benchmarks.hook_cost [--groups 40] [--sizes decode prefill] [--only PAIR ...]``.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, Qwen3MoeConfig

from benchmarks.interleaved import interleaved
from observatory.host.provenance import new_manifest
from observatory.host.ranks import RankOf
from observatory.probes.options import RoutingOptions, WatchOptions
from observatory.probes.routing.describe import describe_model
from observatory.probes.routing.discover import find_sites
from observatory.probes.routing.sites import RoutingSite
from observatory.probes.session import CaptureSession
from observatory.run import RunWriter

LAYERS, EXPERTS, TOP_K, HIDDEN, CACHED = 16, 64, 8, 256, 16
#: Shape of the ids and passes of a block.
SIZES = {"decode": ((8, 1), 4), "prefill": ((1, 1024), 1)}


def random_model(*, layers: int, hidden: int, top_k: int) -> Any:
    """A Qwen3-MoE of 64 experts with random weights, in evaluation mode."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=hidden,
        intermediate_size=hidden,
        moe_intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        num_experts=EXPERTS,
        num_experts_per_tok=top_k,
        vocab_size=512,
    )
    return AutoModelForCausalLM.from_config(config).eval()


class Plain:
    """One pass of the model, timed; what is on and off is for subclasses to say.

    Attributes:
        options: keyword arguments of the pass.
        around: a context around the passes of a block, its entering and leaving untimed.
    """

    options: ClassVar[dict[str, Any]] = {}
    around: Callable[[], AbstractContextManager[Any]] = nullcontext

    def switch(self, is_on: bool) -> None:
        """Put what is compared on or take it off."""

    def end_step(self) -> None:
        """What follows each pass."""


class RouterLogits(Plain):
    """The model's own way."""

    options: ClassVar[dict[str, Any]] = {"output_router_logits": True}


class Profiler(Plain):
    """A tool that sees every operator."""

    around = staticmethod(torch.profiler.profile)


class BareHook(Plain):
    """Adds the ids of each call to counts that are there already, and does nothing else."""

    def __init__(self, sites: list[RoutingSite], ids_per_call: int) -> None:
        self._modules = [site.module for site in sites]
        self._counts_LE = torch.zeros(len(sites), EXPERTS, dtype=torch.int64)
        self._ones = torch.ones(ids_per_call, dtype=torch.int64)
        self._handles: list[Any] = []

    def switch(self, is_on: bool) -> None:
        """Put the hooks on or take them off."""
        while self._handles:
            self._handles.pop().remove()
        if is_on:
            for module, counts_E in zip(self._modules, self._counts_LE, strict=True):
                self._handles.append(module.register_forward_pre_hook(self._hook(counts_E, self._ones)))

    @staticmethod
    def _hook(counts_E: torch.Tensor, ones: torch.Tensor) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            counts_E.scatter_add_(0, args[1].view(-1), ones)

        return hook


class Watch(Plain):
    """One capture over all groups, paused where it is off: its first calls, which are verified, are over."""

    def __init__(self, model: nn.Module, sites: list[RoutingSite], folder: Path) -> None:
        self._steps = 0
        manifest = new_manifest(model=describe_model(model, name="random", sites=sites))
        self._writer = RunWriter.create(folder, manifest)
        self.session = CaptureSession(
            model,
            sites,
            self._writer,
            WatchOptions(where=RankOf(rank=0, world=1), routing=RoutingOptions(verify="none")),
            exchanges=False,
            store=None,
            situation=lambda: (self._steps, None),
        )
        self.session.pause()

    def switch(self, is_on: bool) -> None:
        """Resume the capture or pause it."""
        if is_on:
            self.session.resume(self._steps)
        else:
            self.session.pause()

    def end_step(self) -> None:
        """What ``watch.step()`` does."""
        self.session.boundary(self._steps, phase=None, ends_step=True)
        self._steps += 1
        self.session.check()

    def close(self) -> dict[str, Any]:
        """End the capture; what it states of its own cost."""
        self.session.stop(self._steps, phase=None, failed=False)
        cost: Any = self.session.config()["probe_cost"]
        self._writer.close()
        return dict(cost)


class Bench:
    """Passes of one size on one model."""

    def __init__(self, model: Any, shape: tuple[int, int], passes: int) -> None:
        self.model, self.passes = model, passes
        self.ids = torch.randint(0, 512, shape)
        self.plain_us: list[float] = []
        self._cache: DynamicCache | None = None
        if shape[1] == 1:
            self._cache = DynamicCache(config=model.config)
            model(torch.randint(0, 512, (shape[0], CACHED)), past_key_values=self._cache, use_cache=True)

    def compare(self, on: Plain, off: Plain, groups: int) -> list[tuple[float, float, float]]:
        """Ratios of ``on`` over ``off``: by the pass with the end of its step, and by the pass alone."""
        chosen = off

        def switch(is_on: bool) -> None:
            nonlocal chosen
            chosen.switch(False)
            chosen = on if is_on else off
            chosen.switch(True)

        def block() -> tuple[float, float]:
            whole_us, pass_us = self._block(chosen)
            if type(chosen) is Plain:
                self.plain_us.append(pass_us / self.passes)
            return whole_us, pass_us

        for is_on in (False, True):
            switch(is_on)
            block()
        ratios = interleaved(block, switch, groups=groups)
        switch(False)
        off.switch(False)
        return ratios

    def _block(self, variant: Plain) -> tuple[float, float]:
        whole_ns = pass_ns = 0
        with variant.around():
            for number in range(-1, self.passes):
                whole, alone = self._pass(variant)
                if number >= 0:
                    whole_ns += whole
                    pass_ns += alone
        return whole_ns / 1000, pass_ns / 1000

    def _pass(self, variant: Plain) -> tuple[int, int]:
        """Processor time with the end of the step and without, nanoseconds."""
        start_ns = time.thread_time_ns()
        self.model(
            self.ids,
            past_key_values=self._cache,
            use_cache=self._cache is not None,
            logits_to_keep=1,
            **variant.options,
        )
        after_pass_ns = time.thread_time_ns()
        variant.end_step()
        after_step_ns = time.thread_time_ns()
        if self._cache is not None:
            self._cache.crop(-self.ids.shape[1])
        return after_step_ns - start_ns, after_pass_ns - start_ns

    def in_place_us(self, variant: Plain, passes: int) -> float:
        """Median over passes of the time inside hooks, by layer call."""
        variant.switch(True)
        taken_ns = [0]
        hooks = [d for m in self.model.modules() for d in (m._forward_pre_hooks, m._forward_hooks) if d]
        before = [dict(of_module) for of_module in hooks]
        for of_module in hooks:
            of_module.update({number: _timed(hook, taken_ns) for number, hook in of_module.items()})
        sums_us = []
        for _ in range(passes):
            taken_ns[0] = 0
            self._pass(variant)
            sums_us.append(taken_ns[0] / 1000 / LAYERS)
        for of_module, originals in zip(hooks, before, strict=True):
            of_module.update(originals)
        variant.switch(False)
        return float(np.median(sums_us))

    def hot_us(self, watch: Watch, site: RoutingSite) -> float:
        """Median time of our hooks around one layer, called over and over."""
        assert site.block is not None
        modules, calls = (site.block, site.module), list[tuple[Any, Any]]()
        handles = [
            m.register_forward_pre_hook(
                lambda _m, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
            )
            for m in modules
        ]
        self._block(Plain())
        for handle in handles:
            handle.remove()
        taken_us: dict[bool, list[float]] = {True: [], False: []}
        for is_on, times in taken_us.items():
            watch.switch(is_on)
            with _without_work(modules):
                for _ in range(300):
                    start_ns = time.thread_time_ns()
                    for module, (args, kwargs) in zip(modules, calls, strict=False):
                        module(*args, **kwargs)
                    times.append((time.thread_time_ns() - start_ns) / 1000)
        return float(np.median(taken_us[True]) - np.median(taken_us[False]))


def _timed(hook: Callable[..., Any], taken_ns: list[int]) -> Callable[..., Any]:
    def timed(*call: Any) -> Any:
        start_ns = time.perf_counter_ns()
        result = hook(*call)
        taken_ns[0] += time.perf_counter_ns() - start_ns
        return result

    return timed


@contextmanager
def _without_work(modules: tuple[nn.Module, ...]) -> Iterator[None]:
    """Calls of the modules run their hooks and nothing else."""
    for module in modules:
        module.forward = lambda *_args, **_kwargs: None
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def measure(size: str, groups: int, chosen: list[str]) -> dict[str, Any]:
    """Ratios and times of one call size."""
    shape, passes = SIZES[size]
    model = random_model(layers=LAYERS, hidden=HIDDEN, top_k=TOP_K)
    sites = list(find_sites(model))
    bench = Bench(model, shape, passes)
    bare, plain = BareHook(sites, shape[0] * shape[1] * TOP_K), Plain()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        watch = Watch(model, sites, Path(folder) / "run")
        pairs: dict[str, tuple[Plain, Plain]] = {
            "watch / plain": (watch, plain),
            "watch / bare hook": (watch, bare),
            "bare hook / plain": (bare, plain),
            "router logits / plain": (RouterLogits(), plain),
            "profiler / plain": (Profiler(), plain),
        }
        for name, (on, off) in pairs.items():
            if not chosen or name in chosen:
                whole, alone = bench.compare(on, off, max(2, groups // 8) if name[0] == "p" else groups)
                found[name] = {"ratio": whole}
                if on is watch:
                    found[name]["pass"] = alone
        in_place_us = {
            name: bench.in_place_us(variant, groups) for name, variant in (("watch", watch), ("bare", bare))
        }
        hot_us = bench.hot_us(watch, sites[0])
        stated = watch.close()
    return {
        "tokens": shape[0] * shape[1],
        "plain_pass_us": float(np.median(bench.plain_us)) if bench.plain_us else None,
        "in_place_us": in_place_us,
        "hot_us": hot_us,
        "stated_by_the_run": stated,
        "compared": found,
    }


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """Lines for people."""
    lines = []
    for size, result in results.items():
        lines.append(f"{size}: {result['tokens']} tokens, plain pass {result['plain_pass_us']} us")
        for name, found in result["compared"].items():
            lines += [
                f"  {name + (' (pass)' if kind == 'pass' else ''):30} "
                f"{found[kind][0]:.4f} ({found[kind][1]:.4f} to {found[kind][2]:.4f})"
                for kind in ("ratio", "pass")
                if kind in found
            ]
        in_place = ", ".join(f"{name} {value:.1f} us" for name, value in result["in_place_us"].items())
        lines.append(f"  in place: {in_place}")
        lines.append(f"  hot: {result['hot_us']:.1f} us; stated by the run: {result['stated_by_the_run']}")
    return lines


@torch.inference_mode()
def main() -> int:
    """Print a table, and write or print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--groups", type=int, default=40, help="of decode; an eighth of it of the profiler")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--only", nargs="+", default=[], metavar="PAIR", help='such as "watch / plain"')
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {size: measure(size, options.groups, options.only) for size in options.sizes}
    print("\n".join(table(results)))
    document = {
        "benchmark": "hook_cost",
        "argv": sys.argv[1:],
        "model": {"layers": LAYERS, "experts": EXPERTS, "top_k": TOP_K, "hidden": HIDDEN},
        "machine": platform.platform(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "results": results,
    }
    if options.json is not None:
        options.json.write_text(json.dumps(document, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What ranks do in the tests of expert parallelism; ``python -m tests.collectives.cases OUT.json`` runs all.

Every case compares with the unsharded model of the same weights, on inputs that differ from rank to rank.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import observatory
from observatory.collectives.dispatch import Algorithm
from observatory.collectives.expert_parallel import shard_experts
from observatory.collectives.transport.base import BaseTransport, agree
from observatory.collectives.transport.open import open_transport
from observatory.errors import ObservatoryError, RunError
from observatory.probes.exchange.labels import MemorySink
from observatory.zoo.models import bundled_models, load_model
from tests.collectives.forked import Forked
from tests.probes.routing.families import VOCABULARY, tiny_inputs, tiny_model

WORLDS = (1, 2, 4, 8)
#: stacked experts with gates, without, with biases, with a norm behind, with top-1 and skipped tokens, ...
FAMILIES = (
    "mixtral",
    "gpt_oss",
    "qwen3_moe",
    "qwen2_moe",
    "deepseek_v3",
    "olmoe",
    "granitemoe",
    "nemotron_h",
    "muse_spark",
    "zaya",
    "ernie4_5_moe",
    "step3p7",
)
VARIANTS: tuple[tuple[Algorithm, bool], ...] = (
    ("flat", False),
    ("flat", True),
    ("hierarchical", False),
    ("hierarchical", True),
    ("gather", False),
)
Difference = dict[str, float]
#: when a lost rank is given up: long enough for busy machines
LOST_S = 6.0


def models(families: tuple[str, ...] = FAMILIES) -> dict[str, nn.Module]:
    """The bundled models and tiny ones of other families."""
    made = {m.name: load_model(m.name).model.eval() for m in bundled_models()}
    return made | {family: tiny_model(family) for family in families}


def inputs_of(model: nn.Module, rank: int) -> dict[str, Any]:
    """Inputs that only this rank has; ranks have different numbers of tokens."""
    inputs = tiny_inputs(model, batch=1 + rank % 2, length=10 + rank)
    limit = min(VOCABULARY, model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
    generator = torch.Generator().manual_seed(100 + rank)
    ids = torch.randint(3, limit, inputs["input_ids"].shape, generator=generator)
    inputs["input_ids"] = ids
    if "decoder_input_ids" in inputs:
        inputs["decoder_input_ids"] = ids[:, :5]
    return inputs


def difference(found: torch.Tensor, expected: torch.Tensor) -> Difference:
    """Largest absolute difference, and that relative to the largest expected value."""
    if not expected.numel():
        return {"absolute": 0.0, "relative": 0.0}
    absolute = (found - expected).abs().max().item()
    scale = expected.abs().max().item()
    return {"absolute": absolute, "relative": absolute / scale if scale else absolute}


def forward(
    model: nn.Module, transport: BaseTransport, algorithm: Algorithm, deduplicate: bool
) -> Difference:
    inputs = inputs_of(model, transport.rank)
    with torch.no_grad():
        expected = model(**inputs)[0]
        with shard_experts(model, transport, algorithm=algorithm, deduplicate=deduplicate) as sharded:
            return difference(sharded(**inputs)[0], expected)


def backward(
    model: nn.Module, transport: BaseTransport, algorithm: Algorithm, deduplicate: bool
) -> Difference:
    """Gradients by the tokens of all ranks: complete for this rank's experts, a share of everything else."""
    everybody = gradients(model, transport.size)
    worst = 0.0
    with shard_experts(model, transport, algorithm=algorithm, deduplicate=deduplicate) as sharded:
        loss(sharded, model, transport.rank).backward()  # type: ignore[no-untyped-call]
        for layer in sharded.layers:
            here = list(layer.experts.experts_here)
            for name, parameter in layer.local.named_parameters(recurse=False):
                mine = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                full = everybody[f"{layer.site.spec.module}.{name}"][here]
                worst = max(worst, difference(mine, full)["relative"])
        replicated = {id(p) for p in sharded.replicated_parameters()}
        names = [name for name, parameter in model.named_parameters() if id(parameter) in replicated]
        parameters = dict(model.named_parameters())
        summed = sum_over_ranks([parameters[name] for name in names], transport)
        for name, gradient in zip(names, summed, strict=True):
            worst = max(worst, difference(gradient.reshape(-1), everybody[name].reshape(-1))["relative"])
    model.zero_grad()
    return {"absolute": worst, "relative": worst}


def sum_over_ranks(parameters: list[nn.Parameter], transport: BaseTransport) -> list[torch.Tensor]:
    """Gradients of parameters that all ranks hold, flat, summed over the ranks."""
    here = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters])
    everybody = transport.all_gather_v(here.unsqueeze(0), [1] * transport.size).sum(dim=0)
    return list(torch.split(everybody, [p.numel() for p in parameters]))


@cache
def gradients(model: nn.Module, world: int) -> dict[str, torch.Tensor]:
    """Gradients of the whole model by the tokens of all ranks."""
    model.requires_grad_(True)
    everybody: dict[str, torch.Tensor] = {}
    for source in range(world):
        model.zero_grad()
        loss(model, model, source).backward()  # type: ignore[no-untyped-call]
        for name, parameter in model.named_parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
            everybody[name] = everybody.get(name, torch.zeros_like(gradient)) + gradient
    model.zero_grad()
    return everybody


def loss(call: Any, model: nn.Module, rank: int) -> torch.Tensor:
    logits: torch.Tensor = call(**inputs_of(model, rank))[0]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(rank))
    return (logits * weights).sum()


def patterns(experts: int, top_k: int, rank: int, world: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and expert ids (T, K) of this rank."""
    generator = torch.Generator().manual_seed(rank)
    some = torch.rand(17 + 5 * rank, experts, generator=generator).topk(top_k).indices
    yield "uneven", some
    yield "all to one expert", torch.zeros(6, 1, dtype=torch.int64)
    yield "one rank sends", some if rank == world - 1 else some[:0]
    yield "only to the last rank", (some * 0 + experts - 1)[:, :1]
    yield "nobody has tokens", some[:0]
    yield "padding only", torch.full((4, top_k), -1)
    yield "some padding", torch.where(torch.rand(some.shape, generator=generator) < 0.5, some, experts + 3)


def traffic(model: nn.Module, transport: BaseTransport) -> dict[str, float]:
    """Worst relative difference per pattern of traffic, forward and backward, over all algorithms."""
    worst: dict[str, float] = {}
    by_hand_once: dict[str, list[torch.Tensor]] = {}
    for algorithm, deduplicate in VARIANTS:
        with shard_experts(model, transport, algorithm=algorithm, deduplicate=deduplicate) as sharded:
            layer = sharded.layers[0]
            experts = layer.site.spec.experts
            for name, ids_TK in patterns(experts, 2, transport.rank, transport.size):
                torch.manual_seed(transport.rank)
                hidden = torch.randn(ids_TK.shape[0], 32, requires_grad=True)
                weights = torch.rand(ids_TK.shape, requires_grad=True)
                found = layer.site.module(hidden, ids_TK, weights)
                mine = [found, *torch.autograd.grad(found.square().sum(), (hidden, weights))]
                if name not in by_hand_once:
                    right = by_hand(layer.site.module, hidden, ids_TK, weights)
                    by_hand_once[name] = [
                        right,
                        *torch.autograd.grad(right.square().sum(), (hidden, weights)),
                    ]
                for one, other in zip(mine, by_hand_once[name], strict=True):
                    worst[name] = max(worst.get(name, 0.0), difference(one, other)["relative"])
    return worst


def by_hand(
    module: nn.Module, hidden: torch.Tensor, ids_TK: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """A gated expert layer, written out one assignment after the other."""
    up, down = module.gate_up_proj.detach(), module.down_proj.detach()  # type: ignore[operator]
    out = hidden.sum() * 0 + weights.sum() * 0 + torch.zeros_like(hidden)
    for token, ids in enumerate(ids_TK.tolist()):
        for place, expert in enumerate(ids):
            if 0 <= expert < up.shape[0]:
                gate, value = (up[expert] @ hidden[token]).chunk(2)
                one = down[expert] @ (nn.functional.silu(gate) * value)
                row = torch.zeros(hidden.shape[0], 1)
                row[token] = 1
                out = out + row * one * weights[token, place]
    return out


def placements(model: nn.Module, transport: BaseTransport) -> dict[str, Any]:
    """Differences with experts placed anyhow, and where the rows of a replicated expert went."""
    world = transport.size
    named: dict[str, list[Any]] = {
        "round robin": [expert % world for expert in range(8)],
        "all on the last rank": [world - 1] * 8,
        "expert 0 everywhere": [list(range(world)), *[expert % world for expert in range(1, 8)]],
    }
    outcome: dict[str, Any] = {}
    for name, placement in named.items():
        sink = MemorySink()
        inputs = inputs_of(model, transport.rank)
        with torch.no_grad():
            expected = model(**inputs)[0]
            with shard_experts(model, transport, placement=placement, sink=sink) as sharded:
                outcome[name] = difference(sharded(**inputs)[0], expected)
                if name == "expert 0 everywhere":
                    ids = torch.zeros(5, 1, dtype=torch.int64)
                    sharded.layers[0].site.module(torch.ones(5, 32), ids, torch.ones(5, 1))
                    sent = [e for e in sink.exchanges if e.role == "dispatch"][-1].send_bytes
                    outcome["replica bytes"] = list(sent)
    everywhere = [list(range(world))] * 8
    shares = {layer: [[2 / (world + 1), *[1 / (world + 1)] * (world - 1)]] * 8 for layer in (0, 1)}
    with torch.no_grad(), shard_experts(model, transport, placement=everywhere, shares=shares) as sharded:
        outcome["by shares"] = difference(sharded(**inputs)[0], expected)
    return outcome


def disagreements(model: nn.Module, transport: BaseTransport) -> dict[str, str]:
    """The errors on this rank when the ranks do not do the same."""
    outcome: dict[str, str] = {}
    try:
        agree(transport, {"the number of MoE layers": 2 + (transport.rank == 1)})
    except ObservatoryError as error:
        outcome["layers"] = str(error)
    try:
        shard_experts(model, transport, deduplicate=transport.rank == 1)
    except ObservatoryError as error:
        outcome["options"] = str(error)
    for algorithm in ("flat", "gather"):
        with shard_experts(model, transport, algorithm=algorithm) as sharded:
            layer = sharded.layers[transport.rank % 2]
            try:
                layer.site.module(torch.ones(1, 32), torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2))
            except ObservatoryError as error:
                outcome[algorithm] = str(error)
    return outcome


def large_counts(transport: BaseTransport) -> list[int]:
    """Counts beyond 32 bits, as each rank tells the others: its rank plus 1, times 2^40."""
    outcome = torch.full((transport.size,), (transport.rank + 1) << 40, dtype=torch.int64)
    return list(transport.exchange_counts(outcome).tolist())


def rank_work(made: dict[str, nn.Module], rank: int, world: int) -> dict[str, Any]:
    """All cases of one rank; the same sequence of exchanges on all of them."""
    nodes = 2 if world > 1 else None
    outcome: dict[str, Any] = {"rank": rank, "forward": {}, "backward": {}}
    with open_transport(timeout_s=60, ranks_per_node=nodes) as transport:
        for name, model in made.items():
            full = name in ("mixtral", "tiny-mla")
            for algorithm, deduplicate in VARIANTS if full else VARIANTS[:1]:
                key = f"{name} {algorithm}{' deduplicated' if deduplicate else ''}"
                outcome["forward"][key] = forward(model, transport, algorithm, deduplicate)
        for name in ("mixtral", "gpt_oss", "deepseek_v3", "muse_spark"):
            for algorithm, deduplicate in VARIANTS if name == "mixtral" else VARIANTS[:1]:
                key = f"{name} {algorithm}{' deduplicated' if deduplicate else ''}"
                outcome["backward"][key] = backward(made[name], transport, algorithm, deduplicate)
        outcome["traffic"] = traffic(made["mixtral"], transport)
        outcome["large counts"] = large_counts(transport)
        outcome["placements"] = placements(made["mixtral"], transport)
        if world == 2:
            outcome["disagreements"] = disagreements(made["mixtral"], transport)
        sink = MemorySink()
        with torch.no_grad(), shard_experts(made["mixtral"], transport, sink=sink) as sharded:
            sharded(**inputs_of(made["mixtral"], rank))
        outcome["spans"] = [[span.name, span.layer] for span in sink.spans]
        outcome["bytes"] = [[e.role, e.layer, e.send_bytes, e.receive_bytes] for e in sink.exchanges]
    return outcome


def lost_work(how: str, rank: int) -> str:
    """Rank 2 of 3 is lost in some way; the others return their errors."""
    if how == "never joins" and rank == 2:
        time.sleep(3 * LOST_S)
    with open_transport(timeout_s=LOST_S) as transport:
        transport.barrier()
        if rank == 2:
            if how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "hangs":
                os.kill(os.getpid(), signal.SIGSTOP)
            if how == "ends early":
                return "left"
            if how == "fails":
                raise ObservatoryError("disk full on rank 2")
        for _ in range(3):
            transport.exchange_counts(torch.ones(3, dtype=torch.int64))
    return "done"


def await_rows(out: str, rank: int, *, steps: set[int]) -> None:
    """Wait until the routing rows of these steps of this rank are on disk."""
    deadline = time.monotonic() + 30.0
    while time.monotonic() < deadline:
        time.sleep(0.1)
        try:
            loads = observatory.open_run(out).expert_load()
        except RunError:  # no part is there yet
            continue
        if steps <= set(loads[loads.source_rank == rank].step):
            return


def lost_run(how: str, out: str, rank: int) -> str:
    """Both of 2 ranks watch a sharded model; after three steps rank 1 dies, or finds its disk full."""
    model = tiny_model("mixtral")
    with (
        open_transport(timeout_s=LOST_S) as transport,
        torch.no_grad(),
        shard_experts(model, transport) as sharded,
        observatory.watch(model, out, flush_s=0.05, exchanges=True) as watch,
    ):
        sharded.report_to(watch.exchange_sink)
        for step in range(40):
            sharded(**inputs_of(model, rank))
            watch.step()
            if step == 2:
                await_rows(out, rank, steps={0, 1, 2})
                transport.barrier(40.0)
                if rank == 1 and how == "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                if rank == 1:  # writing beyond this many bytes of a file fails, like a full disk
                    sys.dont_write_bytecode = True  # Python keeps files of bytecode that were cut off
                    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
            time.sleep(0.02)
    return "done"


LOST_RUNS = ("dies", "finds its disk full")
LOSSES = ("dies", "hangs", "never joins", "ends early", "fails")


def main() -> None:
    torch.set_num_threads(1)
    made = models()
    losses = {how: Forked(3, partial(lost_work, how)) for how in LOSSES}
    folder = Path(sys.argv[1]).parent
    lost_runs = {how: Forked(2, partial(lost_run, how, str(folder / how))) for how in LOST_RUNS}
    outcome: dict[str, Any] = {
        str(world): Forked(world, partial(rank_work, made, world=world)).collect(timeout_s=120)
        for world in WORLDS
    }
    outcome["lost"] = {how: forked.collect(timeout_s=5) for how, forked in losses.items()}
    outcome["lost runs"] = {how: forked.collect(timeout_s=5) for how, forked in lost_runs.items()}
    Path(sys.argv[1]).write_text(json.dumps(outcome))


if __name__ == "__main__":
    main()

"""Real ranks that hold different layers, or the same ones: what of their loads adds up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import observatory
from observatory.analysis.routing import layer_metrics
from observatory.probes.routing.describe import layers_now, router_digest
from observatory.probes.routing.discover import find_sites
from observatory.run import Run
from observatory.run.manifest import Verified
from tests.probes.spawned import run_ranks
from tests.probes.tiny import HIDDEN, MoeLayer, RoutedModel, routed_adapter

pytestmark = pytest.mark.slow

TOKENS = 5


def seeded(seed: int, build: Callable[[], nn.Module] = RoutedModel) -> nn.Module:
    torch.manual_seed(seed)
    return build().eval()


def watched(
    path: Path,
    models: Sequence[nn.Module],
    between: Callable[[], None] = lambda: None,
    **options: Any,
) -> Run:
    """A run of ranks that each step once through a model of their own; ``between`` entering and stepping."""
    with ExitStack() as stack:
        watches = [
            stack.enter_context(observatory.watch(model, path, rank=rank, world=len(models), **options))
            for rank, model in enumerate(models)
        ]
        between()
        for watch, model in zip(watches, models, strict=True):
            with torch.no_grad():
                model(torch.randn(TOKENS, HIDDEN))
            watch.step()
    return observatory.open_run(path)


def numbered(model: nn.Module, first: int) -> nn.Module:
    """The model as a pipeline stage whose layers follow ``first`` others."""
    for number, layer in enumerate(model.get_submodule("layers").children()):
        layer.layer_number = first + number + 1  # type: ignore[assignment]
    return model


def assignments(run: Run) -> dict[int, int]:
    return {int(layer): int(rows.load.sum()) for layer, rows in run.expert_load().groupby("layer")}


def test_stages_that_number_their_layers_from_0_are_not_added_up(tmp_path: Path) -> None:
    run = watched(tmp_path / "run", [seeded(0), seeded(1)])
    (problem,) = run.problems
    assert problem.startswith(
        "rank 1 holds another layer 0 (and 1 more) than rank 0: other router weights in layers.0.experts; "
    )
    assert assignments(run) == {0: 2 * TOKENS, 1: 2 * TOKENS}
    assert run.expert_load().source_rank.unique().tolist() == [0]


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: RoutedModel(experts=8), "8 experts, not 4"),
        (lambda: RoutedModel(top_k=1), "top-1, not top-2"),
        (
            lambda: nn.Sequential(*(MoeLayer(4, 2) for _ in range(2))),
            "module 0.experts, not layers.0.experts",
        ),
    ],
)
def test_a_rank_of_another_model_is_stated(tmp_path: Path, build: Callable[[], nn.Module], said: str) -> None:
    run = watched(tmp_path / "run", [seeded(0), seeded(0, build)])
    (problem,) = run.problems
    assert said in problem
    assert assignments(run) == {0: 2 * TOKENS, 1: 2 * TOKENS}


def test_a_run_that_is_not_over_is_read_the_same_way(tmp_path: Path) -> None:
    """A rank that is killed leaves what it stated when its watch began."""
    with ExitStack() as stack:
        for rank in range(2):
            stack.enter_context(observatory.watch(seeded(rank), tmp_path / "run", rank=rank, world=2))
        problems = observatory.open_run(tmp_path / "run").problems
    assert any(problem.startswith("rank 1 holds another layer 0 (and 1 more)") for problem in problems)


def test_stages_that_are_numbered_through_make_one_model(tmp_path: Path) -> None:
    """As Megatron-Core numbers them: each layer states its place in the whole model, counted from 1."""

    run = watched(tmp_path / "run", [numbered(seeded(first), first) for first in (0, 2, 0, 2)])
    assert run.problems == ()
    assert assignments(run) == dict.fromkeys(range(4), 4 * TOKENS)
    assert [(spec.layer, spec.module, spec.top_k) for spec in run.manifest.model.moe_layers] == [
        (0, "layers.0.experts", 2),
        (1, "layers.1.experts", 2),
        (2, "layers.0.experts", 2),
        (3, "layers.1.experts", 2),
    ]
    assert {spec.verified for spec in run.manifest.model.moe_layers} == {Verified(by="rows")}
    assert not layer_metrics(run, bootstrap=0).notes.str.contains("lack some ranks").any()


def test_replicas_add_up_whatever_becomes_of_them(tmp_path: Path) -> None:
    """Equal to begin with and trained apart, or different to begin with and made equal, as DDP does."""
    models = [seeded(0), seeded(0)]
    run = watched(tmp_path / "apart", models, lambda: _noise(models[1]))
    assert (run.problems, assignments(run)) == ((), {0: 4 * TOKENS, 1: 4 * TOKENS})
    models = [seeded(0), seeded(1)]
    run = watched(tmp_path / "synced", models, lambda: _copy(models[0], models[1]))
    assert (run.problems, assignments(run)) == ((), {0: 4 * TOKENS, 1: 4 * TOKENS})


def _copy(source: nn.Module, to: nn.Module) -> None:
    to.load_state_dict(source.state_dict())


def _noise(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ranks")
    codes = run_ranks("tests.probes.routing.stage_cases", out, world=2, timeout_s=120)
    said = "\n".join((out / f"rank-{rank}.log").read_text(encoding="utf-8")[-1500:] for rank in range(2))
    assert codes == [0, 0], said
    return out


def test_processes_of_stages_that_number_from_0_are_not_added_up(processes: Path) -> None:
    run = observatory.open_run(processes / "stages")
    (problem,) = run.problems
    assert problem.startswith("rank 1 holds another layer 0 (and 1 more) than rank 0: other router weights")
    assert assignments(run) == {0: 2 * TOKENS, 1: 2 * TOKENS}


def test_processes_of_stages_that_are_numbered_through_make_one_model(processes: Path) -> None:
    run = observatory.open_run(processes / "through")
    assert run.problems == ()
    assert assignments(run) == dict.fromkeys(range(4), 2 * TOKENS)
    assert [spec.layer for spec in run.manifest.model.moe_layers] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["wrapped_before", "wrapped_inside"])
def test_processes_of_replicas_that_ddp_makes_equal_add_up(processes: Path, name: str) -> None:
    """Each rank initialises its model with a seed of its own."""
    run = observatory.open_run(processes / name)
    assert run.problems == ()
    assert assignments(run) == {0: 4 * TOKENS, 1: 4 * TOKENS}


def digests(model: nn.Module, **options: Any) -> list[str | None]:
    return [router_digest(model, site) for site in find_sites(model, **options)]


def test_a_digest_belongs_to_one_layer_wherever_and_however_it_lies() -> None:
    model = seeded(0)
    first, second = digests(model)
    assert None not in (first, second)
    assert first != second
    assert digests(seeded(0)) == [first, second]
    assert digests(seeded(0), adapters=[routed_adapter()]) == [first, second]
    assert first not in digests(seeded(1))
    transposed = seeded(0)
    for layer in transposed.get_submodule("layers").children():
        router = layer.get_submodule("router")
        router.weight = nn.Parameter(router.weight.detach().t().contiguous().t())
    assert digests(transposed) == [first, second]


def test_every_element_of_a_small_router_takes_part_and_columns_of_a_large_one() -> None:
    model = RoutedModel(layers=1)
    weight = model.layers[0].router.weight
    seen = digests(model)
    for element in range(weight.numel()):
        with torch.no_grad():
            weight.view(-1)[element] += 1
        seen += digests(model)
    assert len(set(seen)) == 1 + weight.numel()
    large = torch.zeros(4, 4096)
    large[:, 1:] = torch.randn(4, 4095)  # rows are a multiple of what is read, and begin alike
    model.layers[0].router.weight = nn.Parameter(large)
    assert None not in digests(model)


class Sharded(torch.Tensor):
    """A tensor class of another library, of which nothing is known here."""


@pytest.mark.parametrize(
    "weight",
    [
        nn.Parameter(torch.zeros(4, HIDDEN)),
        nn.Parameter(torch.randn(2, HIDDEN)),
        nn.Parameter(torch.randn(4 * HIDDEN)),
        nn.Parameter(torch.randn(0)),
        nn.Parameter(torch.randn(4, HIDDEN, device="meta")),
        nn.Parameter(torch.arange(4 * HIDDEN, dtype=torch.uint8).reshape(4, -1), requires_grad=False),
        nn.Parameter(torch.randn(4, HIDDEN).to_sparse(), requires_grad=False),
        nn.Parameter(torch.randn(4, HIDDEN).as_subclass(Sharded)),
        nn.UninitializedParameter(),
    ],
    ids=["constant", "part", "flat", "empty", "meta", "packed", "sparse", "subclass", "lazy"],
)
def test_weights_that_say_nothing_of_the_layer_have_no_digest(weight: nn.Parameter) -> None:
    model = RoutedModel(layers=1)
    (site,) = find_sites(model)
    model.layers[0].router.weight = weight
    assert router_digest(model, site) is None
    (held,) = layers_now(model, [site])
    assert held.router_digests == ()


def test_a_part_that_megatron_calls_one_has_no_digest() -> None:
    model = RoutedModel(layers=1)
    model.layers[0].router.weight.tensor_model_parallel = True
    assert digests(model) == [None]


def test_weights_that_are_sharded_while_they_are_watched_lose_their_digest() -> None:
    model = RoutedModel(layers=1)
    sites = find_sites(model)
    begun = layers_now(model, sites)
    assert len(begun[0].router_digests) == 1
    assert layers_now(model, sites, begun) == begun
    model.layers[0].router.weight = nn.Parameter(torch.randn(2, HIDDEN))
    assert layers_now(model, sites, begun)[0].router_digests == ()

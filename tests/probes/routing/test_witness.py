"""What is counted is what the experts compute, or the model is refused."""

# ruff: noqa: PT012  # what is raised is raised by the end of the whole block

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import observatory
from observatory.errors import ModelError
from observatory.probes.routing.discover import find_sites
from observatory.probes.routing.witness import RowsOfExperts, chosen_by_intervention
from tests.probes.routing.homemade import HIDDEN, Stack, StackedExperts
from tests.probes.tiny import assert_untouched

EXPERTS, TOP_K = 4, 2

#: (block, probabilities (T, E)) -> (weights (T, K), ids (T, K))
Choose = Callable[["OpenMoe", torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def best(block: OpenMoe, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return scores.topk(block.top_k)


def noisy(block: OpenMoe, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (scores + torch.randn_like(scores)).topk(block.top_k) if block.training else best(block, scores)


def biased(block: OpenMoe, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ids = (scores + block.correction).topk(block.top_k).indices
    return scores.gather(-1, ids), ids


def over_a_threshold_in_training(block: OpenMoe, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return over_a_threshold(block, scores) if block.training else best(block, scores)


def over_a_threshold(block: OpenMoe, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = best(block, scores)
    return weights * (weights > 0.3), ids


class OpenMoe(nn.Module):
    """A plain gate beside a list of experts; what happens between them differs.

    ``calls`` is dense (every expert computes all tokens) or by rows, with room for ``capacity`` rows each.
    """

    def __init__(self, choose: Choose = best, *, dense: bool = True, capacity: int | None = None) -> None:
        super().__init__()
        self.top_k = TOP_K
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(EXPERTS))
        self.register_buffer("correction", torch.tensor([3.0, 0.0, 0.0, 0.0]))
        self.register_buffer("seen", torch.zeros(EXPERTS, dtype=torch.int64))
        self.register_buffer("assigned", torch.zeros((), dtype=torch.int64))
        self.passes = 0
        self.choose, self.dense, self.capacity = choose, dense, capacity

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        weights, ids = self.choose(self, self.gate(hidden).softmax(-1))
        output = torch.zeros_like(hidden)
        self.passes += 1
        self.assigned = self.assigned + ids.numel()
        for number, expert in enumerate(self.experts):
            weight = (weights * (ids == number)).sum(-1, keepdim=True)
            rows = weight.flatten().nonzero().flatten()[: self.capacity]
            self.seen[number] += len(rows)
            if self.dense:
                output = output + expert(hidden) * weight
            else:
                output = output.index_add(0, rows, expert(hidden[rows]) * weight[rows])
        return output


def model_of(*blocks: OpenMoe) -> Stack:
    torch.manual_seed(0)
    for block in blocks:
        block.gate.weight.data.normal_()
    return Stack(*blocks)


def counted(path: Path) -> list[list[int]]:
    loads = observatory.open_run(path).expert_load().groupby(["layer", "expert"])["load"].sum()
    return loads.unstack().to_numpy().tolist()


def watched(model: nn.Module, path: Path, *, calls: int = 3, tokens: int = 50) -> list[list[int]]:
    with observatory.watch(model, path) as watch, torch.no_grad():
        for _ in range(calls):
            model(torch.randn(tokens, HIDDEN))
            watch.step()
    assert_untouched(model)
    return counted(path)


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "by rows"])
def test_a_choice_by_the_logits_alone_is_confirmed_and_counted(dense: bool, tmp_path: Path) -> None:
    model = model_of(OpenMoe(dense=dense), OpenMoe(dense=dense))
    assert watched(model, tmp_path / "r") == [layer.mlp.seen.tolist() for layer in model.layers]


@pytest.mark.parametrize("choose", [noisy, biased])
def test_a_choice_that_the_block_makes_is_counted_where_its_experts_compute_it(
    choose: Choose, tmp_path: Path
) -> None:
    model = model_of(OpenMoe(choose), OpenMoe(choose)).train()
    assert watched(model, tmp_path / "r") == [layer.mlp.seen.tolist() for layer in model.layers]


def test_what_takes_part_after_a_dense_choice_refuses_the_model(tmp_path: Path) -> None:
    model = model_of(OpenMoe(over_a_threshold)).train()
    with pytest.raises(
        ModelError,
        match=r"in layer 0 the top-k of the logits of layers\.0\.mlp\.gate gives \d+ tokens to expert \d,",
    ):
        watched(model, tmp_path / "r")
    assert observatory.open_run(tmp_path / "r").expert_load().empty


@pytest.mark.parametrize("choose", [noisy, biased, over_a_threshold])
def test_what_experts_are_called_with_is_counted_whatever_the_logits_say(
    choose: Choose, tmp_path: Path
) -> None:
    model = model_of(OpenMoe(choose, dense=False)).train()
    assert watched(model, tmp_path / "r") == [model.layers[0].mlp.seen.tolist()]


def test_dropping_is_noticed_in_the_call_that_drops_first(tmp_path: Path) -> None:
    model = model_of(OpenMoe(dense=False, capacity=6))
    with observatory.watch(model, tmp_path / "r") as watch, torch.no_grad():
        for tokens in (3, 3, 60):
            model(torch.randn(tokens, HIDDEN))
            watch.step()
    assert counted(tmp_path / "r") == [model.layers[0].mlp.seen.tolist()]
    assert sum(counted(tmp_path / "r")[0]) < 66 * TOP_K


def test_what_training_adds_is_noticed_after_evaluation_was_confirmed(tmp_path: Path) -> None:
    model = model_of(OpenMoe(over_a_threshold_in_training)).eval()
    with (
        pytest.raises(ModelError, match="something else takes part in the choice"),
        observatory.watch(model, tmp_path / "r") as watch,
        torch.no_grad(),
    ):
        model(torch.randn(20, HIDDEN))
        watch.step()
        model.train()(torch.randn(20, HIDDEN))
        watch.step()
    assert sum(counted(tmp_path / "r")[0]) == 20 * TOP_K


def test_an_intervention_leaves_outputs_buffers_weights_and_random_numbers_as_they_were(
    tmp_path: Path,
) -> None:
    model = model_of(OpenMoe())
    hidden = torch.randn(2, 9, HIDDEN)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    plain = model(hidden[0])
    after = torch.rand(3)
    model.load_state_dict(state)
    torch.manual_seed(3)
    with observatory.watch(model, tmp_path / "r") as watch:
        assert torch.equal(model(hidden[0]), plain)
        watch.step()
    assert torch.equal(torch.rand(3), after)
    assert sum(model.layers[0].mlp.seen.tolist()) == 9 * TOP_K  # once, not once per intervention
    assert model.layers[0].mlp.assigned.item() == 9 * TOP_K
    assert model.layers[0].mlp.passes == 2  # the plain call, and the watched one
    assert all(torch.equal(p, state[n]) for n, p in model.named_parameters())
    model(hidden[1]).sum().backward()


def test_an_intervention_shows_the_tokens_of_each_expert() -> None:
    block = model_of(OpenMoe(biased)).layers[0].mlp
    rows = RowsOfExperts(EXPERTS)

    def hook(number: int) -> Callable[..., Any]:
        return lambda _module, args, output: rows.note(number, args, {}, output)

    for number, expert in enumerate(block.experts):
        expert.register_forward_hook(hook(number))
    hidden = torch.randn(12, HIDDEN)
    ids = biased(block, block.gate(hidden).softmax(-1))[1]
    expected = torch.stack([(ids == number).any(-1) for number in range(EXPERTS)])
    found = chosen_by_intervention(block, (hidden,), {}, experts=EXPERTS, changed=rows.changed)
    assert found is not None
    assert torch.equal(found, expected)


class Roundabout(nn.Module):
    """A block that calls its experts' forward itself."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.top_k, self.experts = nn.Linear(HIDDEN, EXPERTS), TOP_K, StackedExperts(EXPERTS)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        weights, ids = self.gate(hidden).softmax(-1).topk(self.top_k)
        return self.experts.forward(hidden, ids, weights)


def test_a_block_that_goes_round_the_hook_is_refused_at_its_first_step(tmp_path: Path) -> None:
    model = Stack(Roundabout())
    with (
        pytest.raises(ModelError, match=r"block of layers\.0\.mlp\.experts was called and ended without"),
        observatory.watch(model, tmp_path / "r") as watch,
    ):
        model(torch.randn(4, HIDDEN))
        watch.step()


def test_experts_shared_by_blocks_are_read_from_each_router(tmp_path: Path) -> None:
    model = model_of(OpenMoe(), OpenMoe(), OpenMoe())
    for layer in model.layers:
        layer.mlp.experts = model.layers[0].mlp.experts
    assert [s.spec.module for s in find_sites(model)] == [f"layers.{i}.mlp.gate" for i in range(3)]
    assert watched(model, tmp_path / "r") == [layer.mlp.seen.tolist() for layer in model.layers]


def test_stacked_experts_shared_by_blocks_whose_calls_look_alike_are_refused() -> None:
    blocks = [Roundabout(), Roundabout()]
    blocks[1].experts = blocks[0].experts
    for block in blocks:
        del block.gate
    with pytest.raises(ModelError, match="shared by 2 blocks, whose calls of it cannot be distinguished"):
        find_sites(Stack(*blocks))


def test_threads_keep_their_own_rows(tmp_path: Path) -> None:
    model = model_of(OpenMoe(dense=False))
    with observatory.watch(model, tmp_path / "r") as watch:
        threads = [
            threading.Thread(target=lambda n=n: [model(torch.randn(n, HIDDEN)) for _ in range(20)])
            for n in (3, 40)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        watch.step()
    assert sum(counted(tmp_path / "r")[0]) == 20 * 43 * TOP_K

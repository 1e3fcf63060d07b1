"""Kinds of MoE blocks whose readings, rows or reruns mislead: counted as computed, or refused."""

# ruff: noqa: PT012  # what is raised is raised by the end of the whole block

from __future__ import annotations

import random
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import observatory
from observatory.errors import ModelError
from observatory.probes.routing.discover import find_sites
from tests.probes.routing.homemade import HIDDEN, StackedExperts

EXPERTS, TOP_K = 4, 2


class Moe(nn.Module):
    """A plain gate beside a list of experts that keeps its own counts."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k = TOP_K
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.gate.weight.data.normal_()
        self.experts: Any = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(EXPERTS))
        self.true = [0] * EXPERTS
        self.passes = 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        weights, ids = self.gate(hidden).softmax(-1).topk(self.top_k)
        return hidden + self.compute(hidden, weights, ids)

    def note(self, expert: int, rows: int) -> None:
        self.true[expert] += rows

    def compute(self, hidden: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        output = torch.zeros_like(hidden)
        for number in range(EXPERTS):
            token, place = (ids == number).nonzero(as_tuple=True)
            self.note(number, len(token))
            rows = self.expert(number, hidden[token]) * weights[token, place, None]
            output = output.index_add(0, token, rows)
        return output

    def expert(self, number: int, rows: torch.Tensor) -> torch.Tensor:
        return self.experts[number](rows)


class Dense(Moe):
    def compute(self, hidden: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        output = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            gate = (weights * (ids == number)).sum(-1, keepdim=True)
            self.note(number, int((ids == number).sum()))
            output = output + expert(hidden) * gate
        return output


class Padded(Moe):
    """Every expert gets as many rows, some of them zeros."""

    def expert(self, number: int, rows: torch.Tensor) -> torch.Tensor:
        slots = rows.new_zeros(20, HIDDEN)
        slots[: len(rows)] = rows
        return self.experts[number](slots)[: len(rows)]


class Shortcut(Moe):
    """One expert is used without being called."""

    def expert(self, number: int, rows: torch.Tensor) -> torch.Tensor:
        if number:
            return self.experts[number](rows)
        return torch.nn.functional.linear(rows, self.experts[0].weight, self.experts[0].bias)


class ByName(Moe):
    """A dictionary in an order that is not that of the numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({f"expert_{n}": nn.Linear(HIDDEN, HIDDEN) for n in (2, 0, 3, 1)})

    def expert(self, number: int, rows: torch.Tensor) -> torch.Tensor:
        return self.experts[f"expert_{number}"](rows)


class Dropping(Moe):
    def compute(self, hidden: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        kept = torch.rand(ids.shape) > 0.3
        return super().compute(hidden, weights, torch.where(kept, ids, -1))


class Sorting(Dense):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        scores = self.gate(hidden).softmax(-1)
        ids = (scores + 0.3 * torch.rand_like(scores)).argsort(-1, descending=True)[:, : self.top_k]
        return hidden + self.compute(hidden, scores.gather(-1, ids), ids)


class Balanced(Dense):
    """A balancing bias that begins at zero, as in training from scratch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("balance", torch.zeros(EXPERTS))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        scores = self.gate(hidden).sigmoid()
        ids = (scores + self.balance).topk(self.top_k).indices
        self.balance += torch.tensor([0.3, 0.0, 0.0, -0.3])
        return hidden + self.compute(hidden, scores.gather(-1, ids), ids)


class DenseCapacity(Dense):
    """Drops only where calls are long."""

    def compute(self, hidden: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        chosen = torch.stack([(ids == n).any(-1) for n in range(EXPERTS)], dim=-1)
        late = chosen.cumsum(0).gather(-1, ids) > 40
        return super().compute(hidden, weights.masked_fill(late, 0), ids.masked_fill(late, -1))


class SlotGate(nn.Module):
    """Returns (dispatch, combine), both (T, E, C); states neither K nor that it returns them."""

    def __init__(self, *outer: int) -> None:
        super().__init__()
        self.weighing = nn.Parameter(torch.randn(*outer, HIDDEN, EXPERTS))
        self.capacity_factor = 1.0

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = (hidden @ self.weighing).softmax(-1).topk(TOP_K)
        chosen = nn.functional.one_hot(ids, EXPERTS).sum(-2) * hidden.any(-1, keepdim=True)  # not empty rows
        room = int(self.capacity_factor * TOP_K * hidden.shape[-2] / EXPERTS)
        place = chosen.cumsum(-2) - 1
        dispatch = nn.functional.one_hot(place.clamp(0, room), room + 1)[..., :room] * chosen[..., None]
        gates = torch.zeros(chosen.shape).scatter(-1, ids, weights)
        return dispatch.float(), dispatch * gates.where(gates > 0.3, 0)[..., None]


class Slots(nn.Module):
    """Experts stacked, with room for C rows each; some rows have a gate of zero, some tokens are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.router = SlotGate()
        self.experts = Weights(EXPERTS)
        self.true = [0] * EXPERTS

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        dispatch, combine = self.router(hidden)
        self.true = [a + int(b) for a, b in zip(self.true, dispatch.sum(dim=(0, 2)), strict=True)]
        computed = self.experts(torch.einsum("th,tec->ech", hidden, dispatch))
        return hidden + torch.einsum("ech,tec->th", computed, combine)


class Weights(nn.Module):
    """Experts stacked as (E, H, H), or as (O, I, H, H)."""

    def __init__(self, *experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*experts, HIDDEN, HIDDEN))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows @ self.weight


class TwoLevels(nn.Module):
    """A gate over groups of experts and one over the experts of each."""

    def __init__(self) -> None:
        super().__init__()
        self.group_gate, self.member_gate = SlotGate(), SlotGate(EXPERTS)
        self.experts = Weights(EXPERTS, EXPERTS)
        self.true = [0] * EXPERTS**2

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        to_groups, from_groups = self.group_gate(hidden)
        of_groups = torch.einsum("th,toc->och", hidden, to_groups)
        to_members, from_members = self.member_gate(of_groups)
        self.true = [a + int(b) for a, b in zip(self.true, to_members.sum(dim=(1, 3)).flatten(), strict=True)]
        computed = self.experts(torch.einsum("osh,osic->oich", of_groups, to_members))
        return hidden + torch.einsum("oich,osic,tos->th", computed, from_members, from_groups)


class Settings(nn.Module):
    """Its experts are wrapped, and K is in the settings that it was built from."""

    def __init__(self) -> None:
        super().__init__()
        self.args = SimpleNamespace(n_expert_per_token=TOP_K)
        self.gate = nn.Linear(HIDDEN, EXPERTS)
        self.experts = Wrapper()
        self.true = [0] * EXPERTS

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        weights, ids = self.gate(hidden).softmax(-1).topk(self.args.n_expert_per_token)
        self.true = [n + int((ids == e).sum()) for e, n in enumerate(self.true)]
        return hidden + self.experts(hidden, torch.zeros(len(hidden), EXPERTS).scatter(1, ids, weights))


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(EXPERTS))

    def forward(self, hidden: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        output = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            tokens = gates[:, number].nonzero().flatten()
            output = output.index_add(0, tokens, expert(hidden[tokens]) * gates[tokens, number, None])
        return output


class Masked(nn.Module):
    """Its experts leave out tokens by a mask whose name says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k = TOP_K
        self.gate = nn.Linear(HIDDEN, EXPERTS)
        self.experts = MaskedStack(EXPERTS)
        self.true = [0] * EXPERTS

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        weights, ids = self.gate(hidden).softmax(-1).topk(TOP_K)
        mask = torch.arange(len(hidden)) % 3 == 0
        self.true = [n + int((ids[~mask] == e).sum()) for e, n in enumerate(self.true)]
        return hidden + self.experts(hidden, ids, weights, mask)


class MaskedStack(StackedExperts):
    def forward(  # type: ignore[override]
        self, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        output = torch.zeros_like(hidden)
        output[~mask] = super().forward(hidden[~mask], expert_ids[~mask], weights[~mask])
        return output


class Returning(Moe):
    """Writes in place and returns nothing."""

    def forward(self, hidden: torch.Tensor) -> None:  # type: ignore[override]
        hidden.copy_(super().forward(hidden))


class Alone(nn.Module):
    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.moe(hidden)
        return hidden


def counts(path: Path) -> list[list[int]]:
    frame = observatory.open_run(path).expert_load()
    loads = frame.groupby(["layer", "expert"])["load"].sum().unstack().astype(int)
    return loads.to_numpy().tolist()  # type: ignore[no-any-return]


def watched(path: Path, model: nn.Module, *, lengths: tuple[int, ...] = (30, 50, 90)) -> list[list[int]]:
    with observatory.watch(model, path) as watch, torch.no_grad():
        for tokens in lengths:
            model(torch.randn(tokens, HIDDEN))
            watch.step()
    return counts(path)


@pytest.mark.filterwarnings("ignore:.*tokens is 0 where calls do not show how many:UserWarning")
@pytest.mark.parametrize(
    "kind",
    [Moe, Dense, Shortcut, ByName, Dropping, Sorting, Balanced, Slots, TwoLevels, Settings, Masked],
    ids=lambda kind: kind.__name__,
)
def test_what_is_computed_is_counted(kind: Callable[[], Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(kind(), kind())
    assert watched(tmp_path / "r", model) == [moe.true for moe in model]


def test_a_block_that_returns_nothing_is_counted(tmp_path: Path) -> None:
    model = Alone(Returning())
    assert watched(tmp_path / "r", model) == [model.moe.true]


def test_zeros_that_pad_are_not_counted(tmp_path: Path) -> None:
    """Rows say nothing there; the reading is confirmed by an intervention."""
    torch.manual_seed(0)
    model = nn.Sequential(Padded())
    assert watched(tmp_path / "r", model, lengths=(8, 16)) == [model[0].true]
    (layer,) = observatory.open_run(tmp_path / "r").manifest.model.moe_layers
    assert layer.verified is not None
    assert layer.verified.by == "intervention"


def test_dropping_in_long_dense_calls_refuses_the_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with pytest.raises(ModelError, match="something else takes part in the choice"):
        watched(tmp_path / "r", nn.Sequential(DenseCapacity()), lengths=(20, 200))
    assert sum(counts(tmp_path / "r")[0]) == 20 * TOP_K


class Unknown(nn.Module):
    """A router beside experts under a name of their own."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.top_k, self.gate, self.ffns = TOP_K, nn.Linear(HIDDEN, EXPERTS), experts


@pytest.mark.parametrize(
    "experts",
    [
        nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(EXPERTS)),
        nn.ParameterList(torch.zeros(HIDDEN, HIDDEN) for _ in range(EXPERTS)),
    ],
)
def test_a_model_is_never_half_read(experts: nn.Module) -> None:
    with pytest.raises(ModelError, match=r"1 MoE layers understood, but not 1 \(Unknown\): its gate chooses"):
        find_sites(nn.Sequential(Moe(), Unknown(experts)))


def test_two_watches_on_one_model_count_the_same(tmp_path: Path) -> None:
    model = nn.Sequential(Dense())
    with (
        observatory.watch(model, tmp_path / "a") as first,
        observatory.watch(model, tmp_path / "b", verify="intervention") as second,
        torch.no_grad(),
    ):
        model(torch.randn(20, HIDDEN))
        first.step()
        second.step()
    assert counts(tmp_path / "a") == counts(tmp_path / "b") == [model[0].true]


class DenseStack(StackedExperts):
    """Experts that compute all tokens, each with its part of a stack."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        gates_TE = torch.zeros(len(hidden_states), EXPERTS).scatter(1, top_k_index, top_k_weights)
        results_ETH = torch.bmm(hidden_states.expand(EXPERTS, -1, -1), self.weight)
        return torch.einsum("te,eth->th", gates_TE, results_ETH)


class Given(Moe):
    def __init__(self) -> None:
        super().__init__()
        self.experts = DenseStack(EXPERTS)

    def compute(self, hidden: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.experts(hidden, ids, weights)


@pytest.mark.parametrize("verify", ["first", "intervention"])
def test_threads_get_the_results_of_the_models_own_weights(verify: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Given(), Given())
    inputs = [torch.randn(20, HIDDEN) for _ in range(4)]
    with torch.no_grad():
        expected = [model(hidden) for hidden in inputs]
    results: list[list[torch.Tensor]] = [[] for _ in inputs]
    begin = threading.Barrier(len(inputs))

    def run(number: int) -> None:
        begin.wait()
        with torch.no_grad():
            results[number] += [model(inputs[number]) for _ in range(20)]

    with observatory.watch(model, tmp_path / "r", verify=verify) as watch:
        threads = [threading.Thread(target=run, args=(number,)) for number in range(len(inputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        watch.step()
    for plain, of_thread in zip(expected, results, strict=True):
        assert len(of_thread) == 20
        assert all(torch.equal(result, plain) for result in of_thread)
    assert [sum(layer) for layer in counts(tmp_path / "r")] == [4 * 20 * 20 * TOP_K] * 2


class Interrupted(Moe):
    def compute(self, hidden: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        if self.passes == 1:
            raise KeyboardInterrupt
        return super().compute(hidden, weights, ids)


def test_calls_after_an_interrupted_one_are_counted(tmp_path: Path) -> None:
    model = nn.Sequential(Interrupted())
    with observatory.watch(model, tmp_path / "r") as watch, torch.no_grad():
        with pytest.raises(KeyboardInterrupt):
            model(torch.randn(7, HIDDEN))
        model(torch.randn(9, HIDDEN))
        model(torch.randn(11, HIDDEN))
        watch.step()
    assert torch._C._len_torch_dispatch_stack() == 0
    assert counts(tmp_path / "r") == [model[0].true]


def test_nothing_is_kept_alive_by_an_interrupted_call(tmp_path: Path) -> None:
    model = nn.Sequential(Interrupted())
    with observatory.watch(model, tmp_path / "r") as watch, torch.no_grad():
        with pytest.raises(KeyboardInterrupt):
            model(torch.randn(7, HIDDEN))
        chosen = weakref.ref(torch.randn(9, EXPERTS).topk(2).indices)
        assert chosen() is None
        model(torch.randn(9, HIDDEN))
        watch.step()


#: One entry per call, as MegaBlocks keeps the losses of its layers.
GATHERED: list[torch.Tensor] = []


class Keeping(Dense):
    """Keeps what a rerun would change: a tensor for a loss, lists, random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.register_buffer("scale", torch.ones(EXPERTS))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.probs = self.gate(hidden).softmax(-1) * self.scale
        self.losses.append(random.random())
        GATHERED.append(self.probs)
        return super().forward(hidden) + self.probs.square().mean()


def test_a_rerun_leaves_no_trace(tmp_path: Path) -> None:
    model = nn.Sequential(Keeping())
    random.seed(1)
    GATHERED.clear()
    with observatory.watch(model, tmp_path / "r") as watch:
        (model(torch.randn(20, HIDDEN)).sum() + model[0].probs.square().sum()).backward()
        watch.step()
    assert model[0].passes == len(GATHERED) == 1
    random.seed(1)
    assert model[0].losses == [random.random()]
    assert counts(tmp_path / "r") == [model[0].true]


def test_our_operators_are_not_those_of_the_users_modes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, hidden = nn.Sequential(Dense()), torch.randn(20, HIDDEN)

    def policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        save = op in (torch.ops.aten.topk.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    def gradient() -> torch.Tensor:
        model.zero_grad()
        contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
        checkpoint(model, hidden, use_reentrant=False, context_fn=contexts).square().sum().backward()
        with FlopCounterMode(display=False) as flops:
            model(hidden)
        return torch.cat([model[0].gate.weight.grad.flatten(), torch.tensor([flops.get_total_flops()])])

    plain = gradient()
    with observatory.watch(model, tmp_path / "r") as watch:
        assert torch.equal(gradient(), plain)
        watch.step()


def test_experts_keep_their_class(tmp_path: Path) -> None:
    model = nn.Sequential(Moe())
    with observatory.watch(model, tmp_path / "r"):
        assert {type(expert) for expert in model[0].experts} == {nn.Linear}


class Registered(Moe):
    def __init_subclass__(cls, *, kind: str) -> None:
        cls.kind = kind


class Named(Registered, kind="named"):
    pass


def test_a_class_that_takes_no_plain_subclass_is_watched(tmp_path: Path) -> None:
    model = nn.Sequential(Named())
    assert watched(tmp_path / "r", model) == [model[0].true]
    assert type(model[0]) is Named


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*is deprecated")
def test_scripted_experts_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(Moe())
    model[0].experts[1] = torch.jit.script(nn.Linear(HIDDEN, HIDDEN))
    with pytest.raises(ModelError, match=r"compiled by torch\.jit, which takes no hooks"):
        watched(tmp_path / "r", model)


class Single(nn.Module):
    """Returns a gate and an id for each token, without a dimension for K."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.top_k = nn.Linear(HIDDEN, EXPERTS), 1

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, ids = self.linear(hidden).softmax(-1).max(-1)
        return gate, ids


class Switch(Moe):
    def __init__(self) -> None:
        super().__init__()
        self.top_k, self.router = 1, Single()
        del self.gate

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gate, ids = self.router(hidden)
        return hidden + self.compute(hidden, gate[:, None], ids[:, None])


def test_ids_without_a_dimension_for_k_are_read(tmp_path: Path) -> None:
    model = nn.Sequential(Switch(), Switch())
    assert watched(tmp_path / "r", model) == [moe.true for moe in model]


def test_what_is_compiled_after_it_was_confirmed_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(Dense())
    model[0].note = lambda *_: None  # type: ignore[method-assign]
    with (
        pytest.raises(
            ModelError, match="inferred from its logits, which cannot be confirmed in compiled code"
        ),
        observatory.watch(model, tmp_path / "r") as watch,
        torch.no_grad(),
    ):
        model(torch.randn(20, HIDDEN))
        watch.step()
        torch.compile(model, backend="eager")(torch.randn(20, HIDDEN))
        watch.step()


class Looped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Moe()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            hidden = self.layer(hidden)
        return hidden


def test_calls_of_a_looped_layer_add_up_and_the_run_says_so(tmp_path: Path) -> None:
    model = Looped()
    assert watched(tmp_path / "r", model, lengths=(10,)) == [model.layer.true]
    run = observatory.open_run(tmp_path / "r")
    (rows,) = run.iter_rows("routing")
    assert rows.column("tokens").to_pylist() == [30]
    assert any("called more than once in one call of the model" in note for note in run.manifest.notes)

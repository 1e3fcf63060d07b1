"""What is counted, to the single assignment."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import observatory
from observatory.probes.routing.sites import RoutingDecision
from tests.probes.routing.families import tiny_model
from tests.probes.tiny import ScriptedModel, assert_untouched, ids, loads, scripted_adapter, tokens


def counted(path: Path, *decisions: RoutingDecision, experts: int = 4, **options: object) -> Path:
    """Run of one step in which layer 0 makes these decisions, one call each."""
    with observatory.watch(ScriptedModel(), path, adapters=[scripted_adapter(experts)], **options) as watch:
        for decision in decisions:
            watch._model([decision])
        watch.step()
    return path


def test_every_assignment_counts_once_for_its_expert(tmp_path: Path) -> None:
    run = counted(tmp_path / "r", ids([0, 1], [1, 2], [1, 3]))
    assert loads(run, experts=4) == {(0, "unknown", 0): [1, 3, 1, 1]}
    assert tokens(run) == {(0, "unknown", 0): 3}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16, torch.uint8])
def test_ids_of_any_integer_type_count(tmp_path: Path, dtype: torch.dtype) -> None:
    run = counted(tmp_path / "r", ids([3, 0], [3, 2], dtype=dtype))
    assert loads(run, experts=4) == {(0, "unknown", 0): [1, 0, 1, 2]}


def test_ids_outside_the_experts_count_for_nobody_but_their_tokens_do(tmp_path: Path) -> None:
    run = counted(tmp_path / "r", ids([-1, 0], [4, 1], [-7, 2**40], [2, 2]))
    assert loads(run, experts=4) == {(0, "unknown", 0): [1, 1, 2, 0]}
    assert tokens(run) == {(0, "unknown", 0): 4}


def test_masked_tokens_are_no_tokens(tmp_path: Path) -> None:
    decision = RoutingDecision(
        expert_ids=torch.tensor([[0, 1], [2, 3], [0, 3]]),
        token_mask=torch.tensor([True, False, True]),
        tokens=3,
    )
    run = counted(tmp_path / "r", decision)
    assert loads(run, experts=4) == {(0, "unknown", 0): [2, 1, 0, 1]}
    assert tokens(run) == {(0, "unknown", 0): 2}


def test_calls_of_one_step_add_up_even_with_another_k(tmp_path: Path) -> None:
    run = counted(tmp_path / "r", ids([0, 1], [0, 2]), ids([3], [3], [3]), ids([0, 1, 2]))
    assert loads(run, experts=4) == {(0, "unknown", 0): [3, 2, 2, 3]}
    assert tokens(run) == {(0, "unknown", 0): 6}


def test_a_routing_map_counts_columns(tmp_path: Path) -> None:
    chosen = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    for name, routing_map in (("bool", chosen.bool()), ("int", chosen), ("float", chosen * 0.5)):
        run = counted(tmp_path / name, RoutingDecision(routing_map=routing_map, tokens=3))
        assert loads(run, experts=4) == {(0, "unknown", 0): [1, 2, 0, 0]}
        assert tokens(run) == {(0, "unknown", 0): 3}


def test_a_masked_map_and_ids_can_alternate_at_one_layer(tmp_path: Path) -> None:
    masked = RoutingDecision(
        routing_map=torch.ones(3, 4, dtype=torch.bool), token_mask=torch.tensor([1, 0, 0]), tokens=3
    )
    run = counted(tmp_path / "r", masked, ids([0, 1]), masked)
    assert loads(run, experts=4) == {(0, "unknown", 0): [3, 3, 2, 2]}
    assert tokens(run) == {(0, "unknown", 0): 3}


def test_expert_choice_counts_loads_and_says_that_tokens_are_not_known(tmp_path: Path) -> None:
    chosen_EC = torch.arange(4).repeat_interleave(3).reshape(4, 3)
    with pytest.warns(UserWarning, match="tokens is 0"):
        run = counted(tmp_path / "r", RoutingDecision(expert_ids=chosen_EC, tokens=None))
    assert loads(run, experts=4) == {(0, "unknown", 0): [3, 3, 3, 3]}
    assert tokens(run) == {(0, "unknown", 0): 0}
    assert "tokens is 0" in observatory.open_run(run).manifest.notes[0]


def test_a_call_without_tokens_leaves_a_row_of_zeros(tmp_path: Path) -> None:
    empty = RoutingDecision(expert_ids=torch.empty(0, 2, dtype=torch.int64), tokens=0)
    run = counted(tmp_path / "r", empty)
    assert loads(run, experts=4) == {(0, "unknown", 0): [0, 0, 0, 0]}
    assert tokens(run) == {(0, "unknown", 0): 0}


def test_a_layer_that_is_not_called_in_a_step_has_no_row_there(tmp_path: Path) -> None:
    model = ScriptedModel(layers=2)

    def first_both_then_one() -> None:
        with observatory.watch(model, tmp_path / "r", adapters=[scripted_adapter(2)]) as watch:
            model([ids([0]), ids([1])])
            watch.step()
            model([ids([1])])
            watch.step()

    with pytest.warns(UserWarning, match=r"layer 1 \(layers.1\): it was not called in step 1"):
        first_both_then_one()
    assert loads(tmp_path / "r", experts=2) == {
        (0, "unknown", 0): [1, 0],
        (0, "unknown", 1): [0, 1],
        (1, "unknown", 0): [0, 1],
    }


def test_gate_mass_sums_the_weights_that_go_to_each_expert(tmp_path: Path) -> None:
    by_ids = RoutingDecision(
        expert_ids=torch.tensor([[0, 1], [1, -1]]), weights=torch.tensor([[0.75, 0.25], [0.5, 9.0]]), tokens=2
    )
    by_map = RoutingDecision(
        routing_map=torch.tensor([[True, False, False, True]]),
        weights=torch.tensor([[0.5, 7.0, 7.0, 0.25]]),
        tokens=1,
    )
    run = counted(tmp_path / "r", by_ids, by_map, gate_mass=True)
    (block,) = observatory.open_run(run).iter_loads()
    assert block.gate_mass_SPE is not None
    np.testing.assert_allclose(block.gate_mass_SPE[0, 0], [1.25, 0.75, 0.0, 0.25])


def test_samples_are_the_first_tokens_of_each_step_in_order(tmp_path: Path) -> None:
    model = ScriptedModel()
    with observatory.watch(
        model, tmp_path / "r", adapters=[scripted_adapter(4, 2)], sample_tokens=2
    ) as watch:
        model([ids([0, 1], [2, -1], [3, 3])])
        model([ids([1, 1])])
        watch.step()
        model([RoutingDecision(routing_map=torch.tensor([[0, 1, 0, 1]]), tokens=1)])
        watch.step()
    frame = observatory.open_run(tmp_path / "r").token_samples()
    kept = [(r.step, r.position, sorted(r.expert_ids)) for r in frame.itertuples()]
    assert kept == [(0, 0, [0, 1]), (0, 1, [2]), (1, 0, [1, 3])]


def test_windows_keep_the_extremes_of_their_steps(tmp_path: Path) -> None:
    model = ScriptedModel()
    with observatory.watch(model, tmp_path / "r", adapters=[scripted_adapter(2)], window_steps=2) as watch:
        for decision in (ids([0], [0], [1]), ids([1], [1], [1]), ids([0], [1])):
            model([decision])
            watch.step()
    frame = observatory.open_run(tmp_path / "r").expert_load()
    assert frame.groupby("step").load.apply(list).to_dict() == {0: [2, 4], 2: [1, 1]}
    assert frame.groupby("step").window_steps.first().to_dict() == {0: 2, 2: 1}
    (block,) = observatory.open_run(tmp_path / "r").iter_loads()
    assert block.step_max_over_mean_S is not None
    np.testing.assert_allclose(block.step_max_over_mean_S, [2.0, 1.0])


def test_layers_of_different_size_are_kept_apart(tmp_path: Path) -> None:
    sizes = {"layers.0": 2, "layers.1": 5}
    adapters = [
        scripted_adapter(size).__class__(
            match=lambda name, _module, wanted=name: name == wanted,
            read=lambda _module, args, _kwargs, _output: args[1],
            experts=size,
            when="before",
        )
        for name, size in sizes.items()
    ]
    model = ScriptedModel(layers=2)
    with observatory.watch(model, tmp_path / "r", adapters=adapters) as watch:
        model([ids([1]), ids([4])])
        watch.step()
    frame = observatory.open_run(tmp_path / "r").expert_load()
    assert frame.groupby("layer").load.apply(list).to_dict() == {0: [0, 1], 1: [0, 0, 0, 0, 1]}


decisions = st.lists(
    st.tuples(st.integers(0, 6), st.integers(1, 4)).flatmap(
        lambda shape: st.lists(
            st.lists(st.integers(-3, 9), min_size=shape[1], max_size=shape[1]),
            min_size=shape[0],
            max_size=shape[0],
        )
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=25, deadline=None)
@given(calls=decisions, experts=st.integers(1, 7))
def test_counts_agree_with_a_naive_count(calls: list[list[list[int]]], experts: int) -> None:
    model = ScriptedModel()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "r"
        with observatory.watch(model, path, adapters=[scripted_adapter(experts)]) as watch:
            for call in calls:
                tensor = torch.tensor(call, dtype=torch.int64).reshape(len(call), -1 if call else 2)
                model([RoutingDecision(expert_ids=tensor, tokens=len(call))])
            watch.step()
        flat = [expert for call in calls for token in call for expert in token if 0 <= expert < experts]
        naive = [flat.count(expert) for expert in range(experts)]
        assert loads(path, experts=experts) == {(0, "unknown", 0): naive}
        assert tokens(path) == {(0, "unknown", 0): sum(map(len, calls))}


def test_threads_that_share_a_model_lose_nothing(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    model, decision = ScriptedModel(), ids(*([[0, 1]] * 500))
    with observatory.watch(model, tmp_path / "r", adapters=[scripted_adapter(2)]) as watch:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: model([decision]), range(200)))
        watch.step()
    assert loads(tmp_path / "r", experts=2) == {(0, "unknown", 0): [100_000, 100_000]}


def test_two_models_in_one_process_do_not_mix(tmp_path: Path) -> None:
    one, two = ScriptedModel(), ScriptedModel()
    with (
        observatory.watch(one, tmp_path / "one", adapters=[scripted_adapter(2)]) as first,
        observatory.watch(two, tmp_path / "two", adapters=[scripted_adapter(3)]) as second,
    ):
        one([ids([0])])
        two([ids([2])])
        first.step()
        second.step()
    assert loads(tmp_path / "one", experts=2) == {(0, "unknown", 0): [1, 0]}
    assert loads(tmp_path / "two", experts=3) == {(0, "unknown", 0): [0, 0, 1]}


def test_nested_and_repeated_watches_of_one_model_each_count_their_own(tmp_path: Path) -> None:
    model: nn.Module = ScriptedModel()
    adapters = [scripted_adapter(2)]
    with observatory.watch(model, tmp_path / "outer", adapters=adapters) as outer:
        model([ids([0])])
        with observatory.watch(model, tmp_path / "inner", adapters=adapters) as inner:
            model([ids([1])])
            inner.step()
        model([ids([0])])
        outer.step()
    assert_untouched(model)
    with observatory.watch(model, tmp_path / "later", adapters=adapters) as later:
        model([ids([1], [1])])
        later.step()
    assert loads(tmp_path / "outer", experts=2) == {(0, "unknown", 0): [2, 1]}
    assert loads(tmp_path / "inner", experts=2) == {(0, "unknown", 0): [0, 1]}
    assert loads(tmp_path / "later", experts=2) == {(0, "unknown", 0): [0, 2]}


def test_watches_that_end_in_the_wrong_order_still_leave_nothing(tmp_path: Path) -> None:
    model = ScriptedModel()
    outer = observatory.watch(model, tmp_path / "outer", adapters=[scripted_adapter(2)])
    inner = observatory.watch(model, tmp_path / "inner", adapters=[scripted_adapter(2)])
    outer.__enter__()
    inner.__enter__()
    model([ids([0])])
    outer.step()
    outer.__exit__(None, None, None)
    model([ids([1])])
    inner.step()
    inner.__exit__(None, None, None)
    assert_untouched(model)
    assert loads(tmp_path / "outer", experts=2) == {(0, "unknown", 0): [1, 0]}
    assert loads(tmp_path / "inner", experts=2) == {(0, "unknown", 0): [1, 1]}


def test_a_layer_in_two_places_is_one_layer_whose_calls_add_up_and_the_run_says_so(tmp_path: Path) -> None:
    model = ScriptedModel(3)
    model.layers[2] = model.layers[0]
    with (  # noqa: PT031  # the warning comes when the watch ends
        pytest.warns(UserWarning, match=r"several places.*: layers\.0$"),
        observatory.watch(model, tmp_path / "r", adapters=[scripted_adapter(2)]) as watch,
    ):
        model([ids([0]), ids([1]), ids([1])])
        watch.step()
    assert loads(tmp_path / "r", experts=2) == {(0, "unknown", 0): [1, 1], (0, "unknown", 1): [0, 1]}
    assert "layers.0" in observatory.open_run(tmp_path / "r").manifest.notes[0]


def test_padding_tokens_are_dispatched_by_transformers_and_so_they_count(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe").eval()
    ids_BS = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    with torch.no_grad(), observatory.watch(model, tmp_path / "r") as watch:
        model(ids_BS, attention_mask=(ids_BS != 0).long())
        watch.step()
    assert set(tokens(tmp_path / "r").values()) == {ids_BS.numel()}

"""The correction bias of routers is kept where it changes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import observatory
from observatory.run import Run, open_run
from observatory.zoo.models import load_model

#: Rate of aux-loss-free balancing: a power of two, so that every value is exact.
RATE = 2.0**-10
EXPERTS = 8


def deepseek() -> Any:
    """A model of the DeepSeek-V3 family: one dense layer, then two with routed experts."""
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        vocab_size=32, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=EXPERTS, n_shared_experts=1,
        num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=8,
        kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config)


def biases(model: Any) -> dict[int, Any]:
    return {layer: model.model.layers[layer].mlp.gate.e_score_correction_bias for layer in (1, 2)}


def count(load_E: torch.Tensor, _: Any, args: tuple[torch.Tensor, ...]) -> None:
    load_E += torch.bincount(args[1].flatten(), minlength=EXPERTS)


def kept(run: Run) -> dict[tuple[int, int], list[float]]:
    frame = run.router_biases()
    assert not frame.duplicated(["step", "layer", "source_rank"]).any()
    return {(row.step, row.layer): list(row.bias) for row in frame.itertuples()}


def test_training_shows_how_the_bias_moves_against_the_loads(tmp_path: Path) -> None:
    model = deepseek().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.randint(0, 32, (2, 12))
    seen = [{layer: bias.tolist() for layer, bias in biases(model).items()}]
    with observatory.watch(model, tmp_path / "run") as watch:
        for step in range(21):
            loads = {layer: torch.zeros(EXPERTS) for layer in biases(model)}
            hooks = [
                model.model.layers[layer].mlp.experts.register_forward_pre_hook(partial(count, loads[layer]))
                for layer in loads
            ]
            model(input_ids=ids, labels=ids).loss.backward()
            for hook in hooks:
                hook.remove()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for layer, bias in biases(model).items():
                    if layer == 1 or step < 10:  # layer 2 stands still after this
                        bias.add_(RATE * torch.sign(loads[layer].mean() - loads[layer]))
            seen.append({layer: bias.tolist() for layer, bias in biases(model).items()})
            watch.step()
    run = open_run(tmp_path / "run")
    expected = {(step, 1): seen[step][1] for step in (0, 8, 16, 21)}
    expected |= {(step, 2): seen[step][2] for step in (0, 8, 16)}
    assert kept(run) == expected
    assert run.problems == ()
    # The bias is lowered for experts with more assignments than the mean.
    first = run.expert_load(layers=[1]).query("step == 0")["load"].to_numpy()
    assert np.array_equal(np.sign(np.subtract(seen[1][1], seen[0][1])), np.sign(first.mean() - first))


def test_a_bias_that_stands_still_is_kept_once_and_models_without_one_have_no_table(tmp_path: Path) -> None:
    model = deepseek().eval()
    with observatory.watch(model, tmp_path / "run") as watch, torch.no_grad():
        for _ in range(20):
            model(input_ids=torch.tensor([[1, 2, 3]]))
            watch.step()
    assert kept(open_run(tmp_path / "run")) == {(0, 1): [0.0] * EXPERTS, (0, 2): [0.0] * EXPERTS}
    mixtral = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2,
        )
    )  # fmt: skip
    with observatory.watch(mixtral, tmp_path / "other") as watch, torch.no_grad():
        mixtral(input_ids=torch.tensor([[1, 2, 3]]))
        watch.step()
    assert not (tmp_path / "other/router_bias").exists()
    assert open_run(tmp_path / "other").router_biases().empty


@pytest.mark.filterwarnings("ignore:.*the whole run is one step:UserWarning")
def test_a_bias_that_is_no_number_is_stated_and_what_was_read_before_is_kept(tmp_path: Path) -> None:
    model = deepseek().eval()
    with observatory.watch(model, tmp_path / "run"), torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3]]))
        biases(model)[1][3] = float("nan")
        biases(model)[2][3] = 0.5
    run = open_run(tmp_path / "run")
    # Without watch.step() the whole run is step 0; the last reading is after it.
    assert kept(run) == {
        (0, 1): [0.0] * EXPERTS,
        (0, 2): [0.0] * EXPERTS,
        (1, 2): [0.0] * 3 + [0.5] + [0.0] * 4,
    }
    assert any("not finite: e_score_correction_bias of model.layers.1" in note for note in run.manifest.notes)


def test_the_bundled_model_has_the_biases_that_its_training_left(tmp_path: Path) -> None:
    loaded = load_model("tiny-mla")
    with observatory.watch(loaded.model, tmp_path / "run") as watch, torch.no_grad():
        loaded.model(input_ids=torch.arange(8).reshape(1, 8))
        watch.step()
    frame = open_run(tmp_path / "run").router_biases()
    assert len(frame) == 4
    assert all(np.abs(np.array(list(frame["bias"]))).max(axis=1) > 0)

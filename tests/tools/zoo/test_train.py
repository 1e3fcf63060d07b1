"""The training recipe and its balancing."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import tools.zoo.train as training
from observatory.errors import ModelError
from observatory.zoo.data import REAL_CONDITIONS
from observatory.zoo.models import load_model
from tools.zoo.balancing import RoutingRecord, expert_loads, switch_loss, update_bias
from tools.zoo.evaluation import unigram_cross_entropies
from tools.zoo.recipes import RECIPES, Recipe, recipe_named

pytestmark = pytest.mark.slow


def small(name: str) -> Recipe:
    architecture = {**RECIPES[name].architecture, "hidden_size": 32}
    return replace(RECIPES[name], architecture=architecture, steps=2, warmup_steps=1, sequence_length=32)


@pytest.fixture
def little_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "EVALUATED_TOKENS", 64)
    monkeypatch.setattr(training, "LOAD_TOKENS", 64)
    texts = {name: np.arange(640) % (50 + i) for i, name in enumerate(REAL_CONDITIONS)}
    monkeypatch.setattr(training, "training_sequences", lambda **_: texts)


@pytest.mark.parametrize("name", ["tiny-gqa", "tiny-mla"])
@pytest.mark.usefixtures("little_data")
def test_two_steps_make_a_checkpoint_that_loads_and_the_same_seed_makes_it_again(
    name: str, tmp_path: Path
) -> None:
    facts = {}
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        model, facts[folder] = training.train(small(name), seed=seed)
        training.save_checkpoint(model, facts[folder], tmp_path / folder)
    weights = {folder: (tmp_path / folder / "model.safetensors").read_bytes() for folder in "abc"}
    assert weights["a"] == weights["b"] != weights["c"]
    written = json.loads((tmp_path / "a" / "training.json").read_text(encoding="utf-8"))
    assert written["tokens_seen"] == 2 * 4 * 32
    assert written["recipe"]["name"] == name
    assert written["held_out_loss_nats"].keys() == set(REAL_CONDITIONS)
    loaded = load_model(str(tmp_path / "a"))
    for (_, trained), (_, read) in zip(
        model_parameters(training.train(small(name), seed=3)[0]), model_parameters(loaded.model), strict=True
    ):
        torch.testing.assert_close(read, trained, rtol=0, atol=0)


def model_parameters(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return sorted([*model.named_parameters(), *model.named_buffers()], key=lambda item: item[0])


@pytest.mark.usefixtures("little_data")
def test_a_bias_family_moves_its_bias_by_the_rate_and_others_have_none() -> None:
    model, _ = training.train(replace(small("tiny-mla"), steps=1))
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert len(biases) == 4
    for bias in biases:
        torch.testing.assert_close(bias.abs(), torch.full_like(bias, 2e-3) * (bias != 0))


def test_a_batch_holds_every_text_alike() -> None:
    recipe = replace(RECIPES["tiny-gqa"], steps=5, sequence_length=10)
    texts = {str(text): np.full(40, text) for text in range(4)}
    steps = training._mixed_batches(texts, recipe, 0)
    assert steps.shape == (5, 4, 10)
    assert [sorted(set(step.ravel())) for step in steps] == [[0, 1, 2, 3]] * 5


def test_switch_loss_is_one_per_layer_when_equal_and_the_number_of_experts_when_one_takes_all() -> None:
    equal = RoutingRecord(
        logits_TE=[torch.zeros(4, 4)] * 2, experts_TK=[torch.tensor([[0], [1], [2], [3]])] * 2
    )
    assert switch_loss(equal).item() == pytest.approx(2.0)
    logits = torch.full((4, 4), -50.0)
    logits[:, 1] = 50.0
    collapsed = RoutingRecord(logits_TE=[logits], experts_TK=[torch.ones(4, 1, dtype=torch.int64)])
    assert switch_loss(collapsed).item() == pytest.approx(4.0)
    assert expert_loads(collapsed).tolist() == [[0, 4, 0, 0]]


def test_the_bias_goes_up_for_experts_below_the_mean_load_and_down_above_it() -> None:
    class TopkRouter(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e_score_correction_bias = torch.nn.Buffer(torch.zeros(3))

    model = torch.nn.ModuleList([TopkRouter()])
    record = RoutingRecord(
        logits_TE=[torch.zeros(6, 3)], experts_TK=[torch.tensor([[0], [0], [0], [1], [1], [2]])]
    )
    update_bias(model, record, rate=0.25)
    router: Any = model[0]
    assert router.e_score_correction_bias.tolist() == [-0.25, 0.0, 0.25]


def test_the_unigram_baseline_of_equal_counts_is_the_log_of_the_vocabulary() -> None:
    ids = np.tile(np.arange(8), 10)
    baseline = unigram_cross_entropies({"a": ids}, {"a": ids}, vocabulary_size=8, sequence_length=8)
    assert baseline.overall_own_nats == pytest.approx(np.log(8), abs=1e-4)
    assert baseline.overall_mix_nats == pytest.approx(np.log(8), abs=1e-4)


def test_an_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(ModelError, match="tiny-gdn"):
        recipe_named("tiny-rnn")


def test_the_learning_rate_warms_up_and_ends_at_zero() -> None:
    recipe = SimpleNamespace(steps=10, warmup_steps=2)
    assert training._warm_then_down(0, recipe) == 0.5  # type: ignore[arg-type]
    assert training._warm_then_down(2, recipe) == 1.0  # type: ignore[arg-type]
    assert training._warm_then_down(10, recipe) == 0.0  # type: ignore[arg-type]


def test_importing_the_zoo_loads_no_heavy_library() -> None:
    code = (
        "import sys, observatory.zoo, observatory.zoo.data, observatory.zoo.models;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'tokenizers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

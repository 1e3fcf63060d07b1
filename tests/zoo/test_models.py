"""Loading models, and what the bundled ones can do."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from observatory.errors import ModelError
from observatory.zoo.data import REAL_CONDITIONS, load_token_ids
from observatory.zoo.models import BundledModel, LoadedModel, bundled_models, load_model, mixer_of_config
from tools.zoo.balancing import expert_loads, find_routers, record_routing
from tools.zoo.evaluation import evaluate
from tools.zoo.recipes import EXPERTS, MOE_LAYERS, RECIPES, TOP_K

BUNDLED = bundled_models()
PREFILL, DECODED = 24, 8


@pytest.fixture(scope="module", params=BUNDLED, ids=lambda bundled: bundled.name)
def bundled(request: pytest.FixtureRequest) -> BundledModel:
    found: BundledModel = request.param
    return found


@pytest.fixture(scope="module")
def loaded(bundled: BundledModel) -> LoadedModel:
    return load_model(bundled.name)


def test_the_five_bundled_models_stand_in_fixed_order() -> None:
    assert [model.mixer for model in BUNDLED] == ["MLA", "MHA", "GQA", "Mamba-2", "GDN"]
    assert [model.name for model in BUNDLED] == list(RECIPES)


def test_a_bundled_model_comes_in_float32_with_its_tokenizer(
    bundled: BundledModel, loaded: LoadedModel
) -> None:
    assert (loaded.source, loaded.family, loaded.vocabulary_size) == ("bundled", bundled.family, 4096)
    assert not loaded.model.training
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    assert loaded.tokenizer is not None
    assert len(loaded.tokenizer) == loaded.vocabulary_size
    assert mixer_of_config(loaded.model.config) == bundled.mixer


def test_stored_weights_are_bfloat16(bundled: BundledModel) -> None:
    stored = bundled.directory / "model.safetensors"
    assert stored.stat().st_size < 3_000_000
    header = stored.read_bytes()
    length = int.from_bytes(header[:8], "little")
    tensors = {k: v["dtype"] for k, v in json.loads(header[8 : 8 + length]).items() if k != "__metadata__"}
    assert {d for name, d in tensors.items() if not name.endswith("e_score_correction_bias")} == {"BF16"}
    assert {d for name, d in tensors.items() if name.endswith("e_score_correction_bias")} <= {"F32"}


def test_every_token_goes_to_four_of_32_experts_in_four_layers(loaded: LoadedModel) -> None:
    assert len(find_routers(loaded.model)) == MOE_LAYERS
    ids = load_token_ids("prose", loaded.tokenizer, vocabulary_size=4096, tokens=64).ids
    with torch.inference_mode(), record_routing(loaded.model) as record:
        loaded.model(input_ids=torch.from_numpy(ids)[None])
    loads_LE = expert_loads(record)
    assert loads_LE.shape == (MOE_LAYERS, EXPERTS)
    assert loads_LE.sum(dim=1).tolist() == [64 * TOP_K] * MOE_LAYERS


@pytest.mark.slow
def test_the_held_out_loss_is_below_the_unigram_baseline_and_as_recorded(
    bundled: BundledModel, loaded: LoadedModel
) -> None:
    facts = json.loads((bundled.directory / "training.json").read_text(encoding="utf-8"))
    texts = {
        name: load_token_ids(name, loaded.tokenizer, vocabulary_size=4096, tokens=65_536)
        .ids.reshape(-1, 256)[::16]  # every 16th sequence: from many documents
        .reshape(-1)
        for name in REAL_CONDITIONS
    }
    measured = evaluate(loaded.model, texts, sequence_length=256)
    assert measured.overall_nats < bundled.unigram_cross_entropy - 1.0
    for name, loss_nats in measured.losses_nats.items():
        assert loss_nats < facts["unigram_cross_entropy_nats"][name] - 0.5
        assert loss_nats == pytest.approx(facts["held_out_loss_nats"][name], abs=0.35)


def test_routing_has_not_collapsed(bundled: BundledModel) -> None:
    facts = json.loads((bundled.directory / "training.json").read_text(encoding="utf-8"))
    assert max(facts["load_on_train"]["max_over_mean_per_layer"]) < 3.0
    assert max(facts["load_on_train"]["experts_below_tenth_of_mean"]) <= 1


def test_prefill_and_decode_with_the_cache_give_the_logits_of_one_forward(loaded: LoadedModel) -> None:
    model: Any = loaded.model
    ids = torch.from_numpy(
        load_token_ids("code", loaded.tokenizer, vocabulary_size=4096, tokens=2 * (PREFILL + DECODED)).ids
    ).reshape(2, PREFILL + DECODED)
    with torch.inference_mode():
        whole = model(input_ids=ids, use_cache=False).logits
        output = model(input_ids=ids[:, :PREFILL], use_cache=True)
        pieces = [output.logits]
        for position in range(PREFILL, PREFILL + DECODED):
            output = model(
                input_ids=ids[:, position : position + 1],
                past_key_values=output.past_key_values,
                use_cache=True,
            )
            pieces.append(output.logits)
    assert torch.cat(pieces, dim=1).shape == whole.shape
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-3, atol=2e-3)


def test_a_directory_loads_like_the_bundled_model_and_without_warnings() -> None:
    directory = BUNDLED[2].directory
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_model(str(directory), dtype="bfloat16")
    assert (found.name, found.source, found.mixer) == ("tiny-gqa", "directory", "GQA")
    assert found.family == "qwen3_moe"
    assert found.tokenizer is None  # the bundled ones share one that lies elsewhere
    assert next(found.model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("config", "mixer"),
    [
        ({"kv_lora_rank": 512, "num_attention_heads": 16, "num_key_value_heads": 16}, "MLA"),
        ({"linear_num_value_heads": 32, "linear_key_head_dim": 128, "num_attention_heads": 16}, "GDN"),
        ({"mamba_num_heads": 64, "num_attention_heads": 32, "num_key_value_heads": 2}, "Mamba-2"),
        ({"num_attention_heads": 32, "num_key_value_heads": 4}, "GQA"),
        ({"num_attention_heads": 16, "num_key_value_heads": 16}, "MHA"),
        ({"num_attention_heads": 16}, "MHA"),
        ({"hidden_size": 16}, None),
    ],
)
def test_the_mixer_is_told_from_the_configuration(config: dict[str, int], mixer: str | None) -> None:
    assert mixer_of_config(SimpleNamespace(**config)) == mixer
    assert mixer_of_config(SimpleNamespace(text_config=SimpleNamespace(**config))) == mixer


def _checkpoint(path: Path, config: str | None, weights: str | None = None) -> str:
    path.mkdir()
    if config is not None:
        (path / "config.json").write_text(config, encoding="utf-8")
    if weights:
        (path / weights).write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ")
    return str(path)


@pytest.mark.parametrize(
    ("config", "weights", "message"),
    [
        (None, None, "no config.json"),
        ("{", None, "cannot be read"),
        ("[]", None, "no model_type"),
        ("[" * 100_000, None, "cannot be read"),
        ('{"model_type": "qwen3_moe"}', None, "no .safetensors"),
        ('{"model_type": "qwen3_moe"}', "pytorch_model.bin", "pickled"),
        ('{"model_type": "no_such"}', "model.safetensors", "cannot be loaded"),
        ('{"model_type": "qwen3_moe", "hidden_size": "x"}', "model.safetensors", "cannot be loaded"),
        (
            '{"model_type": "x", "auto_map": {"AutoConfig": "m.C", "AutoModelForCausalLM": "m.M"}}',
            "model.safetensors",
            "cannot be loaded",
        ),
    ],
)
def test_what_is_no_safe_checkpoint_is_refused_in_one_line(
    config: str | None, weights: str | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message) as refusal:
        load_model(_checkpoint(tmp_path / "model", config, weights))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "name",
    ["", "no-such-model", "a\x00b", "../../etc", "a\nb", "x" * 5_000, "y" * 500, "a/b/c", "../b", "\u202eab"],
)
def test_a_hostile_or_unknown_name_is_refused_in_one_printable_line(name: str) -> None:
    with pytest.raises(ModelError) as refusal:
        load_model(name)
    assert str(refusal.value).isprintable()


def test_a_hub_id_without_network_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="network") as refusal:
        load_model("some-org/some-model")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("broken", [False, True])
def test_a_hub_checkpoint_without_tokenizer_loads_and_one_with_a_broken_one_is_refused(
    broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--some-org--some-model"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).symlink_to(BUNDLED[2].directory / name)
    if broken:
        (snapshot / "tokenizer.json").write_text("[")
        with pytest.raises(ModelError, match="tokenizer of 'some-org/some-model'"):
            load_model("some-org/some-model")
    else:
        assert load_model("some-org/some-model").tokenizer is None


def test_unknown_devices_and_types_are_refused() -> None:
    with pytest.raises(ModelError, match="unknown device"):
        load_model("tiny-gqa", device="toaster")
    with pytest.raises(ModelError, match="unknown dtype"):
        load_model("tiny-gqa", dtype="int3")

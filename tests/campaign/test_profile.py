"""One profile: every assignment of every step, whatever the model and the data."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import observatory
from observatory.campaign.job import ProfileJob
from observatory.campaign.profile import run_profile
from observatory.errors import DataError, ModelError, ObservatoryError, RunError
from observatory.zoo.models import load_model


def job(model: Path, **changes: object) -> ProfileJob:
    options: dict[str, object] = {
        "model": str(model),
        "data": "mock",
        "batch_size": 2,
        "sequence_length": 16,
        "steps": 3,
    }
    return ProfileJob(**{**options, **changes})  # type: ignore[arg-type]


def test_prefill_and_decode_are_distinguished_and_every_assignment_is_counted(
    foreign_checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    run_profile(
        job(foreign_checkpoint, data=str(text_file), phase="both"),
        tmp_path / "run",
        progress=lambda done, total: seen.append((done, total)),
    )
    run = observatory.open_run(tmp_path / "run")
    loads = run.expert_load()
    assert run.problems == ()
    assert seen == [(done, 6) for done in range(7)]
    per_step = loads.groupby(["phase", "step", "layer"])["load"].sum()
    assert set(per_step.loc["prefill"].unique()) == {2 * 16 * 2}  # sequences x tokens x top-2
    assert set(per_step.loc["decode"].unique()) == {2 * 1 * 2}
    assert sorted(per_step.loc["prefill"].index.unique("step")) == [0, 1, 2]
    assert sorted(per_step.loc["decode"].index.unique("step")) == [3, 4, 5]
    assert run.manifest.state == "complete"
    assert run.manifest.data is not None
    assert run.manifest.data.real
    assert run.manifest.model.name == "my-mixtral"
    assert run.manifest.config["sequence_length"] == 16


def test_decode_alone_leaves_the_context_out_of_the_run(foreign_checkpoint: Path, tmp_path: Path) -> None:
    run_profile(job(foreign_checkpoint, phase="decode"), tmp_path / "run")
    loads = observatory.open_run(tmp_path / "run").expert_load()
    assert set(loads["phase"]) == {"decode"}
    assert loads["load"].sum() == 2 * 2 * 2 * 3  # sequences x top-2 x layers x steps


def test_decode_after_prefill_routes_as_one_long_forward_does(
    foreign_checkpoint: Path, tmp_path: Path
) -> None:
    """Teacher-forced decode over T tokens makes the assignments a prefill of the same tokens makes."""
    both = job(foreign_checkpoint, phase="both", steps=1, sequence_length=15)
    long = job(foreign_checkpoint, phase="prefill", steps=1, sequence_length=16)
    run_profile(both, tmp_path / "both")
    run_profile(long, tmp_path / "long")
    summed = [
        observatory.open_run(tmp_path / name).expert_load().groupby(["layer", "expert"])["load"].sum()
        for name in ("both", "long")
    ]
    assert summed[0].equals(summed[1])


def test_one_seed_gives_one_result_and_another_seed_another(foreign_checkpoint: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run_profile(job(foreign_checkpoint, seed=seed), tmp_path / name)
    loads = {name: observatory.open_run(tmp_path / name).expert_load()["load"].tolist() for name in "abc"}
    assert loads["a"] == loads["b"]
    assert loads["a"] != loads["c"]


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0},
        {"seed": -1},
        {"batch_size": -1},
        {"sequence_length": 0},
        {"phase": "warp"},
        {"sample_tokens": -1},
    ],
)
def test_impossible_jobs_are_refused_before_anything_is_loaded(changes: dict[str, object]) -> None:
    with pytest.raises(ObservatoryError, match=str(next(iter(changes)))):
        job(Path("nowhere"), **changes)


def test_a_sequence_longer_than_the_model_is_refused(foreign_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="128"):
        run_profile(job(foreign_checkpoint, sequence_length=200), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_empty_text_is_refused_and_leaves_no_run(foreign_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match="empty"):
        run_profile(job(foreign_checkpoint, data=str(tmp_path / "empty.txt")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_dense_model_is_refused_by_its_configuration(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    with pytest.raises(ModelError, match=r"looks dense: no experts in config\.json"):
        run_profile(job(tmp_path / "dense"), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_profile_stopped_in_the_middle_keeps_what_it_wrote(
    sent: signal.Signals, foreign_checkpoint: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "observatory", "profile", str(foreign_checkpoint), "--data", "mock"]
    command += ["--batch-size", "2", "--sequence-length", "16", "--steps", "50000", "--out", str(run)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not list(run.glob("routing/*/part-*.parquet")) and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            time.sleep(0.1)
        process.send_signal(sent)
        _, err = process.communicate(timeout=400)
    finally:
        process.kill()
        process.wait()
    opened = observatory.open_run(run)
    loads = opened.expert_load()
    assert len(loads) > 0
    assert opened.manifest.state != "complete"
    assert set(loads.groupby(["step", "layer"])["load"].sum()) == {2 * 16 * 2}
    if sent == signal.SIGINT:
        assert process.returncode == 130
        assert "interrupted" in err
        assert "Traceback" not in err
    else:
        assert opened.problems


def test_a_checkpoint_that_lacks_weights_is_refused_as_its_routing_would_be_random(
    foreign_checkpoint: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(foreign_checkpoint, broken)
    weights = load_file(broken / "model.safetensors")
    gate = next(name for name in weights if name.endswith("gate.weight"))
    del weights[gate]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights.*gate"):
        run_profile(job(broken), tmp_path / "run")


def test_a_vision_language_model_is_profiled_on_text(tmp_path: Path) -> None:
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    text = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 32,
        "moe_intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]},
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen3VLMoeConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0]})
    Qwen3VLMoeForConditionalGeneration(config).save_pretrained(tmp_path / "vlm")
    run_profile(job(tmp_path / "vlm", phase="both"), tmp_path / "run")
    loads = observatory.open_run(tmp_path / "run").expert_load()
    assert set(loads.groupby(["phase", "step", "layer"])["load"].sum()) == {2 * 16 * 2, 2 * 1 * 2}


def test_an_encoder_decoder_is_refused_with_the_way_to_watch_it(tmp_path: Path) -> None:
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    config = SwitchTransformersConfig(
        vocab_size=64,
        d_model=16,
        d_ff=16,
        d_kv=8,
        num_heads=2,
        num_layers=2,
        num_decoder_layers=2,
        num_experts=4,
    )
    SwitchTransformersForConditionalGeneration(config).save_pretrained(tmp_path / "switch")
    with pytest.raises(ModelError, match=r"encoder-decoder.*observatory\.watch"):
        run_profile(job(tmp_path / "switch"), tmp_path / "run")


def test_a_taken_place_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match="exists"):
        run_profile(job(tmp_path / "no model here"), tmp_path)


def test_a_model_that_fails_while_it_runs_is_one_sentence_and_the_run_is_kept(
    foreign_checkpoint: Path, tmp_path: Path
) -> None:
    loaded = load_model(str(foreign_checkpoint))
    calls = []

    def fail_in_the_third(*_: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("CUDA out of memory.\nTried to allocate")

    loaded.model.register_forward_pre_hook(fail_in_the_third)
    with pytest.raises(ModelError, match=r"failed while it ran: RuntimeError: CUDA out of memory\. Tried"):
        run_profile(job(foreign_checkpoint), tmp_path / "run", loaded=loaded)
    run = observatory.open_run(tmp_path / "run")
    assert run.manifest.state == "failed"
    assert sorted(run.expert_load()["step"].unique()) == [0, 1]


def test_more_tokens_than_memory_holds_are_refused(foreign_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at most"):
        run_profile(job(foreign_checkpoint, steps=10**12), tmp_path / "run")

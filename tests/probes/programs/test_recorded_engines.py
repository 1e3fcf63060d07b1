"""Engines that are not installed, by stand-ins with their modules, names and order of calls.

The stand-ins state the phases of their tokens by themselves; warm-up, drafters, padding, idle batches and
shared experts count nowhere, and physical experts are not mistaken for logical ones.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from observatory.campaign.command import CommandResult, run_command
from observatory.errors import CaptureError, ModelError
from observatory.probes.programs.engines.interface import check_interface
from observatory.run import Run, open_run

STAND_INS = Path(__file__).with_name("stand_ins")


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(STAND_INS), os.environ.get("PYTHONPATH", "")]))


def served(out: Path, module: str, *words: str) -> CommandResult:
    result = run_command([sys.executable, "-m", module, *words], out)
    assert result.code == 0
    return result


def loads(run: Run) -> dict[str, list[list[int]]]:
    """Load of each layer and expert, by phase."""
    found: dict[str, list[list[int]]] = {}
    for block in run.iter_loads():
        of_layers = found.setdefault(str(block.phase), [[] for _ in run.manifest.model.moe_layers])
        of_layer = block.load_SE.sum(axis=0).tolist()
        of_layers[block.layer] = [
            a + b for a, b in zip(of_layers[block.layer] or [0] * len(of_layer), of_layer, strict=True)
        ]
    return found


def steps(run: Run) -> list[tuple[int, str, int]]:
    tokens = run.routed_tokens().groupby(["step", "phase"])["tokens"].sum()
    return [(int(step), str(phase), int(n)) for (step, phase), n in tokens.items() if n]


def timed(run: Run) -> list[tuple[int, str]]:
    """Steps whose time is known, and the phase that it belongs to."""
    spans = run.spans().query("name == 'phase'").sort_values("step")
    return list(zip(spans["step"].tolist(), spans["phase"].tolist(), strict=True))


def engine_of(run: Run) -> dict[str, Any]:
    engine = run.manifest.config["engine"]
    assert isinstance(engine, dict)
    return engine


@pytest.mark.slow
@pytest.mark.usefixtures("stand_ins")
def test_sglang_is_counted_by_step_and_by_the_phase_of_each_token(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = served(tmp_path / "run", "sglang.serve")
    printed = capfd.readouterr()
    assert result.remarks == ()
    (path,) = result.runs
    run = open_run(path)
    (problem,) = run.problems
    assert "no watched layer was called in step 2" in problem  # the idle batch
    assert loads(run) == json.loads(printed.out)
    assert steps(run) == [(0, "prefill", 6), (1, "decode", 2), (1, "prefill", 7), (3, "decode", 3)]
    assert timed(run) == [(0, "prefill"), (1, "mixed"), (2, "unknown"), (3, "decode")]
    assert [(layer.layer, layer.experts, layer.top_k) for layer in run.manifest.model.moe_layers] == [
        (0, 6, 2), (1, 6, 2),
    ]  # fmt: skip
    assert run.manifest.model.name == "tiny-moe"
    engine = engine_of(run)
    assert (engine["name"], engine["version"], engine["is_tried_version"]) == ("sglang", "0.5.23", True)


@pytest.mark.slow
@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("compiled", [False, True])
def test_tensorrt_llm_is_counted_by_step_and_by_the_phase_of_each_token(
    compiled: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = served(tmp_path / "run", "tensorrt_llm.serve", *["compiled"] * compiled)
    printed = capfd.readouterr()
    assert result.remarks == ()
    assert "tensorrt_llm 1.2.1 was not tried (no version was): it is watched by its interface" in printed.err
    (path,) = result.runs
    run = open_run(path)
    assert run.problems == ()
    assert loads(run) == json.loads(printed.out)
    assert steps(run) == [(0, "prefill", 6), (1, "decode", 3), (1, "prefill", 6), (2, "decode", 2)]
    assert timed(run) == [(0, "prefill"), (1, "mixed"), (2, "decode")]
    assert (run.manifest.model.name, engine_of(run)["name"]) == ("tiny-moe", "tensorrt_llm")


@pytest.mark.slow
@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    ("module", "word", "remark"),
    [
        ("sglang.serve", "another-interface", "ModelRunner.attn_tp_sequence_sharded takes no num_tokens"),
        ("tensorrt_llm.serve", "routes-inside", "routes inside of its kernel (TRTLLMGenFusedMoE)"),
    ],
)
def test_an_engine_that_cannot_be_counted_serves_and_one_sentence_says_why(
    module: str, word: str, remark: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = served(tmp_path / "run", module, word)
    (said,) = result.remarks
    assert remark in said
    assert json.loads(capfd.readouterr().out)["decode"]


@pytest.mark.slow
@pytest.mark.usefixtures("stand_ins")
def test_vllm_is_watched_where_its_variable_names_other_plugins(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "of,others")
    served(tmp_path / "run", "vllm.start")
    assert capfd.readouterr().out.strip() == "['of', 'others'] True"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"attn_tp_size": 2}, "splits tokens among the ranks"),
        ({"attn_cp_size": 2}, "context parallelism"),
        ({"attn_dp_size": 2}, "gathers the tokens of all ranks"),
    ],
)
def test_sglang_with_rows_that_cannot_be_assigned_is_refused(
    change: dict[str, int], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = set(sys.modules)
    monkeypatch.syspath_prepend(str(STAND_INS))
    try:
        from sglang.srt import runtime_context
        from sglang.srt.model_executor.model_runner import ModelRunner

        from observatory.probes.programs.engines import sglang_runner

        runner = ModelRunner()
        assert sglang_runner._unsupported(runner) is None
        runner.attn_tp_sequence_sharded = lambda num_tokens: num_tokens == 1
        for name, value in change.items():
            monkeypatch.setattr(runtime_context.PARALLEL, name, value)
        assert reason in str(sglang_runner._unsupported(runner))
    finally:
        for name in set(sys.modules) - modules:
            if name.split(".")[0] == "sglang":
                del sys.modules[name]


def test_layers_of_sglang_that_show_no_ids_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = set(sys.modules)
    monkeypatch.syspath_prepend(str(STAND_INS))
    try:
        import torch
        from sglang.srt.layers.moe.hash_topk import HashTopK
        from sglang.srt.layers.moe.topk import TopKOutputFormat
        from sglang.srt.model_executor.model_runner import Model

        from observatory.probes.programs.engines.sglang_layers import sglang_adapter
        from observatory.probes.programs.engines.token_phases import TokenPhases
        from observatory.probes.routing.discover import find_sites

        model = Model()
        adapter = sglang_adapter(model, TokenPhases(8, torch.device("cpu")), 2)
        assert [site.spec.experts for site in find_sites(model, adapters=[adapter])] == [6, 6]
        second = model.model["layers"][1]
        second.topk.topk_config.output_format = TopKOutputFormat.BYPASSED
        with pytest.raises(ModelError, match="layer 1 routes inside of its kernel"):
            find_sites(model, adapters=[adapter])
        second.topk = HashTopK(1)
        with pytest.raises(ModelError, match="by token id"):
            find_sites(model, adapters=[adapter])
    finally:
        for name in set(sys.modules) - modules:
            if name.split(".")[0] == "sglang":
                del sys.modules[name]


def test_an_interface_is_looked_for_before_anything_is_changed() -> None:
    check_interface("an engine", {"json:dumps": ("obj",), "json:JSONDecoder.decode": ()})
    for name, parameters, missing in (
        ("json.nowhere:dumps", (), "json.nowhere is missing"),
        ("json:JSONDecoder.guess", (), "JSONDecoder.guess is missing"),
        ("json:dumps", ("paper",), "json:dumps takes no paper"),
    ):
        with pytest.raises(CaptureError, match=f"an engine has another interface: .*{missing}"):
            check_interface("an engine", {name: parameters})

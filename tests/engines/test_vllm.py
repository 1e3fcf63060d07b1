"""vLLM, served as its user would: counts and phases against the engine's own routes, and transformers'."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from observatory.analysis.step_times import step_times
from observatory.run import Run, open_run
from tests.engines.server import EXPERTS, LAYERS, TOP_K, Answer, save_model, second_runner, serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed; make test-engines installs it",
    ),
]

#: Longer than a batch (32 tokens), shorter, and of one token; the first of a request begins to decode while
#: the others still wait for their prompts.
_PROMPTS = [
    [[7, 9, 30], [*range(40, 95)], [3, 1, 4, 1, 5, 9, 2, 6]],
    [[11], [*range(200, 130, -1)], [*range(100, 133)]],
]
_TOKENS = 9
_RUN = [sys.executable, "-m", "observatory", "run"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny-moe"
    save_model(folder)
    return folder


def counted(run: Run) -> dict[str, NDArray[np.int64]]:
    """Load of each layer and expert, by phase."""
    loads: dict[str, NDArray[np.int64]] = {}
    for block in run.iter_loads():
        of_phase = loads.setdefault(str(block.phase), np.zeros((LAYERS, EXPERTS), dtype=np.int64))
        of_phase[block.layer] += block.load_SE.sum(axis=0)
    return loads


def expected(
    answers: Sequence[Answer], routes: Sequence[NDArray[np.integer]]
) -> dict[str, NDArray[np.int64]]:
    """The same from the routes of each request, (tokens, layers, K); cached tokens were not computed."""
    loads = {phase: np.zeros((LAYERS, EXPERTS), dtype=np.int64) for phase in ("prefill", "decode")}
    for answer, routes_TLK in zip(answers, routes, strict=True):
        prompt = len(answer.prompt)
        assert routes_TLK.shape == (prompt + len(answer.made) - 1, LAYERS, TOP_K)
        for phase, part in (("prefill", routes_TLK[answer.cached : prompt]), ("decode", routes_TLK[prompt:])):
            for layer in range(LAYERS):
                loads[phase][layer] += np.bincount(part[:, layer].reshape(-1), minlength=EXPERTS)
    return loads


def routes_of_transformers(model: Path, answers: Sequence[Answer]) -> list[NDArray[np.int64]]:
    import torch
    from transformers import Qwen3MoeForCausalLM

    reference = Qwen3MoeForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    routes = []
    for answer in answers:
        tokens = torch.tensor([[*answer.prompt, *answer.made[:-1]]])
        with torch.no_grad():
            logits = reference(tokens, output_router_logits=True).router_logits
        routes.append(torch.stack([one.topk(TOP_K).indices for one in logits], dim=1).numpy())
    return routes


def assert_equal(found: dict[str, NDArray[np.int64]], wanted: dict[str, NDArray[np.int64]]) -> None:
    assert set(found) == set(wanted)
    for phase, load_LE in wanted.items():
        np.testing.assert_array_equal(found[phase], load_LE, err_msg=phase)


def mixed_steps(run: Run) -> int:
    """Steps that have tokens of both phases."""
    tokens = run.routed_tokens().groupby(["step", "phase"])["tokens"].sum().unstack(fill_value=0)
    return int(((tokens["prefill"] > 0) & (tokens["decode"] > 0)).sum())


def test_counts_are_those_that_the_engine_returns(model: Path, tmp_path: Path) -> None:
    """Runner V2, eager; chunked prefill, mixed batches, a prefix from the cache; by ``observatory run``."""
    log, out = tmp_path / "server.log", tmp_path / "run"
    with serving(
        model, log, "--enforce-eager", "--enable-return-routed-experts", "--enable-prompt-tokens-details",
        prefix=[*_RUN, "--out", str(out), "--"], environment=second_runner(),
    ) as server:  # fmt: skip
        answers = server.complete_at_once(_PROMPTS, _TOKENS)
        again = server.complete([_PROMPTS[1][1]], _TOKENS)
    assert again[0].cached > 0
    run = open_run(out)
    assert run.problems == (), log.read_text()[-4000:]
    (rank,) = run.manifest.ranks
    assert (rank.state, rank.gaps) == ("complete", ())
    routes = [answer.routes for answer in [*answers, *again] if answer.routes is not None]
    assert_equal(counted(run), expected([*answers, *again], routes))
    assert mixed_steps(run) > 0
    times = step_times(run).groupby("phase")["tokens"].agg(["size", "sum"])
    assert times.loc["mixed", "size"] == mixed_steps(run)
    assert times["sum"].sum() == run.routed_tokens()["tokens"].sum()
    assert "run written to" in log.read_text()
    assert run.manifest.model.name == "tiny-moe"
    engine = run.manifest.config["engine"]
    assert isinstance(engine, dict)
    assert (engine["name"], engine["runner"], engine["is_tried_version"]) == ("vllm", "V2", True)


def test_compiled_code_counts_the_same_without_observatory_run(model: Path, tmp_path: Path) -> None:
    """Runner V1, torch.compile with inductor, no prefix cache; asked for by the environment alone."""
    log, out = tmp_path / "server.log", tmp_path / "run"
    with serving(
        model, log, "--no-enable-prefix-caching", environment={"OBSERVATORY_VLLM": str(out)}
    ) as server:
        answers = server.complete_at_once(_PROMPTS, _TOKENS)
        answers += server.complete([_PROMPTS[1][1]], _TOKENS)
    run = open_run(out)
    assert run.problems == (), log.read_text()[-4000:]
    assert_equal(counted(run), expected(answers, routes_of_transformers(model, answers)))
    assert mixed_steps(run) > 0
    engine = run.manifest.config["engine"]
    assert isinstance(engine, dict)
    assert (engine["runner"], engine["compilation"]) == ("V1", "DYNAMO_TRACE_ONCE")
    assert not engine["prefix_caching"]

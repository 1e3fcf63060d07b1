"""What the watch on a serving engine is made of, without the engine: phases of rows, recorded interfaces."""

from __future__ import annotations

import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import observatory
from observatory.analysis.live import live_view
from observatory.analysis.step_times import step_times
from observatory.errors import CaptureError, ModelError
from observatory.probes.programs.engines import vllm
from observatory.probes.programs.engines.token_phases import TokenPhases, phase_of, token_slots
from observatory.probes.programs.engines.vllm_layers import vllm_adapter
from observatory.probes.routing.adapters import Adapter
from observatory.probes.routing.counters import NO_SLOT, SLOTS
from observatory.probes.routing.discover import find_sites
from observatory.probes.routing.probe import RoutingProbe

PREFILL, DECODE = SLOTS.index("prefill"), SLOTS.index("decode")
EXPERTS = 4


class Router:
    """As much of vLLM's ``BaseRouter`` as is used; ``choose`` stands for ``select_experts``."""

    def __init__(self) -> None:
        self.top_k = 2
        self.capture_fn: Callable[[torch.Tensor], None] | None = None

    def set_capture_fn(self, capture_fn: Callable[[torch.Tensor], None] | None) -> None:
        self.capture_fn = capture_fn

    def choose(self, ids_TK: torch.Tensor) -> torch.Tensor:
        if self.capture_fn is not None:
            self.capture_fn(ids_TK)
        return ids_TK


class MoERunner(nn.Module):
    """As much of vLLM's class of this name as is used."""

    def __init__(self) -> None:
        super().__init__()
        self.router = Router()
        self.layer_name = "model.layers.0.mlp.experts"
        self.moe_config = SimpleNamespace(num_logical_experts=EXPERTS, is_sequence_parallel=False)
        self._quant_method = SimpleNamespace(is_monolithic=False)

    def forward(self, ids_TK: torch.Tensor) -> torch.Tensor:
        return self.router.choose(ids_TK)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.layers = nn.ModuleList([MoERunner(), MoERunner()])

    def forward(self, ids_TK: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            ids_TK = layer(ids_TK)
        return ids_TK


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names that are imported of vLLM."""
    name = "vllm.model_executor.layers.fused_moe.layer"
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
    sys.modules[name].MoERunner = MoERunner  # type: ignore[attr-defined]


def adapter(phases: TokenPhases, **parallel: Any) -> Adapter:
    config = SimpleNamespace(**{"data_parallel_size": 1, "data_parallel_rank": 0, **parallel})
    return vllm_adapter(phases, config)


@pytest.fixture
def phases() -> TokenPhases:
    return TokenPhases(8, torch.device("cpu"))


def watched(model: nn.Module, phases: TokenPhases, **parallel: Any) -> Iterator[RoutingProbe]:
    probe = RoutingProbe(model, find_sites(model, adapters=[adapter(phases, **parallel)]))
    probe.attach()
    yield probe
    probe.detach()
    probe.release()


def counts(probe: RoutingProbe) -> np.ndarray:
    """(slots, layers, bins)."""
    (copy,) = probe.take(step=0, stated_phase=None, ends_step=True).copies
    return copy.counts.numpy().reshape(len(SLOTS), len(probe.sites), EXPERTS + 3)


def test_a_request_is_prefilled_up_to_the_end_of_its_prompt() -> None:
    # One that decodes, one whose prompt ends inside the batch (after a cached prefix of 4), a chunk of many.
    slots_T = token_slots(np.array([0, 1, 4, 6]), np.array([9, 4, 2]), np.array([5, 6, 90]))
    assert slots_T.tolist() == [DECODE, PREFILL, PREFILL, DECODE, PREFILL, PREFILL]
    assert token_slots(np.array([0]), np.array([], int), np.array([], int)).size == 0


def test_rows_count_until_the_step_ends_and_no_batch_is_larger_than_the_engine_said(
    phases: TokenPhases,
) -> None:
    phases.fill(np.array([PREFILL, DECODE]))
    assert phases.slots.tolist() == [PREFILL, DECODE] + [NO_SLOT] * 6
    phases.fill(np.array([DECODE]))
    assert phases.slots.tolist() == [DECODE] + [NO_SLOT] * 7
    phases.clear()
    assert set(phases.slots.tolist()) == {NO_SLOT}
    with pytest.raises(CaptureError, match="9 tokens; expected 8"):
        phases.fill(np.full(9, DECODE))


@pytest.mark.parametrize("compiled", [False, True])
def test_each_row_counts_in_its_phase_and_padding_nowhere(phases: TokenPhases, compiled: bool) -> None:
    model = Model()
    for probe in watched(model, phases):
        run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
        ids_TK = torch.tensor([[0, 1], [1, 2], [3, 3], [0, 0]], dtype=torch.int32)
        run(ids_TK)  # a warm-up: no row counts
        phases.fill(np.array([PREFILL, DECODE, DECODE]))
        run(ids_TK)
        phases.clear()
        run(ids_TK)
        found = counts(probe)
        assert found[PREFILL, :, 1:-2].tolist() == [[1, 1, 0, 0]] * 2
        assert found[DECODE, :, 1:-2].tolist() == [[0, 1, 1, 2]] * 2
        assert not found[[SLOTS.index("unknown"), SLOTS.index("train_forward")]].any()
        assert probe.problem() is None
    assert all(layer.router.capture_fn is None for layer in model.layers)  # type: ignore[union-attr]


def test_the_time_of_a_step_begins_where_the_engine_states_and_has_one_phase_or_is_mixed(
    phases: TokenPhases, tmp_path: Path
) -> None:
    model, begun_ns = Model(), []
    batches = [[PREFILL] * 4, [PREFILL, PREFILL, DECODE], [DECODE] * 2]
    with observatory.watch(model, tmp_path / "run", adapters=[adapter(phases)]) as watch:
        for slots in batches:
            time.sleep(0.01)  # the engine waits for requests
            begun_ns.append(time.monotonic_ns())
            watch.begin_step()
            phases.fill(np.array(slots))
            watch.state_step_phase(phase_of(np.array(slots)))
            model(torch.tensor([[0, 1]] * len(slots)))
            phases.clear()
            watch.step()
    run = observatory.open_run(tmp_path / "run")
    spans = run.spans().query("name == 'phase'").sort_values("step")
    assert spans["phase"].tolist() == ["prefill", "mixed", "decode"]
    assert (spans["start_ns"].to_numpy() >= begun_ns).all()
    times = step_times(run).set_index("phase")["tokens"]
    assert times.to_dict() == {"decode": 2, "mixed": 3, "prefill": 4}
    shown = {phase.phase: phase for phase in live_view(run.path, steps=5).phases}
    assert {name: (phase.steps, phase.last_step) for name, phase in shown.items()} == {
        "prefill": (2, 1), "decode": (2, 2), "mixed": (1, 1)
    }  # fmt: skip
    assert all(phase.tokens_per_s is not None for phase in shown.values())


def test_the_engine_and_we_are_both_called_whoever_comes_first(phases: TokenPhases) -> None:
    model, heard = Model(), []
    first, second = model.layers[0].router, model.layers[1].router
    assert isinstance(first, Router)
    assert isinstance(second, Router)
    first.set_capture_fn(heard.append)
    for probe in watched(model, phases):
        second.set_capture_fn(heard.append)
        phases.fill(np.array([DECODE]))
        model(torch.tensor([[2, 3]]))
        assert len(heard) == 2
        assert counts(probe)[DECODE, :, 1:-2].tolist() == [[0, 0, 1, 1]] * 2
    model(torch.tensor([[2, 3]]))
    assert len(heard) == 4


def test_of_gathered_rows_those_of_the_own_rank_count(
    phases: TokenPhases, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = types.ModuleType("vllm.forward_context")
    metadata = SimpleNamespace(num_tokens_across_dp_cpu=torch.tensor([1, 2]))
    context.get_forward_context = lambda: SimpleNamespace(dp_metadata=metadata)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.forward_context", context)
    model = Model()
    for probe in watched(model, phases, data_parallel_size=2, data_parallel_rank=1):
        phases.fill(np.array([PREFILL, DECODE]))
        model(torch.tensor([[0, 0], [1, 1], [2, 2]]))  # of both ranks
        model(torch.tensor([[1, 1], [2, 2]]))
        found = counts(probe)
        assert found[PREFILL, 0, 1:-2].tolist() == [0, 4, 0, 0]
        assert found[DECODE, 0, 1:-2].tolist() == [0, 0, 4, 0]
        model(torch.tensor([[0, 0]] * 5))
        assert "decision without ids" in str(probe.problem())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda runner: setattr(runner._quant_method, "is_monolithic", True), "inside of its kernel"),
        (lambda runner: setattr(runner.router, "zero_expert_type", "identity"), "experts without weights"),
        (
            lambda runner: setattr(runner.moe_config, "is_sequence_parallel", True),
            "splits tokens among ranks",
        ),
        (lambda runner: setattr(runner, "router", SimpleNamespace(top_k=2)), "shows no ids"),
    ],
)
def test_a_layer_whose_ids_cannot_be_seen_is_refused(
    change: Callable[[Any], None], reason: str, phases: TokenPhases
) -> None:
    model = Model()
    change(model.layers[1])
    with pytest.raises(ModelError, match=reason):
        find_sites(model, adapters=[adapter(phases)])


def test_the_plugin_does_nothing_unless_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("OBSERVATORY_PROGRAM", "OBSERVATORY_VLLM"):
        monkeypatch.delenv(name, raising=False)
    vllm.register()
    assert not caplog.records
    monkeypatch.setenv("OBSERVATORY_VLLM", "run")
    vllm.register()  # the engine of these tests has no workers: a failure of ours is a line of its log
    assert "not watched: ModuleNotFoundError" in caplog.text

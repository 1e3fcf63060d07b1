"""Plans of a machine whose steps take known times."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from observatory.advice.capacity.routing import captured_routing, routed
from observatory.analysis.capacity.measured import MeasuredServer
from observatory.analysis.capacity.model_shape import model_shape
from observatory.analysis.capacity.step import Parallel, Work
from observatory.errors import PlanError
from observatory.run import RunWriter, open_run, routing_rows
from observatory.run.manifest import Manifest, ModelSpec, MoeLayerSpec
from observatory.run.provenance import HostSpec
from tests.analysis.experts.models import SHAPE, cost, network

CONFIG = {
    "model_type": "made up",
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "torch_dtype": "float32",
}
#: Seconds of the rest of a step and of one of its tokens; of an expert and of an assignment in each layer.
CALL_S, TOKEN_S, EXPERT_S, ROW_S = 2e-3, 1e-4, 3e-4, 5e-5
EXPERTS = cost(
    call_s=0.0, expert_s=EXPERT_S, row_s=ROW_S, most_assignments=4096, most_rows=2048.0, p90_error=0.1
)


def a_run(folder: Path, tokens: int, *, with_spans: bool = True) -> Path:
    """Steps of decode on one rank, with loads at random and the time that follows from them."""
    generator = np.random.default_rng(tokens)
    layers = tuple(MoeLayerSpec(layer=layer, module=f"m.{layer}", experts=4, top_k=2) for layer in (0, 1))
    model = ModelSpec(name="m", hidden_size=8, dtype="float32", expert_bytes=1536, moe_layers=layers)
    manifest = Manifest(
        run_id=f"r{tokens}",
        created_unix_s=1.0,
        model=model,
        hosts=(HostSpec(name="h", memory_bytes=1 << 34),),
    )
    steps = 40
    load_SLE = generator.multinomial(2 * tokens, [0.4, 0.3, 0.2, 0.1], size=(steps, 2))
    with RunWriter.create(folder, manifest) as writer:
        for layer in (0, 1):
            writer.append(
                "routing",
                routing_rows(
                    step_N=np.arange(steps),
                    phase_N="decode",
                    layer_N=np.full(steps, layer),
                    source_rank=0,
                    tokens_N=np.full(steps, tokens),
                    load_NE=load_SLE[:, layer],
                ),
            )
        inside_S = EXPERT_S * (load_SLE > 0).sum(axis=(1, 2)) + ROW_S * load_SLE.sum(axis=(1, 2))
        whole_S = CALL_S + TOKEN_S * tokens + inside_S
        whole_S[::7] *= 3.0  # now and then the machine does something else
        if with_spans:
            starts = (np.arange(steps) * 10**9).tolist()
            spans = {
                "step": list(range(steps)),
                "phase": ["decode"] * steps,
                "name": ["phase"] * steps,
                "start_ns": starts,
                "end_ns": [start + round(1e9 * s) for start, s in zip(starts, whole_S, strict=True)],
                "source_rank": pa.array([0] * steps, pa.int32()),
            }
            writer.append("spans", pa.table(spans))
    return folder


@pytest.fixture
def server_and_loads(tmp_path):
    runs = [open_run(a_run(tmp_path / f"r{tokens}", tokens)) for tokens in (4, 64)]
    model = model_shape(CONFIG)
    loads = routed("captured", model, captured_routing(runs, model))
    return MeasuredServer(model, runs, EXPERTS, network(latency_us=100.0, us_per_byte=0.01)), loads


@pytest.mark.parametrize("batch", [16, 40, 64])
def test_steps_on_one_rank_take_what_they_took(server_and_loads, batch):
    server, loads = server_and_loads
    alone = Parallel(ranks=1, tp=1, slots=4, gpus_per_node=8)
    step = server.step(alone, Work(decode=batch, context=0), loads)
    expected = CALL_S + TOKEN_S * batch + 2 * (4 * EXPERT_S + ROW_S * 2 * batch)
    assert step.s_3[1] == pytest.approx(expected, rel=0.05)
    assert step.s_3[0] <= step.s_3[1] <= step.s_3[2]
    assert step.part_of("measured") == pytest.approx(1.0)


def test_more_ranks_add_exchanges_and_divide_experts(server_and_loads):
    server, loads = server_and_loads
    two = Parallel(ranks=2, tp=1, slots=2, gpus_per_node=8)
    step = server.step(two, Work(decode=16, context=0), loads)
    parts = {part.name: part.s_3[1] for part in step.parts}
    busiest_rows = 2 * 2 * 16 * 0.5  # the best two and two of four experts have half each
    assert parts["experts"] == pytest.approx(2 * (2 * EXPERT_S + ROW_S * busiest_rows), rel=0.15)
    # Two layers with announcement, dispatch and combine of 100 us and some bytes.
    assert parts["exchange"] == pytest.approx(2 * 3 * 100e-6, rel=0.5)
    assert step.part_of("fitted") > 0


def test_what_was_not_measured_is_refused(tmp_path, server_and_loads):
    server, loads = server_and_loads
    alone = Parallel(ranks=1, tp=1, slots=4, gpus_per_node=8)
    with pytest.raises(PlanError, match="no run has steps of prefill"):
        server.step(alone, Work(decode=0, context=0, prefill=8, prompt=8), loads)
    without = open_run(a_run(tmp_path / "without", 8, with_spans=False))
    with pytest.raises(PlanError, match="no run has the duration of its steps"):
        MeasuredServer(model_shape(CONFIG), [without], EXPERTS, None)


def test_memory_is_shared_by_the_ranks(server_and_loads):
    server, _ = server_and_loads
    of_one, of_four = (
        server.memory(Parallel(ranks=ranks, tp=1, slots=4, gpus_per_node=8), 64).device for ranks in (1, 4)
    )
    assert of_one == 4 * of_four == 1 << 34


def test_expert_times_of_other_experts_are_refused(tmp_path):
    other = replace(EXPERTS, shape=SHAPE.model_copy(update={"top_k": None}))
    run = open_run(a_run(tmp_path / "r", 8))
    with pytest.raises(PlanError, match="no run has the duration"):
        MeasuredServer(model_shape(CONFIG), [run], other, None)

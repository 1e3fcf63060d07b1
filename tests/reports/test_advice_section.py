"""The section on changes: what it draws, and what it says where there is nothing to advise on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from observatory.advice.conclusions import Code
from observatory.reasons import Reason
from observatory.reports.frames.collect import collect
from observatory.reports.page import FigureBlock
from observatory.reports.sections import advice_section, verdict, verdicts
from observatory.run import RunWriter, open_run, routing_rows
from observatory.run.manifest import DataSpec, Manifest, ModelSpec, MoeLayerSpec, Topology
from observatory.run.tables import SPAN_SCHEMA
from tests.conftest import MakeRun

EXPERTS, RANKS, STEPS = 8, 2, 24


def spread_run(folder: Path) -> Path:
    """Two ranks, the first of which has three quarters of the load and takes 1 us for each assignment."""
    generator = np.random.default_rng(0)
    share_E = np.array([3.0] * 4 + [1.0] * 4)
    layer = MoeLayerSpec(layer=0, module="m.0", experts=EXPERTS, top_k=2, shared_experts=0)
    model = ModelSpec(
        name="spread", hidden_size=64, expert_bytes=3 * 64 * 32 * 4, dtype="float32", moe_layers=(layer,)
    )
    placement = tuple((expert // 4,) for expert in range(EXPERTS))
    topology = Topology(ranks=RANKS, ep=RANKS, gpus_per_node=2, node_of_rank=(0, 0), placement=placement)
    manifest = Manifest(
        run_id="spread",
        created_unix_s=1.0,
        model=model,
        topology=topology,
        data=DataSpec(condition="prose", real=True),
    )
    load_SRE = generator.multinomial(20_000, share_E / share_E.sum(), size=(STEPS, RANKS))
    taken_SP = load_SRE.sum(axis=1).reshape(STEPS, RANKS, 4).sum(axis=2)
    for rank in range(RANKS):
        writer = (
            RunWriter.create(folder, manifest)
            if rank == 0
            else RunWriter.join(folder, rank=rank, run_id="spread")
        )
        with writer:
            writer.append(
                "routing",
                routing_rows(
                    step_N=np.arange(STEPS),
                    phase_N="prefill",
                    layer_N=np.zeros(STEPS, dtype=np.int64),
                    source_rank=rank,
                    tokens_N=np.full(STEPS, 10_000),
                    load_NE=load_SRE[:, rank],
                ),
            )
            start = np.arange(STEPS, dtype=np.int64) * 10_000_000
            writer.append(
                "spans",
                pa.table(
                    {
                        "step": np.arange(STEPS),
                        "phase": ["prefill"] * STEPS,
                        "layer": np.zeros(STEPS, dtype=np.int32),
                        "source_rank": np.full(STEPS, rank, dtype=np.int32),
                        "name": ["experts"] * STEPS,
                        "start_ns": start,
                        "end_ns": start + 1000 * taken_SP[:, rank],
                    },
                    schema=SPAN_SCHEMA,
                ),
            )
    return folder


def test_the_gain_of_balance_is_drawn_and_stated_first(tmp_path: Path) -> None:
    frames = collect([open_run(spread_run(tmp_path / "run"))], ep_degrees=(2,), gpus_per_node=2)
    section = advice_section(frames)
    (block,) = section.blocks
    assert isinstance(block, FigureBlock)
    (variant,) = block.variants
    # The busiest rank has 3/4 of the load, each would have 1/2: a third less.
    assert "placement: 3" in variant.alt
    bars = [trace for trace in variant.figure.data if trace.type == "bar"]
    assert {trace.name for trace in bars} >= {"experts, mean rank", "waiting for the busiest"}
    assert not {trace.name for trace in bars} & {"dispatch", "combine", "counts"}
    first = verdicts(frames)[0]
    assert first.part == "Changes"
    assert first.section == section.id
    assert "placement" in first.sentences[0]
    assert "no network model" in variant.note.lower()


def test_what_can_be_changed_is_answered_before_a_larger_share_that_only_goes_somewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {"layer": 0, "phase": "prefill", "role": "dispatch", "slowest_rank": None}
    cost = Reason(Code.WAIT_COST, {**place, "wait_share": 0.9, "wait_ms": 1.0})
    waits = (Reason(Code.LONGEST_WAIT, place), cost)
    monkeypatch.setattr(verdict, "_exchanges", lambda _: iter([(0, waits)]))
    frames = collect([open_run(spread_run(tmp_path / "run"))], ep_degrees=(2,), gpus_per_node=2)
    shown = verdicts(frames)
    assert [item.part for item in shown[:2]] == ["Changes", "Exchanges"]
    assert shown[0].is_change
    assert not shown[1].is_change
    assert verdict.answer(shown).startswith("Worth changing")


@pytest.mark.parametrize("code", [Code.FAR_OFF, Code.EXTRAPOLATED, Code.NO_MEMORY])
def test_no_number_stands_for_a_change_that_is_held_up(code: Code) -> None:
    values = {"phase": "decode", "change": "placement", "gain": 0.3, "measured_over_predicted": 3.0}
    assert verdict._number((Reason(code, values),), "changes", "") is None
    gains = verdict._number((Reason(Code.CHANGE_GAIN, values),), "changes", "")
    assert gains is not None
    assert gains.meaning.endswith("not certain")


def test_runs_on_one_rank_say_how_to_get_advice(make_run: MakeRun) -> None:
    frames = collect([open_run(make_run())], ep_degrees=(2,), gpus_per_node=2)
    section = advice_section(frames)
    assert not section.blocks
    assert "observatory advise" in section.reason
    assert all(verdict.part != "Changes" for verdict in verdicts(frames))


@pytest.mark.parametrize("steps", [10])
def test_too_few_steps_are_stated(tmp_path: Path, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.reports.test_advice_section.STEPS", steps)
    frames = collect([open_run(spread_run(tmp_path / "run"))], ep_degrees=(2,), gpus_per_node=2)
    assert "too few" in advice_section(frames).reason

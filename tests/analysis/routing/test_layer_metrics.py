from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pytest

from observatory.analysis.routing.floor import gini_floor, gini_uniform_limit, max_over_mean_floor
from observatory.analysis.routing.imbalance import gini
from observatory.analysis.routing.loads import LayerLoads, collect_layer_loads
from observatory.analysis.routing.summary import floor_top_k, layer_metrics, phase_summary, run_summary
from tests.analysis.routing.runs import uniform_loads, write_run


def test_every_number_of_a_hand_computed_layer(tmp_path: Path) -> None:
    steps = [[[3, 1, 0, 0]], [[0, 0, 2, 2]], [[1, 1, 1, 1]], [[0, 0, 0, 0]]]
    run = write_run(tmp_path / "run", {("prefill", 3): steps}, top_k=2)
    row = layer_metrics(run).iloc[0]
    # Whole run: 4 2 3 3, sorted 2 3 3 4: Gini = (-3*2 - 3 + 3 + 3*4) / (4 * 12).
    assert row["gini"] == pytest.approx(6 / 48)
    assert (row["layer"], row["phase"], row["experts"], row["top_k"]) == (3, "prefill", 4, 2)
    assert (row["steps"], row["tokens"], row["assignments"], row["idle_experts"]) == (4, 6, 12, 0)
    assert row["expert_max_over_mean"] == pytest.approx(4 / 3)
    assert row["balancedness"] == pytest.approx(3 / 4)
    assert row["excess_over_mean"] == pytest.approx(1 / 3)
    assert row["cv"] == pytest.approx(math.sqrt(0.5) / 3)
    shares = np.array([4, 2, 3, 3]) / 12
    assert row["entropy_bits"] == pytest.approx(-(shares * np.log2(shares)).sum())
    # Per step: 3 1 0 0 has Gini 5/8, 0 0 2 2 has 1/2, 1 1 1 1 has 0; the empty step has none.
    assert row["step_gini_p50"] == pytest.approx(0.5)
    assert row["step_gini_p10"] == pytest.approx(0.1)
    assert row["step_gini_p90"] == pytest.approx(0.6)
    assert row["step_expert_max_over_mean_p50"] == 2.0
    assert row["step_expert_max_over_mean_max"] == 3.0
    assert row["gini_floor"] == gini_floor(tokens=6, top_k=2, experts=4)
    assert row["gini_excess"] == pytest.approx(row["gini"] - row["gini_floor"])
    assert row["gini_uniform_limit"] == gini_uniform_limit(tokens=6, top_k=2, experts=4)
    assert row["expert_max_over_mean_floor"] == max_over_mean_floor(tokens=6, top_k=2, experts=4)
    assert row["step_gini_floor"] == gini_floor(tokens=2, top_k=2, experts=4)
    assert row["step_expert_max_over_mean_floor"] == max_over_mean_floor(tokens=2, top_k=2, experts=4)
    assert row["step_gini_floor"] > row["gini_floor"]
    assert row["floor_basis"] == "configured top-k"


def test_too_few_steps_give_no_interval_and_say_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {("prefill", 0): np.ones((4, 1, 2), dtype=int)})
    row = layer_metrics(run).iloc[0]
    assert np.isnan(row["gini_low"])
    assert np.isnan(row["gini_high"])
    assert row["notes"] == "no interval: 4 steps, at least 5 needed"
    assert layer_metrics(run, bootstrap=0).iloc[0]["notes"] == ""


def test_one_step_of_one_expert_on_one_rank_is_a_run_too(tmp_path: Path) -> None:
    row = layer_metrics(write_run(tmp_path / "run", {("decode", 0): [[[7]]]})).iloc[0]
    assert (row["gini"], row["gini_floor"], row["gini_excess"], row["entropy_bits"], row["cv"]) == (
        0,
        0,
        0,
        0,
        0,
    )
    assert (row["expert_max_over_mean"], row["expert_max_over_mean_floor"], row["balancedness"]) == (1, 1, 1)
    assert (row["step_gini_p10"], row["step_gini_p90"], row["steps"]) == (0, 0, 1)


def test_a_layer_that_got_nothing_has_no_numbers_and_a_reason(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run",
        {("prefill", 0): np.zeros((6, 1, 4), dtype=int), ("prefill", 1): np.ones((6, 1, 4), dtype=int)},
    )
    frame = layer_metrics(run)
    empty = frame.iloc[0]
    names = [
        "gini",
        "gini_low",
        "gini_floor",
        "gini_excess",
        "expert_max_over_mean",
        "balancedness",
        "cv",
        "entropy_bits",
    ]
    assert empty[[*names, "step_gini_p50", "step_gini_floor"]].isna().all()
    assert empty["idle_experts"] == 4
    assert "nothing was assigned" in empty["notes"]
    assert empty["floor_basis"].startswith("n/a")
    assert run_summary(run)["gini"].tolist() == [0.0], "the mean over layers leaves the empty layer out"


def test_a_run_without_rows_gives_an_empty_frame_with_all_columns(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {("prefill", 0): np.zeros((0, 1, 4), dtype=int)})
    assert layer_metrics(run).empty
    assert "gini" in layer_metrics(run).columns
    assert phase_summary(run).empty


def test_windows_of_steps_yield_the_stored_extreme_and_no_invented_steps(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run",
        {("decode", 0): np.tile([[[3, 1]]], (6, 1, 1))},
        window_steps=10,
        step_max_over_mean=2.0,
    )
    row = layer_metrics(run).iloc[0]
    assert row["steps"] == 60
    assert row["step_expert_max_over_mean_max"] == 2.0
    assert (
        row[["step_gini_p10", "step_gini_p50", "step_gini_floor", "step_expert_max_over_mean_p50"]]
        .isna()
        .all()
    )
    assert "rows fold several steps" in row["notes"]
    assert row["gini"] == 0.25


def test_missing_ranks_are_mentioned(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run", {("prefill", 0): np.ones((6, 2, 2), dtype=int)}, missing=((2, 1), (3, 1))
    )
    assert "2 of 6 rows lack some ranks" in layer_metrics(run).iloc[0]["notes"]


@pytest.mark.parametrize(
    ("top_k", "tokens", "assignments", "expected", "basis"),
    [
        (4, 10, 40, 4.0, "configured top-k"),
        (4, 10, 35, 3.5, "observed 3.500 assignments per token (estimate)"),
        (None, 10, 25, 2.5, "observed 2.500 assignments per token (estimate)"),
        (4, 0, 0, None, "n/a (no tokens or no assignments)"),
        (None, 0, 12, None, "n/a (no tokens or no assignments)"),
        (None, 1, 9, None, "n/a (more assignments per token than experts)"),
    ],
)
def test_the_k_of_a_floor_is_configured_observed_or_unknown(
    top_k, tokens, assignments, expected, basis
) -> None:
    assert floor_top_k(top_k, tokens=tokens, assignments=assignments, experts=8) == (expected, basis)


def test_the_model_value_is_the_plain_mean_over_layers_of_each_phase(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run",
        {
            ("prefill", 0): np.tile([[[300, 100]]], (6, 1, 1)),
            ("prefill", 1): np.tile([[[0, 1]]], (6, 1, 1)),
            ("decode", 0): np.tile([[[1, 1]]], (6, 1, 1)),
        },
    )
    frame = phase_summary(run).set_index("phase")
    assert frame.loc["prefill", "gini"] == pytest.approx((0.25 + 0.5) / 2)
    assert (frame.loc["prefill", "gini_min"], frame.loc["prefill", "gini_max"]) == (0.25, 0.5)
    assert frame.loc["prefill", "gini_low"] == pytest.approx(0.375), "equal steps leave nothing to vary"
    assert frame.loc["decode", "gini"] == 0.0
    assert frame.loc["decode", "layers"] == 1
    cheap = run_summary(run).set_index("phase")
    assert cheap["gini_low"].isna().all()
    assert cheap.drop(columns=["gini_low", "gini_high"]).equals(frame.drop(columns=["gini_low", "gini_high"]))


def test_uniform_routing_lies_on_its_floor_in_the_whole_run_and_in_single_steps(tmp_path: Path) -> None:
    load_SPE = uniform_loads(windows=40, tokens=96, top_k=4, experts=32)[:, None, :]
    row = layer_metrics(write_run(tmp_path / "run", {("prefill", 0): load_SPE}, top_k=4)).iloc[0]
    assert row["gini"] < row["gini_uniform_limit"]
    assert row["step_gini_p50"] == pytest.approx(row["step_gini_floor"], rel=0.05)
    assert row["step_expert_max_over_mean_p50"] == pytest.approx(
        row["step_expert_max_over_mean_floor"], rel=0.07
    )
    assert row["gini_low"] < row["gini"] < row["gini_high"]
    assert row["step_gini_p50"] > 4 * row["gini"], "a step sees fewer tokens than the run"


def test_a_large_run_is_measured_within_seconds() -> None:
    load_SE = np.random.default_rng(0).integers(0, 60, size=(1000, 256))
    one = LayerLoads(
        phase="prefill", layer=0, experts=256, top_k=None, steps=1000, tokens=10**6,
        assignments=int(load_SE.sum()),
        load_E=load_SE.sum(axis=0), step_S=np.arange(1000), window_steps_S=np.ones(1000, dtype=np.int64),
        tokens_S=np.full(1000, 1000), gini_S=np.zeros(1000), max_over_mean_S=np.ones(1000),
        step_max_over_mean_S=np.ones(1000), load_GE=load_SE, rows_per_group=1, incomplete_rows=0,
    )  # fmt: skip
    started = time.perf_counter()
    frame = layer_metrics({("prefill", layer): one for layer in range(61)})
    assert len(frame) == 61
    assert time.perf_counter() - started < 15, "a few seconds on two idle cores"
    assert frame["gini"].iloc[0] == gini(one.load_E)


def test_collected_loads_and_the_run_itself_give_the_same_table(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run", {("prefill", 0): np.random.default_rng(1).integers(5, 90, size=(30, 2, 16))}
    )
    assert layer_metrics(run).equals(layer_metrics(collect_layer_loads(run)))
    assert layer_metrics(run, seed=1)["gini_low"].iloc[0] != layer_metrics(run, seed=2)["gini_low"].iloc[0]

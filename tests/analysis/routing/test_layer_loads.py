from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from observatory.analysis.routing import loads as module
from observatory.analysis.routing.imbalance import gini_rows
from observatory.analysis.routing.loads import collect_layer_loads, steps_covered
from observatory.errors import LoadError
from observatory.run import LoadBlock
from tests.analysis.routing.runs import write_run


def block(load_SPE: np.ndarray, *, first: int = 0, layer: int = 0) -> LoadBlock:
    steps, ranks, experts = load_SPE.shape
    return LoadBlock(
        phase="decode",
        layer=layer,
        experts=experts,
        step_S=np.arange(first, first + steps),
        window_steps_S=np.ones(steps, dtype=np.int64),
        source_rank_P=np.arange(ranks),
        tokens_SP=load_SPE.sum(axis=2),
        assignments_SP=load_SPE.sum(axis=2),
        load_SPE=load_SPE,
        present_SP=np.ones((steps, ranks), dtype=bool),
    )


def run_of(*blocks: LoadBlock) -> Any:
    manifest = SimpleNamespace(model=SimpleNamespace(moe_layers=()))
    return SimpleNamespace(
        manifest=manifest, iter_loads=lambda: iter(blocks), holds_layer=lambda _rank, _layer: True
    )


def test_a_written_run_comes_back_summed_over_ranks_and_apart_by_phase_and_layer(tmp_path: Path) -> None:
    first = [[[1, 2, 3], [4, 0, 0]], [[0, 0, 1], [0, 1, 0]]]  # 2 steps, 2 ranks, 3 experts
    run = write_run(tmp_path / "run", {("prefill", 0): first, ("decode", 2): [[[5, 5], [0, 0]]]})
    collected = collect_layer_loads(run)
    assert list(collected) == [("decode", 2), ("prefill", 0)]
    layer = collected["prefill", 0]
    assert layer.load_E.tolist() == [5, 3, 4]
    assert layer.load_GE.tolist() == [[5, 2, 3], [0, 1, 1]]
    assert layer.tokens_S.tolist() == [10, 2]
    assert (layer.steps, layer.tokens, layer.assignments, layer.top_k) == (2, 12, 12, 1)
    assert layer.max_over_mean_S.tolist() == [1.5, 1.5]
    assert layer.step_max_over_mean_S.tolist() == [1.5, 1.5]
    assert layer.keeps_steps
    assert layer.incomplete_rows == 0


def test_a_step_that_one_rank_never_wrote_is_counted_as_incomplete(tmp_path: Path) -> None:
    load = np.ones((3, 2, 4), dtype=np.int64)
    run = write_run(tmp_path / "run", {("prefill", 0): load}, missing=((1, 1),))
    layer = collect_layer_loads(run)["prefill", 0]
    assert layer.incomplete_rows == 1
    assert layer.load_GE.sum(axis=1).tolist() == [8, 4, 8]


@given(st.integers(1, 70), st.integers(1, 9), st.integers(2, 12))
def test_a_long_run_keeps_every_count_and_every_step_number_in_bounded_memory(
    rows: int, size: int, most: int
) -> None:
    load_SPE = np.random.default_rng(rows).integers(0, 50, size=(rows, 1, 4))
    gatherer = module._Gatherer(block(load_SPE), None, np.ones(1, dtype=bool))
    gatherer.most_groups = most
    for first in range(0, rows, size):
        gatherer.add(block(load_SPE[first : first + size], first=first))
    layer = gatherer.finish()
    load_SE = load_SPE[:, 0]
    assert len(layer.load_GE) <= most + 1
    assert layer.gini_S == pytest.approx(gini_rows(load_SE), nan_ok=True)
    assert layer.load_E.tolist() == load_SE.sum(axis=0).tolist()
    width = layer.rows_per_group
    expected = [load_SE[first : first + width].sum(axis=0).tolist() for first in range(0, rows, width)]
    assert layer.load_GE.tolist() == expected


def test_a_run_that_fits_keeps_single_steps() -> None:
    load_SPE = np.arange(48).reshape(12, 1, 4)
    layer = collect_layer_loads(run_of(block(load_SPE[:5]), block(load_SPE[5:], first=5)))["decode", 0]
    assert layer.rows_per_group == 1
    np.testing.assert_array_equal(layer.load_GE, load_SPE[:, 0])
    assert layer.step_S.tolist() == list(range(12))


def test_extremes_of_windows_are_taken_from_the_file_for_one_rank_and_unknown_for_several(
    tmp_path: Path,
) -> None:
    one = write_run(
        tmp_path / "one", {("decode", 0): [[[3, 1]], [[2, 2]]]}, window_steps=4, step_max_over_mean=1.9
    )
    layer = collect_layer_loads(one)["decode", 0]
    assert (layer.steps, layer.keeps_steps) == (8, False)
    assert layer.step_max_over_mean_S.tolist() == [1.9, 1.9]
    two = write_run(
        tmp_path / "two", {("decode", 0): [[[3, 1], [1, 3]]]}, window_steps=4, step_max_over_mean=1.9
    )
    assert np.isnan(collect_layer_loads(two)["decode", 0].step_max_over_mean_S).all()


def test_windows_of_unequal_length_from_one_step_count_once() -> None:
    assert steps_covered(np.array([0, 4, 4, 8]), np.array([4, 2, 4, 1])) == 9
    assert steps_covered(np.array([], dtype=np.int64), np.array([], dtype=np.int64)) == 0


def test_loads_that_cannot_be_are_refused() -> None:
    load_SPE = np.ones((2, 1, 4), dtype=np.int64)
    with pytest.raises(LoadError, match="out of order"):
        collect_layer_loads(run_of(block(load_SPE, first=5), block(load_SPE)))
    with pytest.raises(LoadError, match="3 experts at step 2 and 4 before"):
        collect_layer_loads(run_of(block(load_SPE), block(load_SPE[:, :, :3], first=2)))
    with pytest.raises(LoadError, match="a load is -1"):
        collect_layer_loads(run_of(block(-load_SPE)))
    with pytest.raises(LoadError, match="more than 2\\*\\*63"):
        collect_layer_loads(run_of(block(load_SPE * 2**62)))

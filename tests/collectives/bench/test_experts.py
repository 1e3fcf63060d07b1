"""Times of experts: what an expert-parallel run calls, with the loads that were asked for."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from observatory.campaign.expert_bench import bench_experts
from observatory.cli import main
from observatory.collectives.bench.experts import ExpertGrid, shape_of, time_experts
from observatory.errors import BenchmarkError
from observatory.probes.routing.discover import find_sites
from observatory.probes.routing.sites import RoutingSite
from observatory.run.documents.expert_bench import load_expert_bench
from observatory.zoo.models import load_model

GRID = ExpertGrid(assignments=(0, 1, 4, 16, 64, 256), activated=(1, 2, 4), warmup=1, repeats=3)


@pytest.fixture(scope="module")
def site() -> RoutingSite:
    return find_sites(load_model("tiny-gqa").model)[0]


@pytest.mark.parametrize(
    ("model", "intermediate", "matrices"),
    [("tiny-mla", 16, 3), ("tiny-gqa", 24, 3), ("tiny-mamba2", 16, 2), ("tiny-gdn", 16, 3)],
)
def test_shapes_are_read_from_the_weights(model: str, intermediate: int, matrices: int) -> None:
    shape = shape_of(find_sites(load_model(model).model)[0])
    assert (shape.hidden, shape.intermediate, shape.experts, shape.top_k) == (96, intermediate, 32, 4)
    assert shape.expert_bytes == matrices * 96 * intermediate * 4
    assert shape.flops == 2 * matrices * 96 * intermediate
    assert shape.row_bytes == 96 * 4


def test_every_call_has_the_assignments_and_the_experts_of_its_point(
    site: RoutingSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []
    kind = type(site.module)
    computed = kind.forward

    def counted(module: torch.nn.Module, *args: torch.Tensor) -> torch.Tensor:
        calls.append((len(args[0]), len(torch.unique(args[1]))))
        assert int(args[1].max()) < 8
        return computed(module, *args)

    monkeypatch.setattr(kind, "forward", counted)
    with torch.inference_mode():
        points = time_experts(site, GRID, experts_here=8).points
    assert [(point.assignments, point.activated) for point in points][:3] == [(0, 0), (1, 1), (4, 1)]
    busy = [(point.assignments, point.activated) for point in points if point.assignments]
    assert sorted(call for call in calls if call in busy)[: 4 * len(busy)]
    assert all(calls.count(point) >= 4 for point in busy)  # a warm-up and three repeats


def test_times_are_those_of_the_clock(site: RoutingSite) -> None:
    ticks = itertools.count(step=7_000)
    with torch.inference_mode():
        timed = time_experts(site, GRID, experts_here=32, clock_ns=lambda: next(ticks))
    points = timed.points
    assert {us for point in points for us in point.us_R} == {7.0}
    assert {len(point.us_R) for point in points} == {3}


@pytest.mark.parametrize("model", ["tiny-mla", "tiny-mamba2", "tiny-gdn"])
def test_shared_experts_and_the_rest_of_the_layer_are_timed_apart(model: str) -> None:
    result = bench_experts(GRID, model=model, ep=4)
    assert result.notes == ()
    assert result.experts_here == 8
    assert sorted(point.tokens for point in result.shared_points) == [1, 4, 16, 64]
    assert sorted(point.tokens for point in result.local_points) == [1, 4, 16, 64]
    assert all(len(point.us_R) == 3 for point in result.local_points)


def test_a_layer_is_as_it_was_afterwards(site: RoutingSite) -> None:
    hidden = torch.randn(1, 5, 96)
    with torch.inference_mode():
        before = site.block(hidden)
        time_experts(site, GRID, experts_here=32)
        after = site.block(hidden)
    assert torch.equal(before, after)
    assert "forward" not in vars(site.module)


def test_a_layer_that_cannot_be_called_alone_is_noted(site: RoutingSite) -> None:
    alone = dataclasses.replace(site, block=None)
    with torch.inference_mode():
        timed = time_experts(alone, GRID, experts_here=32)
    assert timed.local_points == ()
    assert len(timed.notes) == 1


def test_a_shape_is_timed_as_one_rank_holds_it() -> None:
    result = bench_experts(GRID, shape=(16, 40, 64, 4), ep=16, dtype="bfloat16")
    assert result.experts_here == 4
    shape = result.shape
    assert (shape.hidden, shape.intermediate, shape.experts, shape.dtype) == (16, 40, 64, "bfloat16")
    assert max(point.activated for point in result.points) == 4


def test_too_few_points_are_refused_before_anything_is_timed() -> None:
    few = ExpertGrid(assignments=(1, 2), activated=(1,), warmup=0, repeats=1)
    with pytest.raises(BenchmarkError, match="at least 12"):
        few.points(32)


def test_the_command_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "experts.json"
    argv = [
        "bench",
        "experts",
        "--shape",
        "8,8,4,2",
        "--assignments",
        "1,2,4,8,16,32",
        "--activated",
        "1,2,4",
    ]
    assert main([*argv, "--repeats", "3", "--out", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    kept = load_expert_bench(out)
    assert document["kind"] == "bench_experts"
    assert [row["median_us"] for row in document["points"]] == [
        np.median(point.us_R) for point in kept.points
    ]
    assert sum(form["chosen"] for form in document["forms"]) == 1
    assert document["conclusion"]
    assert main([*argv, "--out", str(out)]) == 1
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "exactly one of MODEL and --shape"),
        (["tiny-gqa", "--shape", "8,8,4,2"], "exactly one of MODEL and --shape"),
        (["--shape", "8,8,4"], "H,F,E,K"),
        (["--shape", "8,8,2,4"], "H,F,E,K"),
        (["--shape", "8,8,4,2", "--ep", "3"], "3 ranks do not divide 4 experts"),
        (["--shape", "1000000,1000000,4,2"], "free memory"),
        (["tiny-gqa", "--layer", "99"], "no MoE layer 99"),
        (["tiny-gqa", "--assignments", "x"], "no list of numbers"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "experts", *arguments, "--out", str(tmp_path / "x.json")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert not (tmp_path / "x.json").exists()

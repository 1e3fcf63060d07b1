from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from observatory.campaign.benchmark import write_result
from observatory.cli import main
from observatory.cli.parsing import parse_shape
from observatory.collectives.bench import route_fetch_cases
from observatory.collectives.bench.route_fetch import run_route_fetch
from observatory.collectives.bench.route_fetch_plan import least_bytes, route_fetch_plan
from observatory.collectives.layout import Group
from observatory.errors import BenchmarkError, ExchangeError
from observatory.run.documents.route_fetch import RouteFetchPlan, RouteFetchResult, Shape, load_route_fetch
from tests.collectives.bench.threads import ThreadTransport, on_threads

TEXTS = ("mha:2,16", "gqa:4,2,8", "mla:4,24,8", "sparse:4,24,8,7", "expert:32")


def a_plan(
    *texts: str, points: int = 8, dtype: str = "float32", decoder: tuple[int, int] | None = None
) -> RouteFetchPlan:
    return route_fetch_plan(
        [parse_shape(text, dtype=dtype, decoder=decoder) for text in texts],
        points=points,
        rows=(4, 100),
        sizes=(4, 100),
        layers=(1, 2),
        edits=4 if decoder else 0,
        warmup=1,
        repeats=2,
    )


def measured(
    ranks: int, plan: RouteFetchPlan, kind: type[ThreadTransport] = ThreadTransport
) -> RouteFetchResult:
    result, *others = on_threads(ranks, lambda transport: run_route_fetch(transport, plan), kind)
    assert others == [None] * (ranks - 1)
    assert result is not None
    return result


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_option_of_every_shape_gives_what_one_rank_gives(ranks: int) -> None:
    result = measured(ranks, a_plan(*TEXTS))
    assert [shape.name for shape in result.shapes] == list(TEXTS)
    assert all(case.correct for case in result.cases), [case for case in result.cases if not case.correct]
    assert max(case.worst_error for case in result.cases) < 1e-5
    assert len(result.cases) == 8 * (4 * 2 + 3)
    for case in result.cases:
        assert len(case.total_us_R) == 2
        assert sum(max(times) for times in case.stage_us_R.values()) <= 2 * max(case.total_us_R) * ranks
    attention = {(case.option, *sorted(case.stage_us_R)) for case in result.cases if case.shape == 3}
    assert attention == {(option, "attend", "gather", "merge", "rotate") for option in ("route", "fetch")}


def test_half_precision_is_right_within_what_it_holds() -> None:
    result = measured(2, a_plan("mla:4,24,8", "expert:32", dtype="bfloat16"))
    assert all(case.correct for case in result.cases)
    assert result.cases[0].worst_error > 1e-4


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_cache_that_is_made_or_edited_here_is_that_of_a_prefill(ranks: int) -> None:
    result = measured(
        ranks, a_plan("mha:2,16", "gqa:4,2,8", "mla:4,24,8", "sparse:4,24,8,7", decoder=(24, 40))
    )
    assert all(case.correct for case in result.cases), [case for case in result.cases if not case.correct]
    assert max(case.worst_error for case in result.cases) < 1e-5
    options = [{case.option for case in result.cases if case.shape == shape} for shape in range(4)]
    assert options[:3] == [{"route", "fetch", "local", "splice", "trim"}] * 3
    assert options[3] == {"route", "fetch"}, "a prefill attends to all"
    stages = {case.option: set(case.stage_us_R) for case in result.cases}
    assert stages["local"] == {"prefill", "attend", "merge"}
    assert (stages["splice"], stages["trim"]) == ({"splice"}, {"prefill"})


class _Lossy(ThreadTransport):
    """Loses the last byte of long messages."""

    def _all_to_all(
        self, rows: torch.Tensor, send_G: list[int], receive_G: list[int], group: Group
    ) -> torch.Tensor:
        received = super()._all_to_all(rows, send_G, receive_G, group)
        if rows.dtype == torch.uint8 and len(received) > 4000:
            received[-1] ^= 0x7F
        return received


def test_a_fabric_that_changes_a_byte_is_found_and_its_times_are_written_all_the_same(tmp_path: Path) -> None:
    result = measured(2, a_plan("mha:2,16", "expert:32"), _Lossy)
    wrong = [case for case in result.cases if not case.correct]
    assert wrong
    assert {case.option for case in wrong} <= {"route", "fetch"}
    with pytest.raises(ExchangeError, match="other results than one rank alone"):
        write_result(result, tmp_path / "rf.json")
    assert load_route_fetch(tmp_path / "rf.json") == result


def test_points_fill_the_rectangle_in_whole_tokens() -> None:
    shape = parse_shape("mla:4,24,8")
    plan = route_fetch_plan(
        [shape], points=64, rows=(16, 1600), sizes=(10, 1000), layers=(1, 3), warmup=1, repeats=1
    )
    rows, sizes = ([getattr(point, name) for point in plan.points[0]] for name in ("rows", "size"))
    assert len(set(zip(rows, sizes, strict=True))) == 64
    assert all(row % 4 == 0 for row in rows)
    for values, low in ((rows, 16), (sizes, 10)):
        assert low <= min(values) < 1.3 * low
        assert 77 * low < max(values) <= 100 * low
        assert sum(value < 10 * low for value in values) == pytest.approx(32, abs=3)


def test_the_memory_of_a_plan_is_at_least_what_its_largest_points_draw() -> None:
    def bytes_of(text: str) -> int:
        ends = {"rows": (8, 8), "sizes": (10, 10)}
        plan = route_fetch_plan([parse_shape(text)], points=8, **ends, layers=(3,), warmup=1, repeats=1)
        return least_bytes(plan, 2)

    # On each of two ranks a cache of 3 layers, 10 tokens and 2 x 2 x 16 values, twice, and 8 queries of 16 in
    # each layer; once 8 x 10 scores. Four bytes for each value.
    assert bytes_of("mha:2,16") == 4 * (2 * 3 * (2 * 10 * 64 + 8 * 16) + 8 * 10)
    # Three matrices of 10 x 32, 8 tokens of 32; once 8 x 10 activations.
    assert bytes_of("expert:32") == 4 * (2 * (3 * 10 * 32 + 8 * 32) + 8 * 10)


def test_ranks_that_have_nothing_to_hold_are_refused() -> None:
    with pytest.raises(ExchangeError, match="cannot be held by 8 ranks"):
        on_threads(9, lambda transport: run_route_fetch(transport, a_plan("mha:2,16")))
    with pytest.raises(ExchangeError, match="nowhere to send"):
        on_threads(1, lambda transport: run_route_fetch(transport, a_plan("mha:2,16")))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--shape", "mha"], "mha:HEADS,DIM"),
        (["--shape", "gqa:5,2,8"], "cannot share"),
        (["--shape", "mha:2,7"], "odd"),
        (["--shape", "expert:0"], "1 to 16777216"),
        (["--shape", "expert:²"], "1 to 16777216"),
        (["--dtype", "int8"], "float32, bfloat16, float16"),
        (["--rows", "9,3"], "LOW,HIGH"),
        (["--layers", "0"], "numbers from 1"),
        (["--prefill", "256"], "HIDDEN,INNER"),
        (["--points", "4096", "--repeats", "1000"], "fewer points or repeats"),
        (["--device", "abacus"], "cpu or cuda"),
        (["--rows", "16777216,16777216", "--sizes", "16777216,16777216", "--points", "8"], "GB"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    argv: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "route-fetch", *argv, "--out", str(tmp_path / "rf.json")]) == 1
    err = capsys.readouterr().err
    assert said in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("text", ["{}", '{"schema_version": "9.0"}', "[]", '{"shapes": []}'])
def test_a_file_that_is_no_measurement_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "rf.json").write_text(text)
    with pytest.raises(BenchmarkError, match="route-fetch measurement"):
        load_route_fetch(tmp_path / "rf.json")


@pytest.mark.slow
def test_the_command_starts_its_own_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rf.json"
    argv = ["bench", "route-fetch", "--shape", "mla:4,24,8", "--shape", "expert:32", "--points", "8"]
    argv += ["--rows", "8,64", "--sizes", "8,64", "--repeats", "2", "--out", str(out)]
    assert main([*argv, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["kind"] == "bench_route_fetch"
    assert [(row["shape"], row["option"], row["points"], row["correct"]) for row in document["rows"]] == [
        ("mla:4,24,8", "route", 8, True),
        ("mla:4,24,8", "fetch", 8, True),
        ("expert:32", "route", 8, True),
        ("expert:32", "fetch", 8, True),
        ("expert:32", "local", 8, True),
    ]
    assert len(load_route_fetch(out).cases) == len(document["points"]) == 40


@pytest.mark.parametrize(("name", "wrong_option"), [("turn_queries", "route"), ("turn_entries", "fetch")])
def test_a_position_that_is_not_corrected_is_a_wrong_result(
    name: str, wrong_option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(route_fetch_cases, name)

    def faulty(values: torch.Tensor, shift: torch.Tensor, shape: Shape) -> torch.Tensor:
        # Only what an option turns by one shift for all; positions of the data stay right.
        return values if shift.ndim == 0 else right(values, shift, shape)

    monkeypatch.setattr(route_fetch_cases, name, faulty)
    result = measured(2, a_plan("gqa:4,2,8", "mla:4,24,8"))
    assert {case.option for case in result.cases if not case.correct} == {wrong_option}
    assert all(not case.correct for case in result.cases if case.option == wrong_option)

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from observatory.advice.route_fetch import known_constants
from observatory.analysis.route_fetch.choosing import (
    break_even_rows,
    compared_options,
    decision_map,
    edit_costs,
)
from observatory.analysis.route_fetch.costs import TERMS, Sizes, cost
from observatory.analysis.route_fetch.fitting import fit_shape, hold_out_points
from observatory.cli import main
from observatory.cli.parsing import parse_shape
from observatory.errors import BenchmarkError
from observatory.run.documents.route_fetch import RouteFetchResult
from tests.analysis.energy.test_prefix_cache import measured as measured_reuse
from tests.analysis.route_fetch.made import TRUTH, made_result

TEXTS = ("mla:4,128,32", "sparse:4,128,32,100", "expert:256")


@pytest.mark.parametrize("index", range(len(TEXTS)), ids=TEXTS)
def test_the_fit_recovers_the_constants_of_a_made_measurement(index: int) -> None:
    result = made_result(*TEXTS, noise=0.02)
    constants = fit_shape(result, index, bootstrap=50)
    trip, out, back = constants.stages["transfer"].us_F
    assert trip == pytest.approx(TRUTH["transfer"][0], rel=0.1)
    assert (out, back) == pytest.approx(TRUTH["transfer"][1:], rel=0.03)
    fewest, most = constants.domain["rows"]
    assert fewest < 20
    assert most > 700
    for stage, costs in constants.stages.items():
        assert costs.samples_BF.shape == (50, len(TERMS[stage]))


@pytest.mark.parametrize("text", TEXTS)
def test_held_out_points_are_predicted_and_the_faster_option_picked(text: str) -> None:
    held_out = hold_out_points(made_result(text, noise=0.05), 0)
    assert held_out.knee_bytes == pytest.approx(5000, rel=0.15), "400 us at 12.5 bytes a microsecond"
    above = held_out.mape(("route", "fetch"), above=True)
    assert above is not None
    assert above < 0.05
    predicted, measured, apart, lost = held_out.winners(("route", "fetch"))
    assert apart.sum() > 50
    assert {0, 1} == set(measured[apart].tolist())
    assert (predicted == measured)[apart].mean() >= 0.95
    assert lost.mean() < 0.005


def test_times_without_any_rule_are_not_predicted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = made_result("mla:4,128,32")
    drawn = np.random.default_rng(0).permutation(len(result.cases)).tolist()
    cases = tuple(
        case.model_copy(
            update={name: getattr(result.cases[other], name) for name in ("total_us_R", "stage_us_R")}
        )
        for case, other in zip(result.cases, drawn, strict=True)
    )
    held_out = hold_out_points(result.model_copy(update={"cases": cases}), 0)
    above = held_out.mape(("route", "fetch"), above=True)
    assert above is not None
    assert above > 0.5
    predicted, measured, apart, _ = held_out.winners(("route", "fetch"))
    assert (predicted == measured)[apart].mean() < 0.8
    path = tmp_path / "rf.json"
    path.write_text(result.model_copy(update={"cases": cases}).model_dump_json())
    assert main(["route-fetch", "--constants", str(path), "--bootstrap", "20"]) == 0
    assert "do not rely on these costs" in capsys.readouterr().out


def test_the_map_agrees_with_the_break_even_and_doubts_what_lies_near_it() -> None:
    constants = fit_shape(made_result("mla:4,128,32", noise=0.1), 0, bootstrap=50)
    shape = constants.shape
    assert shape is not None
    rows_R = np.geomspace(16, 1600, 12)
    item = decision_map(
        constants,
        shape,
        rows_R=rows_R,
        size_C=np.array([200.0]),
        layers=3,
        uses=1.0,
        options=("route", "fetch"),
    )
    even = break_even_rows(constants, shape, size=200, layers=3)
    assert even is not None
    assert even.low is not None
    assert even.high is not None
    assert even.low < even.value < even.high
    assert [int(best) for best in item.best_CR[0]] == [int(rows > even.value) for rows in rows_R]
    assert item.certainty_CR[0, [0, -1]].tolist() == [1.0, 1.0]
    assert item.measured_CR[0, 3]
    assert not item.measured_CR[0, -1], "1600 rows were not measured"


def wrong(result: RouteFetchResult) -> RouteFetchResult:
    cases = (result.cases[0].model_copy(update={"correct": False}), *result.cases[1:])
    return result.model_copy(update={"cases": cases})


def test_wrong_results_and_too_few_points_are_refused() -> None:
    with pytest.raises(BenchmarkError, match="wrong results"):
        fit_shape(wrong(made_result("expert:256")), 0)
    with pytest.raises(BenchmarkError, match="fewer than 8 points"):
        hold_out_points(made_result("expert:256", points=4), 0)


def test_the_command_prints_accuracy_break_even_and_a_map(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rf.json"
    path.write_text(made_result(*TEXTS, noise=0.05).model_dump_json())
    argv = ["route-fetch", "--constants", str(path), "--layers", "3", "--bootstrap", "20"]
    assert main([*argv, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["kind"], document["grade"], document["ranks"]) == ("route_fetch", "fitted", 2)
    assert [row["shape"] for row in document["accuracy"]] == list(TEXTS)
    assert {row["option"] for row in document["map"]} == {"route", "fetch"}
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "mla:4,128,32: R route, F fetch" in out
    assert [reason["code"] for reason in document["conclusion"]] == ["fetch_from"] * 3
    assert "fetching costs less from" in out
    assert main([*argv, "--shape", "gqa:8,2,64"]) == 1
    assert "no measurement of kind gqa" in capsys.readouterr().err


def test_published_constants_say_so_and_never_mix_with_measured_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = [
        "route-fetch",
        "--constants",
        "published:h100-ndr200",
        "--shape",
        "mla:16,512,64",
        "--layers",
        "27",
    ]
    assert main([*argv, "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert (document["grade"], document["accuracy"]) == ("published", [])
    assert "2606.01502" in document["source"]
    assert not any(row["measured"] for row in document["map"])
    assert "nothing was measured on this fabric" in captured.err
    assert main(argv[:3]) == 1
    assert "give --shape" in capsys.readouterr().err


def test_edits_and_a_prefill_are_fitted_and_their_ratio_grows_with_the_suffix() -> None:
    result = made_result("mla:4,128,32", noise=0.03, edits=24, decoder=(64, 128))
    constants = fit_shape(result, 0, bootstrap=30)
    shape = constants.shape
    assert shape is not None
    assert compared_options(constants, shape) == ("route", "fetch", "local")
    unknown_layers = shape.model_copy(update={"hidden": None, "inner": None})
    assert compared_options(constants, unknown_layers) == ("route", "fetch")
    some = np.array([16.0])
    assert edit_costs(constants, unknown_layers, spans=some, suffixes=some, layers=3) == []
    rows = edit_costs(
        constants, shape, spans=np.array([16.0]), suffixes=np.array([16.0, 160.0, 5000.0]), layers=3
    )
    # By hand: 8 tokens of the new span and 160 of the suffix in 3 layers of 160 values of 4 bytes.
    layer, byte = TRUTH["splice"]
    assert rows[1]["splice_us"] == pytest.approx(3 * layer + 3 * 168 * 640 * byte, rel=0.05)
    assert rows[0]["ratio"] < rows[1]["ratio"] < rows[2]["ratio"]
    assert [row["measured"] for row in rows] == [True, True, False]
    predicted, measured, apart, _ = hold_out_points(result, 0).winners(("splice", "trim"))
    assert (predicted == measured)[apart].all()


def test_a_measured_reuse_takes_the_place_of_a_fitted_prefill() -> None:
    from observatory.analysis.route_fetch.reuse import measured_prefill

    constants = fit_shape(made_result("mla:4,128,32", edits=24, decoder=(64, 128)), 0, bootstrap=20)
    shape = constants.shape
    assert shape is not None
    prefill = measured_prefill(measured_reuse((37e3, 45e3, 18e3)))
    assert prefill.prompt_tokens == 4096
    size_C = np.array([16.0, 4096.0, 5000.0])
    # An exact hit costs 37 J, a miss 37 + 45 + 18 J (the fitted form of the fixture).
    assert prefill.mj(size_C)[1] == pytest.approx(100e3, rel=0.02)
    assert np.isnan(prefill.mj(size_C)[2]), "longer than the prompt"
    item = decision_map(
        constants, shape, rows_R=np.array([16.0]), size_C=size_C, layers=1, uses=1.0,
        options=("route", "fetch", "local"), prefill_us_C=prefill.us(size_C),
    )  # fmt: skip
    others = cost(constants, shape, "fetch", Sizes(rows=16.0, size=16.0)).us
    assert item.us_OCR[2, 0, 0] > prefill.us(size_C)[0]
    assert item.us_OCR[2, 0, 0] < prefill.us(size_C)[0] + others, "nothing of the fitted prefill is added"
    assert item.us_OCR[2, 2, 0] == np.inf


def test_only_the_shape_that_was_measured_counts_as_measured() -> None:
    result = made_result("mla:4,128,32")
    constants = fit_shape(result, 0)
    measured, wider = result.shapes[0], parse_shape("mla:4,256,64", dtype="float32")
    assert constants.covers(measured, size=(100,))
    assert not constants.covers(wider, size=(100,))
    assert constants.beyond(measured, size=(100,)) == 1.0
    # Entries of twice the bytes, in chunks of twice the longest that was measured.
    longest = constants.domain["size"][1]
    assert constants.beyond(wider, size=(2 * longest,)) == pytest.approx(4.0)


def test_a_measurement_with_prefill_is_of_the_shape_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "rf.json"
    path.write_text(made_result("mla:4,128,32", decoder=(64, 128)).model_dump_json())
    answers, notes = known_constants(str(path), [parse_shape("mla:4,128,32", dtype="float32")], bootstrap=20)
    assert notes == []
    assert answers[0][0].can_prefill


def test_a_measurement_that_lacks_a_part_is_refused() -> None:
    result = made_result("mla:4,128,32", repeats=1)
    untimed = [case.model_copy(update={"stage_us_R": {}}) for case in result.cases]
    edits = [case.model_copy(update={"option": "splice"}) for case in result.cases]
    routed = [case for case in result.cases if case.option == "route"]
    for cases, said in (
        (untimed, "without its attend"),
        (edits, "without its splice"),
        (routed, "both routed and fetched"),
    ):
        with pytest.raises(BenchmarkError, match=said):
            fit_shape(result.model_copy(update={"cases": tuple(cases)}), 0)


def test_sizes_of_nothing_are_not_divided_by() -> None:
    constants = fit_shape(made_result("mla:4,128,32"), 0, bootstrap=20)
    none = replace(constants, domain={**constants.domain, "rows": (0.0, 0.0)})
    assert none.shape is not None
    assert np.isfinite(none.beyond(none.shape, rows=(16.0,)))

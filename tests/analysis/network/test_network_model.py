"""The network model against results made by known formulas."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from observatory.analysis.network import NetworkModel, fit_network, load_network, predict_us
from observatory.analysis.network.checking import check_predictions, error_summary
from observatory.analysis.network.features import BYTE_TERMS, FORMS, TERMS, stage_terms
from observatory.analysis.network.parts import Part, factors_of
from observatory.analysis.network.words import NetworkCode, sentence
from observatory.cli import main
from observatory.errors import BenchmarkError
from tests.analysis.network.synthetic import made_result

TWO_NODES = (0, 0, 1, 1)


def hockney(bytes_PP: NDArray[np.int64], node_of_P: tuple[int, ...]) -> float:
    """20 us, 50 GB/s kept, 10 GB/s inside a node, 2 GB/s to others, full duplex, slowest rank."""
    del node_of_P
    same = np.array(TWO_NODES)[:, None] == np.array(TWO_NODES)[None, :]
    own = np.diagonal(bytes_PP)
    inside = np.where(same, bytes_PP, 0) - np.diag(own)
    across = np.where(same, 0, bytes_PP)
    per_rank = own / 50e3
    for matrix, speed in ((inside, 10e3), (across, 2e3)):
        per_rank = per_rank + np.maximum(matrix.sum(axis=0), matrix.sum(axis=1)) / speed
    return 20.0 + float(per_rank.max())


def coefficients(model: NetworkModel) -> dict[str, float | None]:
    return {item.term: item.us_per_unit for item in model.of("flat").coefficients}


def test_the_terms_of_a_matrix_computed_by_hand() -> None:
    bytes_PP = np.array([[5, 10, 0, 20], [0, 0, 0, 40], [1, 0, 0, 0], [0, 0, 2, 7]])
    terms = stage_terms(bytes_PP, TWO_NODES, "flat")
    rows = dict(zip(TERMS, terms.terms_SPF.reshape(-1, len(TERMS)).T.tolist(), strict=True))
    assert rows["exchange"] == [1, 1, 1, 1]
    assert rows["peers"] == [3, 3, 3, 3]
    assert rows["pairs_on_node"] == [2, 2, 2, 2]
    assert rows["bytes_self"] == [5, 0, 0, 7]
    assert rows["bytes_node"] == [10, 10, 2, 2]
    assert rows["bytes_other"] == [20, 40, 1, 60]
    assert rows["out_other"] == [20, 40, 1, 0]
    assert rows["in_other"] == [1, 0, 0, 60]
    assert rows["out_all"] == [30, 40, 1, 2]
    assert rows["in_all"] == [1, 10, 2, 60]
    assert rows["shared_self"] == [5, 5, 7, 7]
    # node 0 sends 10 + 20 + 40 and receives 10 + 1; node 1 sends 2 + 1 and receives 2 + 60
    assert rows["shared_bytes"] == [81, 81, 65, 65]
    assert rows["link_out"] == [60, 60, 1, 1]
    assert rows["link_in"] == [1, 1, 60, 60]
    # Rank 0 sends rank 2 nothing, rank 2 sends it 1; ranks 0 and 1, 2 and 3 send one way only.
    assert rows["link_two_way"] == [0, 0, 0, 0]
    assert rows["two_way"] == [0, 0, 0, 0]


def test_bytes_that_pass_both_ways_are_counted_pair_by_pair_at_both_ends() -> None:
    bytes_PP = np.array([[0, 10, 7, 0], [4, 0, 0, 9], [2, 0, 0, 0], [0, 30, 0, 0]])
    rows = dict(zip(TERMS, stage_terms(bytes_PP, TWO_NODES, "flat").terms_SPF[0].T.tolist(), strict=True))
    # Pairs 0-1, 0-2 and 1-3: the smaller ways are 4, 2 and 9 bytes.
    assert rows["two_way"] == [6, 13, 2, 9]
    assert rows["link_two_way"] == [11, 11, 11, 11]


def test_the_bytes_of_a_slower_part_count_so_many_times() -> None:
    bytes_PP = np.array([[5, 10, 20], [1, 0, 30], [2, 3, 0]])
    nodes = (0, 1, 2)
    parts = [
        Part(code="rank_sends", who=(0,), node_of_P=nodes, factor=2.0),
        Part(code="pair", who=(1, 2), node_of_P=nodes, factor=3.0),
        Part(code="rank", who=(2,), node_of_P=(0, 0, 1), factor=9.0),
    ]
    terms = stage_terms(bytes_PP, nodes, "flat", factors=factors_of(parts, nodes))
    rows = dict(zip(TERMS, terms.terms_SPF.reshape(-1, len(TERMS)).T.tolist(), strict=True))
    assert rows["out_other"] == [60, 91, 5]
    assert rows["in_other"] == [3, 13, 110]
    assert rows["bytes_self"] == [5, 0, 0]
    assert factors_of(parts, (0, 0, 0)) is None


def test_the_hierarchical_algorithm_has_two_stages_that_add_up() -> None:
    bytes_PP = np.array([[5, 10, 0, 20], [0, 0, 0, 40], [1, 0, 0, 0], [0, 0, 2, 7]])
    terms = stage_terms(bytes_PP, TWO_NODES, "hierarchical")
    rows = dict(zip(TERMS, terms.terms_SPF.reshape(-1, len(TERMS)).T.tolist(), strict=True))
    assert terms.terms_SPF.shape == (2, 4, len(TERMS))
    # Across: rank 0 hands 0 + 20 to rank 2, rank 1 hands 40 to rank 3, rank 2 hands 1 + 0 to rank 0.
    assert rows["bytes_other"][:4] == [20, 40, 20, 40]
    assert rows["bytes_self"][:4] == [15, 0, 0, 9]
    # Inside: rank 0 holds 5 + 1 for itself and 10 for rank 1; rank 2 got 20 for rank 3; rank 3 holds 40 + 7.
    assert rows["bytes_self"][4:] == [6, 0, 0, 47]
    assert rows["bytes_node"][4:] == [10, 10, 20, 20]
    assert rows["bytes_other"][4:] == [0, 0, 0, 0]


def test_known_latency_and_bandwidths_come_back_and_the_simplest_true_form_is_chosen() -> None:
    model = fit_network([made_result(hockney, TWO_NODES, noise=0.01)], bootstrap=30)
    assert model.of("flat").form == "two-way"
    found = coefficients(model)
    assert found["start"] == pytest.approx(20.0, rel=0.05)
    assert found["bytes_node"] == pytest.approx(1e-4, rel=0.05)
    assert found["bytes_other"] == pytest.approx(5e-4, rel=0.05)
    assert found["bytes_self"] == pytest.approx(2e-5, rel=0.25)
    across = next(item for item in model.of("flat").coefficients if item.term == "bytes_other")
    assert across.gb_per_s == pytest.approx(2.0, rel=0.05)
    assert across.low_us is not None
    assert across.high_us is not None
    assert across.low_us <= 5e-4 * 1.01
    assert across.high_us >= 5e-4 * 0.99


@pytest.mark.parametrize("name", sorted(FORMS))
def test_every_form_recovers_what_it_made_itself(name: str) -> None:
    form = FORMS[name]
    generator = np.random.default_rng(3)
    true = {term: (generator.uniform(2e-4, 9e-4) if term in BYTE_TERMS else 15.0) for term in form.terms}
    value_F = np.array([true[term] for term in form.terms])

    def truth_us(bytes_PP: NDArray[np.int64], node_of_P: tuple[int, ...]) -> float:
        rows = stage_terms(bytes_PP, node_of_P, "flat").terms_SPF[0][:, form.columns]
        return float(max((rows * sum_F @ value_F).max() for sum_F in form.sums_XF))

    results = [made_result(truth_us, nodes) for nodes in ((0, 0), TWO_NODES, (0, 0, 0, 0, 1, 1, 1, 1))]
    model = fit_network(results, bootstrap=0)
    scores = {score.form: score for score in model.of("flat").scores}
    assert scores[name].p90_error < 0.02, model.of("flat").scores
    chosen = scores[model.of("flat").form]
    assert chosen.median_error < 0.02
    held_out = made_result(truth_us, (0, 0, 0, 1, 1, 1), seeds=1)
    summary = error_summary(check_predictions(model, held_out))
    assert summary["median_error"].max() < 0.05


def test_a_few_disturbed_matrices_do_not_bend_the_model() -> None:
    result = made_result(hockney, TWO_NODES, noise=0.01)
    cases = list(result.cases)
    for index in range(0, len(cases), 12):
        slow = tuple(tuple(30.0 * us for us in repeat) for repeat in cases[index].rank_us_RP)
        cases[index] = cases[index].model_copy(update={"rank_us_RP": slow})
    model = fit_network([result.model_copy(update={"cases": tuple(cases)})], bootstrap=0)
    found = coefficients(model)
    link = found.get("bytes_other")
    assert link == pytest.approx(5e-4, rel=0.1)


def test_an_interval_holds_most_measurements_that_the_fit_did_not_see() -> None:
    model = fit_network([made_result(hockney, TWO_NODES, noise=0.1)], bootstrap=50)
    fresh = made_result(hockney, TWO_NODES, noise=0.1, seeds=5, patterns=("random", "skewed", "sparse"))
    checked = check_predictions(model, fresh)
    inside = (checked["measured_us"] >= checked["low_us"]) & (checked["measured_us"] <= checked["high_us"])
    assert inside.mean() > 0.8
    assert (checked["low_us"] <= checked["predicted_us"]).all()


def test_outside_the_measurements_a_prediction_says_so() -> None:
    model = fit_network([made_result(hockney, TWO_NODES)], bootstrap=0)
    inside = predict_us(model, np.full((4, 4), 1000), TWO_NODES)
    assert inside.extrapolated == ()
    assert inside.us == pytest.approx(hockney(np.full((4, 4), 1000), TWO_NODES), rel=0.02)
    more = predict_us(model, np.full((8, 8), 1000), (0, 0, 1, 1, 2, 2, 3, 3))
    assert [sentence(reason) for reason in more.extrapolated] == [
        "8 ranks (measured 4)",
        "4 nodes (measured 2)",
    ]
    (reason,) = predict_us(model, np.full((4, 4), 1 << 30), TWO_NODES).extrapolated
    assert reason.code == NetworkCode.BYTES_ABOVE
    assert "bytes on one rank (measured up to" in sentence(reason)


def test_links_that_were_never_measured_are_refused_not_guessed() -> None:
    one_node = made_result(lambda bytes_PP, _: 10.0 + float(bytes_PP.sum()) / 1e3, (0, 0, 0, 0))
    model = fit_network([one_node], bootstrap=0)
    assert predict_us(model, np.full((4, 4), 100), (0, 0, 0, 0)).us > 0
    with pytest.raises(BenchmarkError, match=r"never measured .*benchmark across nodes"):
        predict_us(model, np.full((4, 4), 100), TWO_NODES)


def test_terms_that_never_vary_alone_are_named_and_not_invented() -> None:
    result = made_result(
        hockney, TWO_NODES, patterns=("uniform",), sizes_bytes=[1 << k for k in range(10, 24)]
    )
    fit = fit_network([result], bootstrap=0).of("flat")
    reasons = {item.term: item.reason for item in fit.coefficients}
    assert next(reason for term, reason in reasons.items() if term.endswith("_self")) == (
        "not told apart from the terms before it"
    )
    assert all((item.us_per_unit is None) == (item.reason is not None) for item in fit.coefficients)


def test_data_that_cannot_be_fitted_is_refused_with_the_reason() -> None:
    with pytest.raises(BenchmarkError, match="no benchmark result"):
        fit_network([])
    with pytest.raises(BenchmarkError, match="delivered wrong bytes"):
        fit_network([made_result(hockney, TWO_NODES, correct=False)])
    with pytest.raises(BenchmarkError, match="too few to fit"):
        fit_network([made_result(hockney, TWO_NODES, patterns=("uniform",), sizes_bytes=[1024])])
    other = made_result(hockney, TWO_NODES).model_copy(update={"backend": "mpi"})
    with pytest.raises(BenchmarkError, match="backends made-up, mpi"):
        fit_network([made_result(hockney, TWO_NODES), other])
    model = fit_network([made_result(hockney, TWO_NODES)], bootstrap=0)
    with pytest.raises(BenchmarkError, match="is of flat, not of 'gather'"):
        predict_us(model, np.zeros((4, 4)), TWO_NODES, algorithm="gather")
    with pytest.raises(BenchmarkError, match="cannot be checked"):
        check_predictions(model, other)


def test_what_was_fitted_is_neither_fitted_twice_nor_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = made_result(hockney, TWO_NODES)
    with pytest.raises(BenchmarkError, match="given twice"):
        fit_network([made, made_result(hockney, TWO_NODES)], bootstrap=0)
    first, copied = tmp_path / "first.json", tmp_path / "copied.json"
    for path in (first, copied):
        path.write_text(made.model_dump_json())
    argv = ["fit", str(first), "--check", str(copied), "--out", str(tmp_path / "fit.json")]
    assert main([*argv, "--bootstrap", "0"]) == 1
    assert "copied.json is among the results that the model is fitted to" in capsys.readouterr().err


def test_a_model_survives_its_file(tmp_path: Path) -> None:
    model = fit_network([made_result(hockney, TWO_NODES)], bootstrap=5, sources=["bench.json"])
    path = tmp_path / "fit.json"
    path.write_text(model.model_dump_json())
    assert load_network(path) == model


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema_version": "9.0"}, "has schema 9.0, this program reads up to 3.0"),
        ({"fits": []}, "not valid"),
        ({"backend": None}, "not valid"),
    ],
)
def test_a_damaged_or_newer_model_is_one_clear_line(
    change: dict[str, object], said: str, tmp_path: Path
) -> None:
    model = fit_network([made_result(hockney, TWO_NODES)], bootstrap=0)
    path = tmp_path / "fit.json"
    path.write_text(json.dumps(json.loads(model.model_dump_json()) | change))
    with pytest.raises(BenchmarkError, match=said):
        load_network(path)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("domain", "ranks"), []),
        (("domain", "nodes"), []),
        (("ratio_Q", 0), -5.0),
        (("ratio_Q", 0), 1e300),
        (("samples_BF",), [[1e300] * 4]),
        (("coefficients", 0, "us_per_unit"), None),
        (("coefficients", 0, "reason"), "never measured"),
    ],
)
def test_a_model_that_no_fit_writes_is_refused(
    where: tuple[str | int, ...], value: object, tmp_path: Path
) -> None:
    document = json.loads(fit_network([made_result(hockney, TWO_NODES)], bootstrap=0).model_dump_json())
    (*parents, last), inner = where, document["fits"][0]
    for key in parents:
        inner = inner[key]
    inner[last] = value
    path = tmp_path / "fit.json"
    path.write_text(json.dumps(document))
    with pytest.raises(BenchmarkError, match="not valid"):
        load_network(path)


@pytest.mark.parametrize("value", ["NaN", "-1", "1e999", "1e308"])
def test_coefficients_that_cannot_be_are_refused(value: str, tmp_path: Path) -> None:
    text = fit_network([made_result(hockney, TWO_NODES)], bootstrap=0).model_dump_json()
    at = text.index('"us_per_unit":') + len('"us_per_unit":')
    path = tmp_path / "fit.json"
    path.write_text(text[:at] + value + text[text.index(",", at) :])
    with pytest.raises(BenchmarkError, match="not valid"):
        load_network(path)


def test_a_form_with_the_wrong_terms_is_refused(tmp_path: Path) -> None:
    document = json.loads(fit_network([made_result(hockney, TWO_NODES)], bootstrap=0).model_dump_json())
    document["fits"][0]["coefficients"].pop()
    path = tmp_path / "fit.json"
    path.write_text(json.dumps(document))
    with pytest.raises(BenchmarkError, match="coefficients are not those of form"):
        load_network(path)

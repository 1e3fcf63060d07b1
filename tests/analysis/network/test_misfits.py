"""Ranks, pairs and directions that a fit does not describe are named, and clean measurements name none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from observatory.analysis.network import NetworkModel, fit_network, load_network, predict_us
from observatory.analysis.network.checking import check_predictions, error_summary
from observatory.analysis.network.comparison import compare_times
from observatory.analysis.network.network import AlgorithmFit
from observatory.analysis.network.words import verdict_sentence
from observatory.cli import main
from observatory.errors import BenchmarkError
from observatory.run.documents.bench import BenchResult
from observatory.run.manifest import CoreSpec
from tests.analysis.network.synthetic import made_result
from tests.reports.sample_benchmarks import saved

PATTERNS = ("uniform", "routed", "skewed", "random", "sparse", "empty")
SIZES = (4 << 10, 32 << 10, 200_000)
#: Microseconds per byte of a link of 40 Mbit/s.
USUAL = 0.2


def links(
    *,
    up: Mapping[int, float] = {},
    down: Mapping[int, float] = {},
    pair: Mapping[tuple[int, int], float] = {},
    every: tuple[float, float] = (1.0, 1.0),
) -> Any:
    """Links full duplex; some ranks (from the last where negative), or a pair, so many times slower."""

    def truth_us(bytes_PP: NDArray[np.int64], node_of_P: tuple[int, ...]) -> float:
        del node_of_P
        ranks = len(bytes_PP)
        moved = bytes_PP - np.diag(np.diagonal(bytes_PP))
        slow = [
            [own.get(rank, own.get(rank - ranks, 1.0)) * usual for rank in range(ranks)]
            for own, usual in zip((up, down), every, strict=True)
        ]
        us = max(
            USUAL * float((moved.sum(axis=1) * slow[0]).max()),
            USUAL * float((moved.sum(axis=0) * slow[1]).max()),
        )
        for (i, j), times in pair.items():
            us = max(us, USUAL * times * float(moved[i, j]))
        return max(1000.0 + 200.0 * (ranks - 1), us)

    return truth_us


def measured(
    truth: Any,
    node_of_P: tuple[int, ...],
    *,
    noise: float = 0.08,
    seed: int = 0,
    repeats: int = 5,
    seeds: int = 2,
) -> BenchResult:
    """Every pattern is off by some percent of its own, and every repeat besides."""
    generator = np.random.default_rng(seed + 10 * len(node_of_P))
    made = made_result(truth, node_of_P, patterns=PATTERNS, sizes_bytes=SIZES, repeats=repeats, seeds=seeds)
    off: dict[object, float] = {}
    cases = []
    for case in made.cases:
        own = off.setdefault((case.pattern, case.seed), float(np.exp(0.06 * generator.standard_normal())))
        factor_R1 = own * np.exp(noise * generator.standard_normal((repeats, 1)))
        us_RP = np.array(case.rank_us_RP) * factor_R1
        cases.append(case.model_copy(update={"rank_us_RP": tuple(map(tuple, us_RP.tolist()))}))
    return made.model_copy(update={"cases": tuple(cases)})


def fitted(truth: Any, *, ranks: tuple[int, ...] = (3, 5, 6), seed: int = 0) -> AlgorithmFit:
    results = [measured(truth, tuple(range(number)), seed=seed) for number in ranks]
    return fit_network(results, bootstrap=0, seed=seed).of("flat")


@cache
def slow_rank_0() -> NetworkModel:
    truth = links(up={0: 5.0}, down={0: 5.0})
    return fit_network([measured(truth, tuple(range(number))) for number in (3, 5, 6)], bootstrap=0)


@cache
def clean() -> NetworkModel:
    return fit_network([measured(links(), tuple(range(number))) for number in (3, 5, 6)], bootstrap=0)


def named(fit: AlgorithmFit) -> set[tuple[str, tuple[int, ...]]]:
    return {(misfit.code, misfit.who) for misfit in fit.misfits}


def test_a_slow_rank_is_named_and_predicted_with_a_rate_of_its_own() -> None:
    fit = slow_rank_0().of("flat")
    assert named(fit) == {("rank", (0,))}
    assert {misfit.ranks for misfit in fit.misfits} == {3, 5, 6}
    # Beyond twice it is the busiest in all of these exchanges: how much slower does not matter to them.
    assert all(2.0 < misfit.factor < 8.0 for misfit in fit.misfits)
    assert fit.verdict is not None
    # Which rank is slow among another number of ranks is not known.
    assert {reason.code for reason in fit.verdict.reasons} <= {"other_ranks_median", "other_ranks_p90"}
    unseen = measured(links(up={0: 5.0}, down={0: 5.0}), tuple(range(5)), seed=70)
    checked = check_predictions(slow_rank_0(), unseen)
    assert checked["error"].median() < 0.1
    assert checked["error"].quantile(0.9) < 0.25


@pytest.mark.slow
@pytest.mark.parametrize(
    ("truth", "expected"),
    [
        (links(up={1: 5.0}), {"rank_sends"}),
        (links(down={2: 5.0}), {"rank_receives"}),
        (links(up={1: 2.5}, down={1: 2.5}), {"rank"}),
        (links(pair={(0, 1): 10.0}), {"pair"}),
    ],
    ids=["sends", "receives", "2.5 times", "pair"],
)
def test_what_differs_is_distinguished_from_what_does_not(truth: Any, expected: set[str]) -> None:
    fit = fitted(truth)
    assert {misfit.code for misfit in fit.misfits} == expected, fit.misfits


@pytest.mark.slow
def test_the_last_rank_is_found_though_its_number_changes() -> None:
    fit = fitted(links(up={-1: 5.0}, down={-1: 5.0}), ranks=(4, 6, 8))
    assert fit.misfits
    assert all(misfit.who[0] == misfit.ranks - 1 for misfit in fit.misfits), fit.misfits


@pytest.mark.slow
def test_two_slow_ranks_are_both_named() -> None:
    fit = fitted(links(up={0: 5.0, 3: 5.0}, down={0: 5.0, 3: 5.0}), ranks=(5, 6, 8))
    assert {rank for misfit in fit.misfits for rank in misfit.who} == {0, 3}, fit.misfits


@pytest.mark.slow
def test_a_slow_node_is_named() -> None:
    nodes = tuple(rank // 2 for rank in range(8))

    def truth_us(bytes_PP: NDArray[np.int64], node_of_P: tuple[int, ...]) -> float:
        node_P = np.array(node_of_P)
        across_PP = np.where(node_P[:, None] == node_P[None, :], 0, bytes_PP)
        rate_N = np.where(np.arange(4) == 2, 5 * USUAL, USUAL)
        out_N = np.bincount(node_P, weights=across_PP.sum(axis=1))
        return 2000.0 + float((out_N * rate_N).max())

    fit = fit_network([measured(truth_us, nodes, seeds=4)], bootstrap=0).of("flat")
    assert named(fit) == {("node_sends", (2,))}, fit.misfits


@pytest.mark.parametrize("seed", range(4))
def test_ranks_that_do_not_differ_are_not_named(seed: int) -> None:
    fit = fitted(links(), seed=seed)
    assert fit.misfits == ()
    assert fit.verdict is not None
    assert fit.verdict.code == "valid", fit.verdict


@pytest.mark.parametrize("every", [(1.0, 5.0), (5.0, 1.0)], ids=["slow down", "slow up"])
def test_links_that_are_slower_one_way_get_a_cost_for_each_way(every: tuple[float, float]) -> None:
    fit = fitted(links(every=every))
    assert fit.form == "directions"
    assert fit.misfits == ()
    per_byte = {item.term: item.us_per_unit for item in fit.coefficients}
    slower, faster = ("in_other", "out_other") if every[1] > 1 else ("out_other", "in_other")
    assert per_byte[slower] == pytest.approx(5 * USUAL, rel=0.15)
    assert (per_byte[faster] or 0.0) < 0.5 * (per_byte[slower] or 0.0)
    assert fit.verdict is not None
    assert fit.verdict.code == "valid"


def test_a_misfit_is_named_with_its_host() -> None:
    results = []
    for number in (5, 6):
        cores_P = tuple(CoreSpec(host=f"host-{rank}", cpus="0-7") for rank in range(number))
        result = measured(links(up={1: 5.0}, down={1: 5.0}), tuple(range(number)))
        results.append(result.model_copy(update={"cores_P": cores_P}))
    fit = fit_network(results, bootstrap=0).of("flat")
    assert {misfit.hosts for misfit in fit.misfits} == {("host-1",)}


def test_exchanges_of_other_ranks_are_marked_since_the_slow_one_is_not_known() -> None:
    model = slow_rank_0()
    through = np.full((5, 5), 100)
    assert predict_us(model, through, tuple(range(5))).misfits == ()
    other = np.full((4, 4), 100)
    assert len(predict_us(model, other, tuple(range(4))).misfits) == len(model.of("flat").misfits)
    assert predict_us(model, 0 * other, tuple(range(4))).misfits == ()
    summary = error_summary(check_predictions(model, measured(links(), tuple(range(4)), seed=7)))
    assert summary.set_index("pattern").loc["uniform", "through_misfits"] == 1.0
    assert summary.set_index("pattern").loc["empty", "through_misfits"] == 0.0


def test_fit_ends_with_a_verdict_and_the_exit_code_says_whether_it_is_valid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noisy = [measured(links(), tuple(range(number)), noise=0.9) for number in (3, 5, 6)]
    clean_results = [measured(links(), tuple(range(number))) for number in (3, 5, 6)]
    for name, results, code in (("noisy", noisy, 3), ("clean", clean_results, 0)):
        files = [saved(tmp_path / f"{name}-{result.ranks}.json", result) for result in results]
        out = str(tmp_path / f"{name}.json")
        assert main(["fit", *map(str, files), "--out", out, "--bootstrap", "0"]) == code
        said = capsys.readouterr().err
        assert ("valid for 3, 5, 6 ranks on 3, 5, 6 nodes" in said) == (code == 0)
        assert "verdict: flat over made-up:" in said
    argv = ["fit", *map(str, files), "--out", out, "--force", "--bootstrap", "0", "--json"]
    assert main(argv) == 0
    (document,) = json.loads(capsys.readouterr().out)["fits"]
    assert document["verdict"]["code"] == "valid"
    assert document["misfits"] == []


def test_repeats_that_scatter_too_much_are_too_noisy_to_fit() -> None:
    results = [measured(links(), tuple(range(number)), noise=0.9) for number in (3, 5, 6)]
    fit = fit_network(results, bootstrap=0).of("flat")
    assert fit.verdict is not None
    assert fit.verdict.code == "too_noisy"
    assert "too noisy to fit: repeats of one matrix leave its time uncertain by" in verdict_sentence(
        fit, "gloo"
    )


def test_one_repeat_says_nothing_about_noise_but_errors_still_do() -> None:
    results = [measured(links(), tuple(range(number)), noise=0.9, repeats=1) for number in (3, 5, 6)]
    fit = fit_network(results, bootstrap=0).of("flat")
    assert fit.verdict is not None
    assert fit.verdict.repeat_noise is None
    assert fit.verdict.code == "does_not_fit"


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ({"code": "valid", "reasons": [{"code": "repeat_noise", "value": 1.0, "bound": 0.2}]}, None),
        ({"code": "does_not_fit", "reasons": []}, None),
        (None, {"who": [9]}),
        (None, {"who": [0, 1]}),
        (None, {"code": "pair"}),
        (None, {"node_of_P": [0]}),
    ],
)
def test_a_verdict_or_misfit_that_no_fit_writes_is_refused(
    change: dict[str, Any] | None, value: dict[str, Any] | None, tmp_path: Path
) -> None:
    document = json.loads(slow_rank_0().model_dump_json())
    own = document["fits"][0]
    own["verdict"].update(change or {})
    own["misfits"][0].update(value or {})
    path = tmp_path / "fit.json"
    path.write_text(json.dumps(document))
    with pytest.raises(BenchmarkError, match="not valid"):
        load_network(path)


def test_times_are_distinguished_only_beyond_what_the_model_gets_wrong() -> None:
    fit = clean().of("flat")

    def code(first_us: float, second_us: float, first: int = 5, second: int = 5) -> str:
        compared = compare_times(fit, first_us, second_us, ranks=(first, second), same_ranks=first == second)
        assert compared.low is not None
        assert compared.high is not None
        assert (compared.code == "apart") == (not compared.low <= 1 <= compared.high)
        return compared.code

    assert code(1000.0, 1030.0) == "within_error"
    assert code(1000.0, 3000.0) == "apart"
    assert code(3000.0, 1000.0) == "apart"
    assert code(1000.0, 1030.0, 5, 6) == "within_error"
    assert code(1000.0, 5000.0, 4, 8) == "apart"


def test_an_error_that_all_exchanges_have_in_common_does_not_count_between_them() -> None:
    shared = clean().of("flat").model_copy(update={"ratio_Q": (0.5, 2.0), "paired_ratio_Q": (0.98, 1.02)})
    assert compare_times(shared, 1000.0, 1200.0, ranks=(5, 5), same_ranks=True).code == "apart"
    assert compare_times(shared, 1000.0, 1200.0, ranks=(5, 6), same_ranks=False).code == "within_error"


def test_where_nothing_says_how_ranks_are_predicted_nothing_is_distinguished() -> None:
    alone = fit_network([measured(links(), tuple(range(5)))], bootstrap=0).of("flat")
    compared = compare_times(alone, 1.0, 100.0, ranks=(8, 8), same_ranks=True)
    assert (compared.code, compared.low) == ("unknown", None)

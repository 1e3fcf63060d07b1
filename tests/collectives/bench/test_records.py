"""What a benchmark file says, computed by hand, and what a damaged one may not say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from observatory.errors import BenchmarkError
from observatory.run.documents.bench import BenchCase, BenchResult, load_bench


def uniform_case() -> BenchCase:
    """4 ranks, 250 bytes to each; repeats whose slowest ranks took 2, 4 and 10 us."""
    return BenchCase(
        pattern="uniform",
        send_bytes_PP=((250,) * 4,) * 4,
        algorithm="flat",
        rank_us_RP=((1.0, 2.0, 1.0, 1.0), (4.0, 1.0, 1.0, 1.0), (9.0, 1.0, 10.0, 1.0)),
        correct=True,
    )


def result(*cases: BenchCase) -> BenchResult:
    return BenchResult(
        kind="alltoall",
        created_unix_s=0.0,
        backend="gloo",
        node_of_P=(0, 0, 0, 0),
        warmup=0,
        repeats=3,
        iterations=1,
        cases=cases or (uniform_case(),),
    )


def test_bandwidths_follow_the_stated_conventions() -> None:
    case = uniform_case()
    assert case.exchange_us_R.tolist() == [2.0, 4.0, 10.0]
    assert case.median_us == 4.0
    assert case.algbw_gb_per_s == pytest.approx(1000 / 4e-6 / 1e9)
    assert case.busbw_gb_per_s == pytest.approx(case.algbw_gb_per_s * 3 / 4), "(n - 1) / n for equal splits"


def test_an_exchange_lasts_from_the_last_start_to_the_last_end() -> None:
    waited = ((0.0, 0.5, 0.5, 0.5), (3.5, 0.0, 0.0, 0.0), (0.0, 0.0, 2.0, 0.0))
    case = uniform_case().model_copy(update={"wait_us_RP": waited})
    # Repeat 1: rank 0 took 4 us, 3.5 of them before the others started.
    assert case.exchange_us_R.tolist() == [1.5, 1.0, 9.0]
    assert case.median_us == 1.5


def test_a_result_of_schema_1_0_is_read_without_waiting(tmp_path: Path) -> None:
    document = json.loads(result().model_dump_json()) | {"schema_version": "1.0"}
    del document["cases"][0]["wait_us_RP"], document["clock_uncertainty_us"]
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(document))
    old = load_bench(path)
    assert old.clock_uncertainty_us is None
    assert old.cases[0].exchange_us_R.tolist() == [2.0, 4.0, 10.0]


def test_what_stays_on_its_rank_is_no_bus_bandwidth() -> None:
    case = uniform_case().model_copy(
        update={"send_bytes_PP": ((400, 0, 0, 0), (0,) * 4, (0,) * 4, (0, 100, 0, 0))}
    )
    assert case.algbw_gb_per_s == pytest.approx(125 / 4e-6 / 1e9)
    assert case.busbw_gb_per_s == pytest.approx(case.algbw_gb_per_s / 5)
    empty = uniform_case().model_copy(update={"send_bytes_PP": ((0,) * 4,) * 4})
    assert (empty.algbw_gb_per_s, empty.busbw_gb_per_s) == (0.0, 0.0)


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(result().model_dump_json())
    assert load_bench(path) == result()


HOSTILE = {
    "not square": (("cases", 0, "send_bytes_PP"), [[1, 2], [3]]),
    "negative bytes": (("cases", 0, "send_bytes_PP", 0, 0), -1),
    "bytes beyond any machine": (("cases", 0, "send_bytes_PP", 0, 0), 1 << 60),
    "half a byte": (("cases", 0, "send_bytes_PP", 0, 0), 0.5),
    "a time of zero": (("cases", 0, "rank_us_RP", 0, 0), 0.0),
    "a time that squares to infinity": (("cases", 0, "rank_us_RP", 0, 0), 1e200),
    "a time that squares to nothing": (("cases", 0, "rank_us_RP", 0, 0), 1e-200),
    "a time that is no number": (("cases", 0, "rank_us_RP", 0, 0), "soon"),
    "a rank without a time": (("cases", 0, "rank_us_RP", 0), [1.0, 2.0, 3.0]),
    "waiting of too few ranks": (("cases", 0, "wait_us_RP"), [[0.0] * 4, [0.0] * 4, [0.0] * 3]),
    "waiting of too few repeats": (("cases", 0, "wait_us_RP"), [[0.0] * 4]),
    "negative waiting": (("cases", 0, "wait_us_RP"), [[0.0, -1.0, 0.0, 0.0]] * 3),
    "all waiting for nobody": (("cases", 0, "wait_us_RP"), [[0.5] * 4] * 3),
    "no repeats": (("cases", 0, "rank_us_RP"), []),
    "another number of ranks": (("node_of_P",), [0, 0]),
    "no cases": (("cases",), []),
    "rows that do not divide": (("cases", 0, "row_bytes"), 7),
    "a row of nothing": (("cases", 0, "row_bytes"), 0),
    "an unknown kind": (("kind",), "rumour"),
    "a newer schema": (("schema_version",), "12.0"),
}


@pytest.mark.parametrize("what", sorted(HOSTILE))
def test_a_file_that_cannot_be_true_is_refused_in_one_line(what: str, tmp_path: Path) -> None:
    (*parents, last), value = HOSTILE[what]
    document = json.loads(result().model_dump_json())
    inner = document
    for key in parents:
        inner = inner[key]
    inner[last] = value
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(document))
    with pytest.raises(BenchmarkError) as caught:
        load_bench(path)
    message = str(caught.value)
    assert "\n" not in message
    assert "bench.json" in message
    assert ("12.0" in message) == (what == "a newer schema")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"null", b'{"cases": [[[[[[]]]]]]}'])
def test_bytes_that_are_no_result_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_bytes(content)
    with pytest.raises(BenchmarkError, match="not valid"):
        load_bench(path)


def test_times_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(result().model_dump_json().replace("10.0", "Infinity", 1))
    with pytest.raises(BenchmarkError, match="not valid"):
        load_bench(path)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="observatory bench alltoall"):
        load_bench(tmp_path / "nowhere.json")

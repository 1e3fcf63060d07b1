from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from observatory.advice.route_fetch import RouteFetchCode
from observatory.advice.route_fetch_words import _SENTENCES, route_fetch_sentences
from observatory.analysis.route_fetch.costs import Constants, StageCosts
from observatory.analysis.route_fetch.experts import Choice, ExpertShape, decide_experts
from observatory.cli import main
from observatory.errors import BenchmarkError
from observatory.run import RunWriter, routing_rows
from observatory.run.manifest import Manifest, ModelSpec, MoeLayerSpec
from observatory.run.provenance import HostSpec
from tests.analysis.route_fetch.made import made_result

#: Two ranks, two experts each.
HOMES = np.array([[0, 0, 1, 1]])
#: Rows of 8 bytes; an expert's weights are those of 16 rows, or of 16 thousand.
SMALL, LARGE = (ExpertShape(hidden=2, expert_bytes=size, element_bytes=4) for size in (128, 128_000))


def constants(trip: float = 0.0, byte: float = 1.0, *, spread: float = 0.0) -> Constants:
    us_F = np.array([trip, byte, byte])
    samples_BF = us_F * (1.0 + spread * np.linspace(-1, 1, 20)[:, None])
    return Constants(
        grade="fitted",
        source="made",
        shape=None,
        holders=1,
        stages={"transfer": StageCosts(us_F=us_F, samples_BF=samples_BF)},
    )


def steady(*load_E: int, steps: int = 32) -> np.ndarray:
    return np.tile(np.array(load_E), (steps, 1, 1))


def test_today_takes_what_the_busiest_rank_moves() -> None:
    # Half of every expert's tokens come from the other rank: rank 1 receives (100 + 20) / 2 rows and sends
    # (10 + 30) / 2; both ways 2 x 60 rows of 8 bytes at 1 us a byte, and one trip.
    decisions = decide_experts(steady(10, 30, 100, 20), HOMES, LARGE, constants(trip=7.0), ranks=2)
    assert decisions.today_us == pytest.approx(7.0 + 2 * 60 * 8)
    assert decisions.choice_LE.tolist() == [[Choice.ROUTE] * 4]
    assert decisions.saved_us.value == 0.0
    # 128 kB against 16 bytes for each row that moves, of which half do.
    assert decisions.break_even_tokens == pytest.approx((7.0 + 128_000) / 8)


def test_an_expert_with_more_tokens_than_weights_is_fetched() -> None:
    decisions = decide_experts(steady(10, 30, 100, 20), HOMES, SMALL, constants(), ranks=2)
    assert decisions.choice_LE[0, 2] == Choice.FETCH
    # Without expert 2 rank 1 sends 20 and receives 10 rows; 128 bytes of weights in their place.
    assert decisions.chosen_us <= 2 * 20 * 8 + 128
    assert decisions.saved_us.value == pytest.approx(decisions.today_us - decisions.chosen_us)
    assert decisions.saved_us.low is not None
    assert decisions.saved_us.low > 0


def test_room_for_one_copy_goes_to_the_busiest_expert_and_costs_its_bytes() -> None:
    decisions = decide_experts(steady(10, 30, 100, 20), HOMES, LARGE, constants(), ranks=2, copies=1)
    assert decisions.choice_LE.tolist() == [[Choice.ROUTE, Choice.ROUTE, Choice.KEEP, Choice.ROUTE]]
    assert decisions.keep_bytes == 128_000
    assert decisions.saved_us.value == pytest.approx(2 * 60 * 8 - 2 * 20 * 8)


def test_two_equally_busy_ranks_are_relieved_together() -> None:
    # To fetch from one of them alone shortens nothing.
    decisions = decide_experts(steady(100, 0, 100, 0), HOMES, SMALL, constants(), ranks=2)
    assert decisions.choice_LE.tolist() == [[Choice.FETCH, Choice.ROUTE, Choice.FETCH, Choice.ROUTE]]
    assert decisions.chosen_us == pytest.approx(128)


def test_what_no_longer_holds_on_later_steps_saves_nothing() -> None:
    load_SLE = np.concatenate([steady(0, 0, 100, 0, steps=16), steady(100, 0, 0, 0, steps=16)])
    decisions = decide_experts(load_SLE, HOMES, SMALL, constants(spread=0.2), ranks=2)
    assert decisions.choice_LE[0, 2] == Choice.FETCH
    assert decisions.saved_us.value <= 0.0


def test_the_interval_has_the_spread_of_the_constants() -> None:
    narrow, wide = (
        decide_experts(steady(10, 30, 100, 20), HOMES, SMALL, constants(spread=spread), ranks=2).saved_us
        for spread in (0.0, 0.3)
    )
    assert narrow.low == pytest.approx(narrow.high)
    assert wide.low is not None
    assert wide.high is not None
    assert wide.low < 0.85 * wide.value
    assert wide.high > 1.15 * wide.value


def test_constants_of_experts_count_what_is_computed() -> None:
    known = dict(constants(byte=1e-9).stages)
    us_F = np.array([0.0, 1.0, 0.0])
    known["experts"] = StageCosts(us_F=us_F, samples_BF=us_F[None])
    computing = Constants(grade="fitted", source="made", shape=None, holders=1, stages=known)
    decisions = decide_experts(steady(0, 0, 100, 0), HOMES, SMALL, computing, ranks=2, copies=1)
    # A token takes 2 operations for each of 32 weights; kept, each rank computes half of the tokens.
    assert decisions.today_us == pytest.approx(100 * 64, rel=1e-6)
    assert decisions.chosen_us == pytest.approx(50 * 64, rel=1e-6)
    assert not decisions.without_compute


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(BenchmarkError, match="too few"):
        decide_experts(steady(1, 1, 1, 1, steps=3), HOMES, SMALL, constants(), ranks=2)


def a_run(
    path: Path,
    *,
    expert_bytes: int | None,
    hot: tuple[int, int] = (2, 2),
    hot_tokens: int = 50_000,
    hosts: tuple[str, ...] = (),
) -> Path:
    """Four experts of hidden size 2; the hot one of the first and of the second half of the steps."""
    layer = MoeLayerSpec(layer=5, module="m", experts=4, top_k=1)
    model = ModelSpec(
        name="made", hidden_size=2, dtype="float32", expert_bytes=expert_bytes, moe_layers=(layer,)
    )
    steps = 16
    load_NE = np.full((steps, 4), 10)
    load_NE[: steps // 2, hot[0]] += hot_tokens
    load_NE[steps // 2 :, hot[1]] += hot_tokens
    named = tuple(HostSpec(name=name) for name in hosts)
    with RunWriter.create(path, Manifest(run_id="r", created_unix_s=0.0, model=model, hosts=named)) as writer:
        rows = routing_rows(
            step_N=np.arange(steps), phase_N="prefill", layer_N=5, source_rank=0,
            tokens_N=load_NE.sum(axis=1), load_NE=load_NE,
        )  # fmt: skip
        writer.append("routing", rows)
    return path


@pytest.mark.parametrize(
    ("expert_bytes", "hot", "hot_tokens", "code"),
    [
        (4_000_000, (2, 2), 500, RouteFetchCode.SEND_ALL),
        (4_800, (2, 2), 50_000, RouteFetchCode.CHANGE),
        (4_800, (2, 3), 50_000, RouteFetchCode.UNCERTAIN),
    ],
)
def test_the_command_decides_for_a_run(
    expert_bytes: int,
    hot: tuple[int, int],
    hot_tokens: int,
    code: RouteFetchCode,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = a_run(tmp_path / "run", expert_bytes=expert_bytes, hot=hot, hot_tokens=hot_tokens)
    measured = tmp_path / "rf.json"
    measured.write_text(made_result("expert:2").model_dump_json())
    argv = ["route-fetch", str(run), "--constants", str(measured), "--ranks", "2"]
    assert main([*argv, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["kind"], document["grade"]) == ("route_fetch_experts", "fitted")
    assert document["verdict"][0]["code"] == code
    assert (document["train_steps"], document["held_out_steps"]) == (8, 8)
    assert document["layers"][0]["layer"] == 5
    assert main(argv) == 0
    assert ("send all tokens" in capsys.readouterr().out) == (code != RouteFetchCode.CHANGE)


@pytest.mark.parametrize(
    ("options", "said"),
    [([], "--ranks"), (["--ranks", "3"], "do not fill 3 ranks"), (["--ranks", "2", "--phase", "decode"], "")],
)
def test_what_cannot_be_decided_is_one_sentence(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tmp_path / "run", expert_bytes=480)
    argv = ["route-fetch", str(run), "--constants", "published:h100-ndr200", *options]
    assert main(argv) == 1
    err = capsys.readouterr().err
    assert said in err
    assert len(err.strip().splitlines()) == 1
    unknown = a_run(tmp_path / "unknown", expert_bytes=None)
    assert main(["route-fetch", str(unknown), "--constants", "published:h100-ndr200", "--ranks", "2"]) == 1
    assert "expert bytes None" in capsys.readouterr().err


def test_constants_of_other_hosts_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path / "run", expert_bytes=480, hosts=("node7",))
    measured = tmp_path / "rf.json"
    for host, is_named in (("node9", True), ("node7", False)):
        result = made_result("expert:2").model_copy(update={"hosts": (HostSpec(name=host),)})
        measured.write_text(result.model_dump_json())
        assert main(["route-fetch", str(run), "--constants", str(measured), "--ranks", "2"]) == 0
        assert ("another fabric" in " ".join(capsys.readouterr().out.split())) == is_named


def test_every_code_has_a_sentence() -> None:
    assert set(_SENTENCES) == set(RouteFetchCode)
    assert route_fetch_sentences([]) == []


def test_constants_far_from_the_experts_of_the_run_or_often_wrong_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tmp_path / "run", expert_bytes=480)
    measured = tmp_path / "rf.json"
    for noise, code in ((0.0, None), (2.0, RouteFetchCode.UNRELIABLE)):
        measured.write_text(made_result("expert:2", noise=noise, repeats=1).model_dump_json())
        assert main(["route-fetch", str(run), "--constants", str(measured), "--ranks", "2", "--json"]) == 0
        verdict = {item["code"]: item for item in json.loads(capsys.readouterr().out)["verdict"]}
        # 25 thousand tokens of the busiest expert against at most 800.
        assert verdict[RouteFetchCode.SIZES_NOT_MEASURED]["beyond"] > 50
        assert (RouteFetchCode.UNRELIABLE in verdict) == (code is not None)


@pytest.mark.parametrize("options", [["--uses", "10"], ["--shape", "expert:2"], ["--rows", "1,2"]])
def test_options_of_maps_do_nothing_for_a_run_and_are_refused(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tmp_path / "run", expert_bytes=480)
    argv = ["route-fetch", "--constants", "published:h100-ndr200"]
    assert main([*argv, str(run), "--ranks", "2", *options]) == 1
    assert options[0] in capsys.readouterr().err
    assert main([*argv, "--shape", "expert:2", "--copies", "1"]) == 1
    assert "--copies" in capsys.readouterr().err

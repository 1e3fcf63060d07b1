"""Verdicts on placements of runs whose best placement is known beforehand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from observatory.advice.placement import (
    PlacementAdvice,
    PlacementCode,
    advise_placement,
)
from observatory.advice.placement_layouts import current_layout, current_shares
from observatory.advice.placement_scores import PlacementRules
from observatory.advice.placement_times import StepTimer
from observatory.advice.words import placement_sentences
from observatory.analysis.parallel.placement import load_placement
from observatory.analysis.parallel.step_loads import step_loads
from observatory.analysis.parallel.token_samples import LayerTokens
from observatory.cli import main
from observatory.errors import PlacementError
from observatory.reasons import Reason
from observatory.run import open_run
from tests.advice.test_conclusions import run_of_loads
from tests.analysis.experts.models import cost
from tests.analysis.parallel.test_balancing import drifting
from tests.conftest import MakeRun


def noisy(mean_E: list[float], *, steps: int = 40, layers: int = 2, seed: int = 0) -> np.ndarray:
    """Loads (S, L, E) that scatter about a mean as counts do."""
    generator = np.random.default_rng(seed)
    return generator.poisson(mean_E, size=(steps, layers, len(mean_E)))


def advised(folder: Path, load_SLE: np.ndarray, *, ranks: int, replicas: int = 0) -> PlacementAdvice:
    run = open_run(run_of_loads(folder, load_SLE))
    loads = step_loads(run)
    today, name = current_layout(run, loads, ranks=ranks)
    return advise_placement(loads, ranks=ranks, today=today, named_today=name, replicas=replicas)


def codes(advice: PlacementAdvice) -> list[PlacementCode]:
    assert all(placement_sentences(advice.verdict))
    return [PlacementCode(reason.code) for reason in advice.verdict]


def test_two_heavy_experts_on_one_rank_are_parted(tmp_path: Path) -> None:
    """Ranks have 600 and 200; parted, 400 and 400: a third of the busiest rank's load goes."""
    advice = advised(tmp_path / "run", noisy([300.0, 300.0, 100.0, 100.0]), ranks=2)
    assert codes(advice)[0] == PlacementCode.CHANGE
    assert advice.gain.value == pytest.approx(1 / 3, abs=0.03)
    assert advice.gain.low is not None
    assert advice.gain.low > 0.25
    assert advice.chosen.slot_LPK is not None
    for slot_PK in advice.chosen.slot_LPK.tolist():
        assert [sum(expert < 2 for expert in slot_K) for slot_K in slot_PK] == [1, 1]
    assert advice.chosen.moved == 2.0  # an expert each way, in each layer


def test_uniform_routing_is_left_alone_though_its_steps_promise_a_gain(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    load_SLE = generator.multinomial(64, np.full(16, 1 / 16), size=(64, 3))
    advice = advised(tmp_path / "run", load_SLE, ranks=4)
    assert codes(advice)[1] == PlacementCode.AT_FLOOR
    assert codes(advice)[0] in (PlacementCode.NO_GAIN, PlacementCode.WORSE)
    by_name = {candidate.name: candidate for candidate in advice.candidates}
    assert advice.chosen.promised < by_name["linear (today)"].promised - 0.02
    assert advice.gain.low is not None
    assert advice.gain.low < 0.02
    assert not advice.is_better


@pytest.mark.parametrize(
    ("code", "name"),
    [(PlacementCode.AT_FLOOR, "today"), (PlacementCode.REST_IS_CHANCE, "chosen")],
)
def test_a_noise_floor_is_stated_with_the_digits_that_it_is_compared_by(
    code: PlacementCode, name: str
) -> None:
    sentence = placement_sentences([Reason(code, {name: 1.0292, "floor": 1.0214})])[0]
    assert "1.029 times" in sentence
    assert "within 1 %" in sentence
    assert "(1.021)" in sentence


def test_one_expert_that_outweighs_a_rank_calls_for_replicas(tmp_path: Path) -> None:
    """600 of 1000 on one of 4 ranks: at best 2.6 times the mean; 4 replicas fill the ranks."""
    mean_E = [600.0, *[400 / 7] * 7]
    alone = advised(tmp_path / "alone", noisy(mean_E), ranks=4)
    assert codes(alone)[-1] == PlacementCode.MORE_REPLICAS
    assert alone.verdict[-1].values["needed"] == 4
    assert alone.bound == pytest.approx((600 + 400 / 7) / 250, rel=0.02)
    helped = advised(tmp_path / "helped", noisy(mean_E), ranks=4, replicas=4)
    assert codes(helped)[0] == PlacementCode.CHANGE
    assert helped.chosen.held_out.value < 1.15
    assert alone.chosen.held_out.value > 2.3


def test_a_mean_promises_more_than_it_holds_and_hindsight_is_not_beaten(tmp_path: Path) -> None:
    load_SLE = np.stack([drifting(seed, 0.5, experts=32, tokens=256) for seed in range(3)], axis=1)
    advice = advised(tmp_path / "run", load_SLE, ranks=8, replicas=8)
    by_name = {candidate.name: candidate for candidate in advice.candidates}
    assert by_name["mean"].held_out.value > by_name["mean"].promised + 0.05
    assert by_name["hindsight"].held_out.value <= min(item.held_out.value for item in advice.candidates)
    for candidate in advice.candidates:
        assert candidate.held_out.low is not None
        assert candidate.held_out.high is not None
        assert 1.0 <= candidate.held_out.low <= candidate.held_out.value <= candidate.held_out.high


def test_the_command_writes_a_placement_that_can_be_read_and_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of_loads(tmp_path / "run", noisy([300.0, 300.0, 100.0, 100.0]))
    out = tmp_path / "placement.json"
    assert main(["place", str(run), "--ranks", "2", "--replicas", "2", "--out", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["kind"] == "placement"
    assert document["train_steps"] == document["held_out_steps"] == 20
    assert document["verdict"][0]["code"] == "change"
    file = load_placement(out)
    for layer in (0, 1):
        holders = file.holders(layer, experts=4, ep=2)
        assert sum(map(len, holders)) == 6
    assert main(["place", str(run), "--ranks", "2", "--replicas", "2", "--current", str(out), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["candidates"][0]["candidate"] == "placement.json (today)"
    before = next(row for row in document["candidates"] if row["candidate"] == "chosen")
    assert again["candidates"][0]["held_out"] == pytest.approx(before["held_out"])
    chosen = next(row for row in again["candidates"] if row["candidate"] == "chosen")
    assert chosen["moved"] == 0.0
    assert again["verdict"][0]["code"] in ("no_gain", "worse")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ranks", "3"], "do not fill 3 ranks evenly"),
        (["--ranks", "8", "--replicas", "4"], "numbers of ranks that do: 2, 4"),
        (["--ranks", "2", "--replicas", "1"], "numbers of replicas that do: 0 or 2"),
        (["--ranks", "2", "--phase", "training"], "expected one of"),
        (["--ranks", "2", "--phase", "decode"], "no steps of decode"),
        (["--ranks", "2", "--current", "missing.json"], "cannot be read"),
        (["--ranks", "2", "--slots-per-rank", "1"], "expected at least 2 slots"),
        (["--ranks", "2", "--slots-per-rank", "4", "--replicas", "2"], "expected one"),
        (["--ranks", "4", "--gpus-per-node", "3"], "do not fill nodes of 3"),
        (["--ranks", "2", "--groups", "2"], "expected --gpus-per-node"),
        (["--ranks", "2", "--objective", "speed"], "expected one of load"),
        (["--ranks", "2", "--rank-speed", "missing.csv"], "cannot be read"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of_loads(tmp_path / "run", noisy([10.0] * 4))
    assert main(["place", str(run), *options]) == 1
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1


def test_a_run_of_few_steps_is_not_split(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["place", str(make_run()), "--ranks", "2"]) == 1
    assert "3 steps of prefill to choose on and 3 to judge on: too few" in capsys.readouterr().err


def test_a_placement_that_fills_ranks_unevenly_is_no_layout(tmp_path: Path) -> None:
    run = open_run(run_of_loads(tmp_path / "run", noisy([10.0] * 4)))
    (tmp_path / "uneven.json").write_text('{"expert_to_rank": [0, 0, 0, 1]}')
    with pytest.raises(PlacementError, match="ranks 1 to 3 experts"):
        current_layout(run, step_loads(run), ranks=2, given=tmp_path / "uneven.json")


def test_a_run_that_does_not_say_its_placement_is_not_taken_for_a_linear_one(tmp_path: Path) -> None:
    path = run_of_loads(tmp_path / "run", noisy([300.0, 300.0, 100.0, 100.0]))
    manifest = json.loads((path / "run.json").read_text())
    manifest["topology"] |= {"ranks": 1, "ep": 2}
    (path / "run.json").write_text(json.dumps(manifest))
    run = open_run(path)
    with pytest.raises(PlacementError, match="does not say which held which expert"):
        current_layout(run, step_loads(run), ranks=2)
    _, name = current_layout(run, step_loads(run), ranks=2, given="linear")
    assert name == "linear"


def test_phases_are_placed_for_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of_loads(tmp_path / "run", noisy([300.0, 300.0, 100.0, 100.0]))
    assert main(["place", str(run), "--ranks", "2", "--out", str(run / "run.json")]) == 1
    assert "--force" in capsys.readouterr().err
    assert open_run(run).manifest.model.name == "made"
    loads = step_loads(open_run(run))
    both = replace(loads, phase_S=("prefill",) * 20 + ("decode",) * 20)
    weight_S = np.repeat([1, 10], 20)
    assert replace(both, load_SLE=both.load_SLE * weight_S[:, None, None]).largest_phase == "decode"
    assert both.of_phase("decode").load_SLE.shape[0] == 20
    short = replace(both, phase_S=("prefill",) * 30 + ("decode",) * 10)
    today, name = current_layout(open_run(run), loads, ranks=2)
    with pytest.raises(PlacementError, match="5 steps of decode to choose on"):
        advise_placement(short, ranks=2, today=today, named_today=name)


def rows_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict, dict]:
    """The document of a command, and its candidates by name."""
    assert main(["place", *arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    return document, {row["candidate"]: row for row in document["candidates"]}


def test_a_limit_on_moves_is_kept_and_fewer_moves_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ranks have 800, 800, 200, 200: two exchanges level them, one levels half."""
    mean_E = [400.0] * 4 + [100.0] * 4
    run = str(run_of_loads(tmp_path / "run", noisy(mean_E)))
    _, rows = rows_of(capsys, run, "--ranks", "4", "--max-moves", "4")
    assert rows["chosen"]["moved"] <= 4
    assert rows["chosen"]["held_out"] < 1.1
    assert rows["2 moves"]["moved"] <= 2
    assert rows["1 move"]["moved"] == 0
    assert rows["1 move"]["held_out"] == pytest.approx(rows["linear (today)"]["held_out"])


def test_speeds_of_ranks_decide_where_all_experts_are_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(run_of_loads(tmp_path / "run", noisy([400.0, 400.0, 200.0, 200.0])))
    (tmp_path / "speed.csv").write_text("1\n2\n")
    (tmp_path / "speed.json").write_text("[1, 2]")
    document, rows = rows_of(capsys, run, "--ranks", "2", "--rank-speed", str(tmp_path / "speed.csv"))
    assert document["bound"] is None
    assert rows["linear (today)"]["held_out"] == pytest.approx(2.0, rel=0.05)  # 800 on 1 of 3
    assert rows["chosen"]["held_out"] == pytest.approx(1.0, abs=0.05)
    assert rows_of(capsys, run, "--ranks", "2", "--rank-speed", str(tmp_path / "speed.json"))[1] == rows


def test_the_price_of_groups_is_stated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Groups {0..3} and {4..7} of 1600 and 400 on two nodes: 1.6 times the mean; without them, 1."""
    run = str(run_of_loads(tmp_path / "run", noisy([400.0] * 4 + [100.0] * 4)))
    options = ["--ranks", "4", "--gpus-per-node", "2", "--groups", "2"]
    document, rows = rows_of(capsys, run, *options)
    price = next(reason for reason in document["verdict"] if reason["code"] == "groups_cost")
    assert price["with_groups"] == rows["chosen"]["held_out"] == pytest.approx(1.6, rel=0.05)
    assert price["without"] == rows["no groups"]["held_out"] < 1.1


def test_copies_that_share_step_by_step_are_never_worse_than_equal_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_SLE = np.stack([drifting(seed, 0.5, experts=16, tokens=256) for seed in range(2)], axis=1)
    run, out = str(run_of_loads(tmp_path / "run", load_SLE)), tmp_path / "weighted.json"
    options = ["--ranks", "4", "--slots-per-rank", "6", "--dispatch", "weighted", "--out", str(out)]
    _, rows = rows_of(capsys, run, *options)
    assert load_placement(out).shares_of(0) is not None
    assert main(["scan", run, "--ep", "4", "--placement", str(out), "--json"]) == 0
    note = json.loads(capsys.readouterr().out)["rows"][0]["notes"]
    assert "shares of the placement" in str(note)
    assert rows["chosen"]["replicas"] == 8
    assert rows["chosen, per-step"]["held_out"] <= rows["chosen, equal"]["held_out"] + 1e-9
    assert rows["chosen, per-step"]["held_out"] <= rows["chosen"]["held_out"] + 1e-9


def test_activated_experts_are_fewest_where_each_goes_to_one_of_its_copies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(run_of_loads(tmp_path / "run", noisy([20.0] * 4 + [0.3] * 12)))
    options = ["--ranks", "4", "--replicas", "4", "--objective", "activated"]
    document, rows = rows_of(capsys, run, *options)
    assert document["objective"] == "activated"
    assert document["floor"] is None
    assert rows["chosen, one-copy"]["held_out"] <= rows["chosen"]["held_out"]
    assert rows["chosen"]["held_out"] < rows["linear (today)"]["held_out"] - 0.2


def test_nodes_per_token_take_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(run_of_loads(tmp_path / "run", noisy([10.0] * 4)))
    options = ["--ranks", "4", "--gpus-per-node", "2", "--objective", "nodes"]
    assert main(["place", run, *options]) == 1
    assert "--sample-tokens" in capsys.readouterr().err


def test_nodes_decide_where_they_are_the_objective(tmp_path: Path) -> None:
    """Tokens choose two of 0, 2, 4, 6 or two of 1, 3, 5, 7; linear nodes hold two of each kind."""
    run = open_run(run_of_loads(tmp_path / "run", noisy([100.0] * 8)))
    loads = step_loads(run)
    generator = np.random.default_rng(0)
    assert loads.step_S is not None
    step_T = np.repeat(loads.step_S, 20)
    pairs = generator.permuted(np.tile(np.arange(4), (len(step_T), 1)), axis=1)[:, :2]
    experts_TK = 2 * pairs + generator.integers(2, size=(len(step_T), 1))
    sample = LayerTokens(experts_TK=experts_TK, step_T=step_T, source_T=0 * step_T, position_T=0 * step_T)
    today, name = current_layout(run, loads, ranks=4)
    advice = advise_placement(
        loads,
        ranks=4,
        today=today,
        named_today=name,
        rules=PlacementRules(objective="nodes", nodes=2),
        tokens=[sample, sample],
    )
    assert codes(advice)[:2] == [PlacementCode.NODES_LESS, PlacementCode.STRUCTURE]
    assert codes(advice)[-1] == PlacementCode.BALANCE
    assert PlacementCode.NO_GAIN not in codes(advice)
    assert advice.chosen.nodes_per_token == pytest.approx(1.0)
    assert advice.candidates[0].nodes_per_token == pytest.approx(5 / 3, abs=0.1)


def test_shares_of_todays_copies_count(tmp_path: Path) -> None:
    """Expert 0 is on both ranks; all of it on rank 0 gives that 300 of 400, half of it 200 on each."""
    run = open_run(run_of_loads(tmp_path / "run", noisy([200.0, 100.0, 100.0])))
    loads = step_loads(run)
    path = tmp_path / "today.json"
    for share, held_out in ((1.0, 1.5), (0.5, 1.0)):
        file = {"expert_to_rank": [[0, 1], 0, 1], "shares": [[share, 1 - share], [1.0], [1.0]]}
        path.write_text(json.dumps(file))
        today, name = current_layout(run, loads, ranks=2, given=path)
        share_LPK = current_shares(path, loads, today)
        advice = advise_placement(
            loads, ranks=2, today=today, named_today=name, today_share_LPK=share_LPK, replicas=1
        )
        assert advice.candidates[0].held_out.value == pytest.approx(held_out, abs=0.1)
    assert advice.gain.value == pytest.approx(0.0, abs=0.05)


def test_times_of_steps_decide_where_experts_are_paid_by_the_piece(tmp_path: Path) -> None:
    """Two experts that all tokens choose, six of a token each: 1 s an expert, 1 ms an assignment.

    Even loads put a heavy expert with three light ones on each rank: 4 s and 0.4 s. So does activation.
    """
    load_SLE = noisy([400.0, 400.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    run = open_run(run_of_loads(tmp_path / "run", load_SLE))
    loads = step_loads(run, by_source=True)
    rules = PlacementRules(objective="time")
    today, name = current_layout(run, loads, ranks=2)
    with pytest.raises(PlacementError, match="--experts"):
        advise_placement(loads, ranks=2, today=today, named_today=name, rules=rules)
    timer = StepTimer(loads, 2, rules, cost(expert_s=0.0, row_s=1e-3))
    advice = advise_placement(loads, ranks=2, today=today, named_today=name, rules=rules, timer=timer)
    assert codes(advice)[0] == PlacementCode.TIME_LESS
    assert advice.candidates[0].step_us == pytest.approx(2 * 800e3, rel=0.05)  # two layers
    assert advice.chosen.step_us == pytest.approx(2 * 400e3, rel=0.1)
    by_piece = StepTimer(loads, 2, rules, cost(expert_s=1.0))
    advice = advise_placement(loads, ranks=2, today=today, named_today=name, rules=rules, timer=by_piece)
    assert advice.candidates[0].step_us is not None
    assert advice.chosen.step_us is not None
    assert advice.chosen.step_us <= advice.candidates[0].step_us * 1.02


def test_expert_times_of_another_model_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of_loads(tmp_path / "run", noisy([10.0] * 4))
    assert main(["place", str(run), "--ranks", "2", "--experts", str(tmp_path / "none.json")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    "argv",
    [
        ["--problem", "p.npz", "--ranks", "4"],
        ["--evaluate", "true", "--replicas", "4"],
        ["run", "--ranks", "4", "--generated-only"],
        ["run", "--ranks", "4", "--network", "fit.json"],
    ],
)
def test_options_that_would_do_nothing_are_refused(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["place", *argv]) == 1
    assert argv[-2 if argv[-1].isdigit() or argv[-1].endswith(".json") else -1] in capsys.readouterr().err

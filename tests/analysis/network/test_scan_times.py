"""Predicted times beside the ratios of a scan, and what realism costs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from observatory.analysis.network import fit_network, realism
from observatory.analysis.network.scan import scan_times
from observatory.analysis.parallel.captured import captured_traffic, departures, row_bytes, whole_rows
from observatory.analysis.parallel.scan import scan_run
from observatory.cli import main
from observatory.collectives.bench.replay import replay_plan
from observatory.errors import BenchmarkError, PlacementError, RunError
from observatory.run import open_run
from observatory.run.documents.bench import NODES_AS_STATED, BenchCase, BenchResult, Traffic
from observatory.run.manifest import ModelSpec
from tests.analysis.network.synthetic import made_result
from tests.conftest import MakeRun


def a_bus(bytes_PP, _node_of_P) -> float:  # type: ignore[no-untyped-def]
    """10 us and 1 us per kB of the busiest rank, received or sent, own bytes free."""
    moved = bytes_PP - np.diag(np.diagonal(bytes_PP))
    return 10.0 + float(max(moved.sum(axis=0).max(), moved.sum(axis=1).max())) / 1e3


@pytest.fixture
def network(tmp_path: Path) -> Path:
    model = fit_network([made_result(a_bus, (0,) * ranks) for ranks in (2, 4)], bootstrap=20)
    path = tmp_path / "fit.json"
    path.write_text(model.model_dump_json())
    return path


def test_a_scan_shows_times_for_degrees_that_were_never_run(
    make_run: MakeRun, network: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(make_run())
    argv = ["scan", run, "--ep", "1,2,4", "--gpus-per-node", "4", "--network", str(network)]
    assert main([*argv, "--row-bytes", "16000", "--json"]) == 0
    rows = {row["ep"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    # EP 2: loads 1, 1, 2, 4 from two half ranks: 1 and 3 rows from each; 3 rows of 16 kB arrive at rank 1.
    assert rows[2]["dispatch_us"] == pytest.approx(10 + 48, rel=0.05)
    assert rows[2]["combine_us"] == pytest.approx(10 + 48, rel=0.05)
    assert rows[2]["dispatch_low_us"] <= rows[2]["dispatch_us"] <= rows[2]["dispatch_high_us"]
    assert rows[2]["extrapolated"] is None
    assert "1 ranks (measured 2 to 4)" in rows[1]["extrapolated"]
    assert main([*argv, "--row-bytes", "16000"]) == 0
    captured = capsys.readouterr()
    assert "dispatch us" in captured.out
    assert "extrapolated at EP 1" in captured.err


def test_times_over_links_between_pretended_nodes_say_so(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = made_result(a_bus, (0, 0, 1, 1)).model_copy(update={"notes": (NODES_AS_STATED,)})
    bench, model = tmp_path / "bench.json", tmp_path / "fit.json"
    bench.write_text(outcome.model_dump_json())
    assert main(["fit", str(bench), "--out", str(model), "--bootstrap", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == [NODES_AS_STATED]
    scan = ["scan", str(make_run()), "--ep", "4", "--gpus-per-node", "2", "--network", str(model)]
    assert main([*scan, "--row-bytes", "16", "--json"]) == 0
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem == f"the network model: {NODES_AS_STATED}"
    assert fit_network([made_result(a_bus, (0, 0, 1, 1))], bootstrap=0).notes == ()


def test_links_the_model_never_saw_leave_a_reason_and_no_number(
    make_run: MakeRun, network: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["scan", str(make_run()), "--ep", "4", "--gpus-per-node", "2", "--network", str(network)]
    assert main([*argv, "--row-bytes", "16", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["dispatch_us"] is None
    assert "never measured" in row["no_prediction"]


def test_a_scan_without_bytes_per_row_asks_for_them(
    make_run: MakeRun, network: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scan", str(make_run()), "--ep", "2", "--network", str(network)]) == 1
    assert "give --row-bytes" in capsys.readouterr().err


def test_an_algorithm_that_was_not_measured_is_refused(make_run: MakeRun, network: Path) -> None:
    from observatory.analysis.network import load_network

    with pytest.raises(BenchmarkError, match="is of flat"):
        scan_times(
            open_run(make_run()), load_network(network), ep_degrees=[2], gpus_per_node=2, algorithm="gather"
        )


def test_rows_have_the_bytes_of_the_model() -> None:
    assert row_bytes(ModelSpec(name="m", hidden_size=96, dtype="bfloat16")) == 192
    assert row_bytes(ModelSpec(name="m", hidden_size=96, dtype="torch.float32")) == 384
    with pytest.raises(RunError, match="hidden size of 2147483648; rows of at most 1024 MiB"):
        row_bytes(ModelSpec(name="m", hidden_size=2**31, dtype="float32"))


def test_whole_rows_keep_the_total_and_round_the_largest_remainders_up() -> None:
    assert whole_rows(np.array([[0.5, 0.2], [1.9, 1.4]])).tolist() == [[1, 0], [2, 1]]
    assert whole_rows(np.array([[3, 1], [0, 2]])).tolist() == [[3, 1], [0, 2]]


@pytest.mark.parametrize(
    ("placement", "config", "said"),
    [
        ([[0], [0], [1], [1]], {}, []),
        ([[0], [1], [0], [1]], {}, []),
        ([[0, 1], [0], [1], [1]], {}, ["had replicas; here all tokens of an expert go to its home"]),
        (None, {}, ["does not say which rank held which expert; placement linear is assumed"]),
        ([[0], [0], [1], [1]], {"deduplicate": True}, ["once per destination rank"]),
        ([[0], [0], [1], [1]], {"algorithm": "gather"}, ["gathered all tokens"]),
    ],
)
def test_matrices_that_are_not_what_the_run_exchanged_say_so(
    placement: list[list[int]] | None, config: dict[str, object], said: list[str], make_run: MakeRun
) -> None:
    path = make_run()
    manifest = json.loads((path / "run.json").read_text())
    manifest["topology"] = {"ranks": 2, "ep": 2, "placement": placement}
    (path / "run.json").write_text(json.dumps(manifest | {"config": config}))
    run = open_run(path)
    found = departures(run, ep=2)
    assert len(found) == len(said)
    assert all(part in note for part, note in zip(said, found, strict=True))
    assert departures(run, ep=4) == [], "another degree is a what-if, and reads as one"
    elsewhere = placement is not None and [ranks[0] for ranks in placement] != [0, 1, 0, 1]
    outcome = departures(run, ep=2, placement="round-robin")
    assert any("on other ranks than placement round-robin" in note for note in outcome) == elsewhere


def test_experts_are_where_the_run_had_them_at_its_own_degree(make_run: MakeRun) -> None:
    path = make_run()
    manifest = json.loads((path / "run.json").read_text())
    manifest["topology"] = {"ranks": 2, "ep": 2, "placement": [[0], [1], [1], [0]]}
    (path / "run.json").write_text(json.dumps(manifest))
    run = open_run(path)
    (first, *_) = captured_traffic(run, ep=2, bytes_per_row=1)
    (linear, *_) = captured_traffic(run, ep=2, bytes_per_row=1, placement="linear")
    load_E = next(iter(run.iter_loads())).load_SPE[0].sum(axis=0)
    assert (first.placement, linear.placement) == ("recorded", "linear")
    assert first.rows_RR.sum(axis=0).tolist() == [load_E[0] + load_E[3], load_E[1] + load_E[2]]
    assert linear.rows_RR.sum(axis=0).tolist() == [load_E[0] + load_E[1], load_E[2] + load_E[3]]
    assert next(captured_traffic(run, ep=4, bytes_per_row=1)).placement == "linear"
    assert set(scan_run(run, ep_degrees=[2, 4], gpus_per_node=4)["placement"]) == {"recorded", "linear"}
    manifest["topology"]["placement"] = None
    (path / "run.json").write_text(json.dumps(manifest))
    with pytest.raises(PlacementError, match="does not say which rank held which expert; give linear"):
        scan_run(open_run(path), ep_degrees=[2], gpus_per_node=4, placement="recorded")


def test_chosen_steps_are_spread_over_the_run(make_run: MakeRun) -> None:
    run = open_run(make_run(steps=9))
    found = captured_traffic(run, ep=2, bytes_per_row=1, steps=3)
    assert [item.step for item in found] == [0, 4, 8]


def replayed(captured_us: list[float], uniform_us: list[float]) -> BenchResult:
    traffic = [
        Traffic(
            pattern="captured",
            send_bytes_PP=((0, 8), (0, 0)),
            step=step,
            phase="decode",
            layer=1,
            role="dispatch",
        )
        for step in range(len(captured_us))
    ]
    plan = replay_plan(traffic, algorithms=["flat"], roles=["dispatch"])
    times = {"captured": captured_us, "uniform": uniform_us}
    return BenchResult(
        kind="replay",
        created_unix_s=0.0,
        backend="made-up",
        node_of_P=(0, 0),
        warmup=0,
        repeats=1,
        iterations=1,
        cases=tuple(
            BenchCase(
                **item.model_dump(),
                algorithm="flat",
                rank_us_RP=((times[item.pattern][item.step or 0], 1.0),),
                correct=True,
            )
            for item in plan.traffic
        ),
    )


def test_what_realism_costs_is_a_ratio_of_sums_over_steps() -> None:
    frame = realism(replayed([30.0, 10.0], [10.0, 10.0]))
    pooled = frame[["phase", "layer", "role"]].isna().to_numpy().tolist()
    assert pooled == [[True] * 3, [False, True, True], [False, True, False], [False] * 3]
    for name, value in (
        ("ratio", 2.0), ("captured_us", 20.0), ("extra_us", 10.0), ("exchanges", 2), ("steps", 2),
        # Student's t of one degree of freedom at 95 %, times a standard error of 1 and of 10 us.
        ("ratio_low", 0.0), ("ratio_high", 2 + 6.3138),
        ("extra_low_us", 10 - 63.138), ("extra_high_us", 10 + 63.138),
    ):  # fmt: skip
        assert frame[name].tolist() == pytest.approx([value] * 4, rel=1e-4), name
    single = realism(replayed([30.0], [10.0]))
    assert single["ratio_low"].isna().all(), "one pair has no interval"


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, 4, 8, 32])
def test_intervals_of_the_ratio_cover_it_also_with_few_steps(steps: int) -> None:
    generator = np.random.default_rng(steps)
    covered = 0
    for _ in range(400):
        uniform = generator.lognormal(3.0, 0.3, steps)
        frame = realism(
            replayed((1.3 * uniform * generator.lognormal(0.0, 0.2, steps)).tolist(), uniform.tolist())
        )
        truth = 1.3 * np.exp(0.2**2 / 2)
        covered += int(frame["ratio_low"][0] <= truth <= frame["ratio_high"][0])
    assert covered / 400 == pytest.approx(0.9, abs=0.05)


def test_what_is_pooled_is_drawn_step_by_step_because_its_exchanges_share_a_step() -> None:
    """Two layers that are slow in the same step tell no more than one of them."""
    one = replayed([30.0, 10.0, 10.0, 10.0], [10.0] * 4)
    cases = [*one.cases, *(case.model_copy(update={"layer": 2}) for case in one.cases)]
    both = realism(one.model_copy(update={"cases": tuple(cases)}))
    whole, alone = both.iloc[0], realism(one).iloc[0]
    assert (whole["exchanges"], whole["steps"]) == (8, 4)
    ends = ["ratio_low", "ratio_high", "extra_low_us", "extra_high_us"]
    assert whole[ends].tolist() == pytest.approx(alone[ends].tolist())


def test_a_replay_without_its_uniform_half_is_refused() -> None:
    whole = replayed([30.0, 10.0], [10.0, 10.0])
    half = whole.model_copy(update={"cases": tuple(c for c in whole.cases if c.pattern == "captured")})
    with pytest.raises(BenchmarkError, match="do not pair up"):
        realism(half)
    with pytest.raises(BenchmarkError, match="no replay but a benchmark"):
        realism(whole.model_copy(update={"kind": "alltoall"}))


def _doubted(network: Path) -> Path:
    """The same model, measured on 3 ranks, of which rank 0 was found to be slow."""
    document = json.loads(network.read_text())
    (fit,) = document["fits"]
    fit["misfits"] = [
        {
            "code": "rank",
            "who": [0],
            "ranks": 3,
            "node_of_P": [0] * 3,
            "factor": 2.0,
        }
    ]
    fit["verdict"] |= {
        "code": "does_not_fit",
        "reasons": [{"code": "held_out_median", "value": 0.4, "bound": 0.25}],
    }
    fit["domain"]["ranks"] = [2, 3, 6]
    path = network.with_name("doubted.json")
    path.write_text(json.dumps(document))
    return path


def test_a_scan_says_which_layouts_times_do_not_tell_apart(
    make_run: MakeRun, network: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "scan",
        str(make_run()),
        "--gpus-per-node",
        "4",
        "--network",
        str(network),
        "--row-bytes",
        "16000",
    ]
    layouts = ["--placement", "linear", "--placement", "round-robin", "--placement", "auto"]
    assert main([*argv, "--ep", "2", *layouts, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [row["placement"] for row in document["rows"]] == ["linear", "round-robin"]
    (compared,) = document["comparisons"]
    times = [
        sum(row[f"{role}_us"] for role in ("dispatch", "combine"))
        for row in sorted(document["rows"], key=lambda row: str(row["placement"]))
    ]
    assert compared["ratio"] == pytest.approx(times[0] / times[1])
    assert (compared["code"] == "apart") == (not compared["low"] <= 1 <= compared["high"])
    assert main([*argv, "--ep", "2", "--placement", "linear", "--placement", "linear"]) == 0
    assert "EP 2 linear and" not in capsys.readouterr().err
    assert main([*argv, "--ep", "2,4"]) == 0
    said = capsys.readouterr().err
    assert "prefill: predicted times do not distinguish EP 2 linear from EP 4 linear: 1.00 times" in said


def test_a_scan_repeats_the_verdict_and_marks_times_through_misfits(
    make_run: MakeRun, network: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["scan", str(make_run()), "--ep", "4", "--gpus-per-node", "4", "--row-bytes", "16000"]
    assert main([*argv, "--network", str(network)]) == 0
    said = capsys.readouterr()
    assert "does not fit" not in said.err
    assert said.out.count("!") == 1, "only the legend"
    doubted = str(_doubted(network))
    assert main([*argv, "--network", doubted]) == 0
    said = capsys.readouterr()
    assert "flat over made-up: does not fit: the median error on held-out matrices is 40%" in said.err
    assert (
        "what rank 0 sends and receives, of 3 ranks, is slower than the others: a byte costs 2 times"
        in said.err
    )
    assert "times marked ! at EP 4 are through what the model does not describe" in said.err
    assert said.out.count("!") > 1
    assert main([*argv, "--network", doubted, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["network"]["verdict"]["code"] == "does_not_fit"
    assert [misfit["who"] for misfit in document["network"]["misfits"]] == [[0]]
    assert [row["misfits"] for row in document["rows"]] == [[0]]


def test_two_placement_files_of_one_name_are_refused(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for folder, ranks in (("a", [0, 0, 1, 1]), ("b", [0, 1, 0, 1])):
        (tmp_path / folder).mkdir()
        files.append(tmp_path / folder / "map.json")
        files[-1].write_text(json.dumps({"expert_to_rank": ranks}))
    options = [word for file in files for word in ("--placement", str(file))]
    assert main(["scan", str(make_run()), *options]) == 1
    assert "have one name; rename one of the files" in capsys.readouterr().err

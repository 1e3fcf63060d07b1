"""The command line of ``observatory advise``: what it prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from observatory.advice.conclusions import Code, conclude_advice
from observatory.advice.mitigations.document import doubt_sentences
from observatory.advice.words import conclusion_sentences
from observatory.cli import main
from tests.advice.mitigations.runs import sized_run

H100 = ("--hardware", "h100-sxm")


def advised(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main(["advise", *argv, "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_a_crowded_rank_is_found_and_the_command_that_helps_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = sized_run(tmp_path / "run")
    assert main(["advise", str(run), "--ranks", "4", *H100, "--horizon-steps", "1000000"]) == 0
    said = capsys.readouterr()
    assert "next: observatory place" in said.out + said.err
    document = advised(capsys, str(run), "--ranks", "4", *H100)
    (phase,) = document["runs"][0]["phases"]
    rows = {row["change"]: row for row in phase["verdicts"]}
    # Half of the load is on the first rank; the roofline of an H100 at 8192 assignments is arithmetic.
    assert rows["placement"]["gain"] == pytest.approx(0.55, abs=0.1)
    assert rows["hierarchical"]["verdict"] in ("not known", "not applicable")
    assert rows["today"]["rests_on"] in ("assumed", "published")


def test_uniform_loads_are_not_worth_changing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = advised(capsys, str(sized_run(tmp_path / "run", skew=1.0)), "--ranks", "4", *H100)
    assert document["runs"][0]["phases"][0]["best"] is None
    assert document["conclusion"][0]["code"] == "nothing"


def test_what_is_in_the_way_of_a_gain_is_concluded_not_that_nothing_is_to_gain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # One expert on each rank: only copies of the four busy ones help, and there is no room for any.
    run = str(sized_run(tmp_path / "run", skew=30.0))
    (tmp_path / "t.toml").write_text("ranks = 16\nmemory_bytes = 30e6\nmove_bytes_per_s = 20e9")
    document = advised(capsys, run, "--topology", str(tmp_path / "t.toml"), *H100)
    held_up, then = document["conclusion"]
    assert held_up["code"] == "no_memory"
    assert held_up["needed_bytes"] > held_up["memory_bytes"] == 30e6
    assert held_up["gain"] > 0.3
    assert then["code"] == "more_memory"
    (tmp_path / "t.toml").write_text("ranks = 16\nmove_bytes_per_s = 20e9\nstall_s = 1000.0")
    document = advised(capsys, run, "--topology", str(tmp_path / "t.toml"), *H100)
    assert [reason["code"] for reason in document["conclusion"]] == ["nothing", "pays_late"]


def test_a_prediction_far_from_what_was_measured_is_concluded_as_that(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--ranks", "4", *H100, "--horizon-steps", "1000000")
    document = advised(capsys, str(sized_run(tmp_path / "run")), *options)
    (phase,) = document["runs"][0]["phases"]
    phase["best"] = None
    for row in phase["verdicts"]:
        if row["verdict"] == "change":
            row["verdict"] = "far off"
            row["reason"] = {"code": "prediction_far_off", "predicted_us": 1e3, "measured_us": 3e3}
    first, then = conclude_advice(document)
    assert (first.code, then.code) == (Code.FAR_OFF, Code.FIT_AGAIN)
    assert "1 ms and took 3 ms" in conclusion_sentences([first])[0]


def test_too_few_sampled_tokens_are_stated_where_exchanges_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = advised(capsys, str(sized_run(tmp_path / "run")), "--ranks", "4", *H100)
    network = {"source": "fit.json", "hosts": [], "median_error": 0.1, "verdict": "valid"}
    (run,) = document["runs"]
    for given, stated in ((None, False), (network, True)):
        doubts = " ".join(doubt_sentences({"runs": [{**run, "network": given}]}))
        # Without a network model nothing depends on which experts a token has.
        assert ("too few sampled tokens of prefill" in doubts) == stated


@pytest.mark.parametrize(
    ("reason", "stated"),
    [
        ({"code": "ranks_outside", "ranks": 4, "measured": "2 to 3"}, "measured on 2 to 3 ranks alone"),
        ({"code": "nodes_outside", "nodes": 4, "measured": "1"}, "measured on 1 node alone"),
        ({"code": "ranks_on_node_outside", "ranks": 1, "measured": "2"}, "on 2 ranks on a node alone"),
    ],
)
def test_what_a_network_model_was_measured_on_is_concluded_where_the_set_up_is_outside(
    reason: dict[str, Any], stated: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = advised(capsys, str(sized_run(tmp_path / "run")), "--ranks", "4", *H100)
    (phase,) = document["runs"][0]["phases"]
    phase["best"] = None
    for row in phase["verdicts"]:
        if row["verdict"] in ("change", "does not pay"):
            row |= {"verdict": "extrapolated", "reason": reason}
    first, then = conclude_advice(document)
    assert (first.code, then.code) == (Code.EXTRAPOLATED, Code.OTHER_FABRIC)
    assert stated in conclusion_sentences([first])[0]
    assert then.values["ranks"] == 4


def test_ranks_that_experts_do_not_fill_have_their_reason_in_the_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["advise", str(sized_run(tmp_path / "run")), "--ranks", "4", *H100, "--other-ranks", "5"]) == 0
    )
    assert "16 experts do not fill 5 ranks evenly" in " ".join("".join(capsys.readouterr()).split())


def test_the_document_is_written_as_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "advice.json"
    document = advised(capsys, str(sized_run(tmp_path / "run")), "--ranks", "4", *H100, "--out", str(out))
    assert json.loads(out.read_text()) == document
    assert main(["advise", str(tmp_path / "run"), "--ranks", "4", *H100, "--out", str(out)]) == 1
    assert "--force" in capsys.readouterr().err


def test_csv_has_the_rows_of_every_phase(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", str(sized_run(tmp_path / "run")), "--ranks", "4", *H100, "--csv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("change,setting,")
    assert any(line.startswith("placement,") for line in lines)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ((), "give --ranks, or --topology"),
        (("--ranks", "4"), "give --experts or --hardware"),
        (("--ranks", "4", "--hardware", "abacus"), "does not exist"),
        (("--ranks", "4", *H100, "--phase", "lunch"), "--phase 'lunch' is not known"),
        (("--ranks", "4", *H100, "--phase", "decode"), "no steps of decode"),
        (("--ranks", "5", *H100), "16 experts"),
        (("--ranks", "4", *H100, "--experts", "x.json"), "give one of them"),
        (("--ranks", "4", *H100, "--network", "nothing.json"), "cannot be read"),
        (("--topology", "nothing.toml", *H100), "cannot be read"),
    ],
)
def test_what_cannot_be_judged_is_refused_in_one_line(
    options: tuple[str, ...], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = sized_run(tmp_path / "run")
    assert main(["advise", str(run), *options]) == 1
    said = capsys.readouterr().err
    assert problem in said
    assert said.startswith("observatory: ")
    assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("ranks = 1", "ranks"),
        ("ranks = 4\ncolour = 'red'", "colour"),
        ("ranks = ", "not valid"),
        ("ranks = 4\nmemory_bytes = inf", "memory_bytes"),
        ("", "ranks"),
    ],
)
def test_topology_files_are_checked(
    text: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.toml").write_text(text)
    assert (
        main(["advise", str(sized_run(tmp_path / "run")), "--topology", str(tmp_path / "t.toml"), *H100]) == 1
    )
    assert problem in capsys.readouterr().err


def test_a_run_of_few_steps_is_not_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = sized_run(tmp_path / "run", steps=15)
    assert main(["advise", str(run), "--ranks", "4", *H100]) == 1
    assert "15 steps" in capsys.readouterr().err


def test_another_set_up_and_another_fabric_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = advised(capsys, str(sized_run(tmp_path / "run")), "--ranks", "4", *H100)
    (run,) = document["runs"]
    assert run["ran"] == {"ranks": 1, "gpus_per_node": None, "hosts": []}
    network = {"source": "fit.json", "hosts": ["node7"], "median_error": 0.1, "verdict": "valid"}
    for hosts, ranks, more in ((["node7"], 4, 0), (["node8"], 4, 1), (["node8"], 2, 2)):
        ran = {"ranks": ranks, "gpus_per_node": run["setup"]["gpus_per_node"], "hosts": hosts}
        doubts = doubt_sentences({"runs": [{**run, "ran": ran, "network": network}]})
        names = ("another fabric", "the set-up is not that of the run")
        assert sum(any(name in text for name in names) for text in doubts) == more
        assert any("node7" in text for text in doubts) == (more > 0)


def test_a_run_without_assignments_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(sized_run(tmp_path / "run", tokens=0))
    for argv in (["advise", run, *H100], ["place", run, "--out", str(tmp_path / "p.json")]):
        assert main([*argv, "--ranks", "4"]) == 1
        assert "assignment" in capsys.readouterr().err


def test_the_option_with_a_wrong_list_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", str(sized_run(tmp_path / "run")), "--other-ranks", "x"]) == 1
    assert "--other-ranks" in capsys.readouterr().err


def test_of_several_runs_the_one_that_is_advised_on_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uneven, even = sized_run(tmp_path / "uneven"), sized_run(tmp_path / "even", skew=1.0)
    for runs, is_named in (([uneven], False), ([even, uneven], True)):
        assert main(["advise", *map(str, runs), "--ranks", "4", *H100]) == 0
        said = " ".join("".join(capsys.readouterr()).split())
        assert (f"worth changing: for {uneven}" in said) == is_named

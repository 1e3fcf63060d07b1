"""``observatory compare``, as its user sees it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from observatory.cli import main
from tests.advice.mitigations.runs import sized_run
from tests.analysis.compare.made import made_run
from tests.analysis.provenance.made import place_ranks, placed_rank


def document(capsys: pytest.CaptureFixture[str], *argv: object, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["compare", *map(str, argv), "--json"]) == code
    parsed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return parsed


def row(compared: dict[str, Any], name: str) -> dict[str, Any]:
    (wanted,) = [row for row in compared["comparisons"][0]["rows"] if row["name"] == name]
    return dict(wanted)


def test_a_known_change_is_told_from_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = made_run(tmp_path / "base", seed=1, tokens_seed=0)
    same = made_run(tmp_path / "same", seed=2, tokens_seed=0, started=1_000_600.0)
    slow = made_run(tmp_path / "slow", seed=3, tokens_seed=0, ms=12.0)
    skew = made_run(tmp_path / "skew", seed=4, tokens_seed=5, skew=2.0, condition="code")
    compared = document(capsys, base, same)
    assert row(compared, "decode.ms")["verdict"] == "same"
    assert row(compared, "decode.gini")["verdict"] == "identical"
    codes = {reason["code"] for reason in compared["comparisons"][0]["confounders"]}
    assert {"order", "one_run_each", "paired"} <= codes
    assert compared["conclusion"][0]["code"] == "all_same"
    slower = row(document(capsys, base, slow), "decode.ms")
    assert slower["verdict"] == "higher"
    assert slower["relative_low"] < 0.2 < slower["relative_high"]
    for compared in (document(capsys, base, slow), document(capsys, base, same)):
        time, rate = (row(compared, f"decode.{metric}") for metric in ("ms", "tokens_per_s"))
        assert rate["base"] == pytest.approx(64 / time["base"] * 1e3)
        assert rate["relative_low"] == pytest.approx(1 / (1 + time["relative_high"]) - 1)
        assert rate["relative_high"] == pytest.approx(1 / (1 + time["relative_low"]) - 1)
        assert rate["difference"] == pytest.approx(rate["other"] - rate["base"])
        assert {"same": "same", "higher": "lower"}[time["verdict"]] == rate["verdict"]
        assert rate["adjusted_p"] == time["adjusted_p"]
    other = document(capsys, base, skew)
    assert row(other, "prefill.gini")["verdict"] == "higher"
    assert not row(other, "prefill.gini")["paired"]
    layers = [item for item in other["comparisons"][0]["layers"] if item["name"] == "prefill.gini"]
    assert [item["verdict"] for item in layers] == ["higher", "higher"]
    assert "other_data" in {reason["code"] for reason in other["comparisons"][0]["confounders"]}


def test_where_ranks_ran_is_named_where_both_runs_state_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, other = (made_run(tmp_path / name, seed=1) for name in ("base", "other"))
    before = {reason["code"] for reason in document(capsys, base, other)["comparisons"][0]["confounders"]}
    place_ranks(base, placed_rank(0, node=0, environment={"MASTER_PORT": "1"}))
    codes = {reason["code"] for reason in document(capsys, base, other)["comparisons"][0]["confounders"]}
    assert codes - before == {"other_cores"}  # the other run is older
    place_ranks(
        other,
        placed_rank(
            0,
            node=0,
            environment={"MASTER_PORT": "2", "NCCL_ALGO": "Tree"},
            versions={"kernel": "6.1"},
            fabric=[],
            numa_nodes="1",
            memory_limit_bytes=None,
            other_users=3,
        ),
    )
    reasons = {
        reason["code"]: reason for reason in document(capsys, base, other)["comparisons"][0]["confounders"]
    }
    assert reasons.keys() - before == {
        "other_network", "other_numa", "other_memory_limit", "other_neighbours", "other_system",
        "other_settings",
    }  # fmt: skip
    assert reasons["other_settings"]["changes"] == ["NCCL_ALGO none against Tree"]
    assert reasons["other_neighbours"]["other"] == "0 jobs, 3 users"
    assert main(["compare", str(base), str(other)]) == 0
    assert "InfiniBand 400 Gbit/s against none seen" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("thresholds", "code", "states"),
    [
        (["decode.ms > +3 %"], 1, ["passed"]),
        (["decode.ms > +90 %"], 0, ["within"]),
        (["decode.ms < -3 %"], 0, ["within"]),
        (["decode.ms>+1"], 1, ["passed"]),
        (["decode.ms > +15 %"], 0, ["undecided"]),
        (["decode.wait_ms > +3 %"], 4, ["not_compared"]),
        (["decode.wait_ms > +3 %", "decode.ms > +3 %"], 1, ["not_compared", "passed"]),
        (["decode.dead_experts > +1"], 0, ["within"]),
    ],
)
def test_thresholds_set_the_exit_code(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    thresholds: list[str],
    code: int,
    states: list[str],
) -> None:
    base = made_run(tmp_path / "base", seed=1, tokens_seed=0)
    slow = made_run(tmp_path / "slow", seed=2, tokens_seed=0, ms=12.1)  # 10.1 to 12.1 ms by these seeds
    options = [word for text in thresholds for word in ("--fail-if", text)]
    compared = document(capsys, base, slow, *options, code=code)
    assert [item["state"] for item in compared["thresholds"]] == states


def test_counts_without_an_interval_are_not_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [made_run(tmp_path / name, seed=seed, skew=20.0 * seed) for seed, name in enumerate("ab")]
    compared = document(capsys, *runs, "--fail-if", "decode.dead_experts > +0", code=4)
    assert row(compared, "decode.dead_experts")["difference"] > 0
    (judged,) = compared["thresholds"]
    assert (judged["state"], judged["low"], judged["high"]) == ("not_compared", None, None)


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        ("decode.speed > +3 %", "expected PHASE.NAME"),
        ("decode.ms >= +3 %", "a number"),
        ("decode.ms > +3 % or more", "a number"),
        ("decode.ms > +1e9", "a number"),
        ("\x1b[2J > +3", "a number"),
    ],
)
def test_what_is_no_threshold_is_wrong_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], threshold: str, expected: str
) -> None:
    assert main(["compare", str(tmp_path), str(tmp_path), "--fail-if", threshold]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert "\x1b" not in error


def test_runs_without_times_or_steps_say_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = made_run(tmp_path / "base", steps=1, times=False, phases=("prefill",))
    other = made_run(tmp_path / "other", seed=9, steps=1, times=False)
    compared = document(capsys, base, other)
    reasons = {
        item["name"]: (item["reason"] or {}).get("code") for item in compared["comparisons"][0]["rows"]
    }
    assert reasons["prefill.gini"] == "few_steps"
    assert reasons["decode.gini"] == "one_side"
    assert compared["conclusion"][0]["code"] == "no_difference_known"


def test_one_run_twice_is_identical(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made_run(tmp_path / "run")
    compared = document(capsys, run, run)
    assert {item["verdict"] for item in compared["comparisons"][0]["rows"]} == {"identical"}
    assert compared["comparisons"][0]["confounders"][0]["code"] == "same_run"
    assert compared["conclusion"][0]["code"] == "identical"


def test_layers_that_do_not_align_are_compared_by_depth_or_as_a_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = made_run(tmp_path / "base", layers=2)
    deep = made_run(tmp_path / "deep", layers=4, seed=1, model="deep")
    wide = made_run(tmp_path / "wide", experts=16, seed=2, model="wide")
    compared = document(capsys, base, deep)["comparisons"][0]
    assert compared["alignment"]["code"] == "relative_depth"
    places = {(item["layer"], item["other_layer"]) for item in compared["layers"]}
    assert places == {(0, 1), (1, 3)}
    compared = document(capsys, base, wide)
    assert compared["comparisons"][0]["alignment"]["code"] == "as_whole"
    assert compared["comparisons"][0]["layers"] == []
    assert row(compared, "prefill.entropy_bits")["reason"]["code"] == "experts_differ"
    assert row(compared, "prefill.gini")["difference"] is not None


def test_saved_documents_are_compared_by_their_intervals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = made_run(tmp_path / "base", seed=1)
    other = made_run(tmp_path / "other", seed=2, skew=2.0)
    for name in ("base", "other"):
        assert main(["routing", str(tmp_path / name), "--json"]) == 0
        (tmp_path / f"{name}.json").write_text(capsys.readouterr().out)
    compared = document(capsys, tmp_path / "base.json", tmp_path / "other.json")
    assert row(compared, "prefill.gini")["verdict"] == "higher"
    assert row(compared, "prefill.entropy_bits")["reason"]["code"] == "no_interval"
    compared = document(capsys, base, tmp_path / "other.json")
    assert row(compared, "prefill.gini")["verdict"] == "higher"
    assert row(compared, "prefill.ms")["reason"]["code"] == "not_in_document"
    blocks = [json.loads((tmp_path / "other.json").read_text())]
    (tmp_path / "report.html").write_text(
        f'<p>x</p><script type="application/json" id="observatory-documents">{json.dumps(blocks)}</script>'
    )
    assert row(document(capsys, base, tmp_path / "report.html"), "prefill.gini")["verdict"] == "higher"
    assert main(["report", str(other), "--out", str(tmp_path / "full.html"), "--ep", "2"]) == 0
    compared = document(capsys, base, tmp_path / "full.html")
    assert row(compared, "prefill.gini")["verdict"] == "higher"
    assert compared["comparisons"][0]["other"]["run_id"] == "id-other"


def test_pages_of_long_runs_compare_as_the_runs_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("observatory.analysis.compare.collect.MOST_SAMPLES", 60)
    runs, pages = [], []
    for seed, ms in ((1, 10.0), (2, 12.0)):
        name = f"run-{seed}"
        path = made_run(tmp_path / name, seed=seed, ms=ms, steps=64, layers=1, phases=("decode",))
        runs.append(path)
        pages.append(tmp_path / f"{name}.html")
        assert main(["report", str(path), "--out", str(pages[-1]), "--ep", "2"]) == 0
    of_runs, of_pages = (row(document(capsys, *given), "decode.ms") for given in (runs, pages))
    assert of_runs["verdict"] == of_pages["verdict"] == "higher"
    for name in ("base", "other", "relative_low", "relative_high"):
        assert of_pages[name] == pytest.approx(of_runs[name], rel=0.05)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"gini": "much"}, "gini is 'much', not a number"),
        ({"gini": -0.5}, "gini is below 0"),
        ({"gini_low": 0.9, "gini_high": 0.1}, "gini_low is above gini_high"),
        ({"steps": -3}, "steps is '-3', not a count"),
        ({"tokens": 1.5}, "tokens is '1.5', not a count"),
        (None, "is there twice"),
    ],
)
def test_a_damaged_document_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object] | None, expected: str
) -> None:
    run = made_run(tmp_path / "run")
    assert main(["routing", str(run), "--json"]) == 0
    saved = json.loads(capsys.readouterr().out)
    if changes is None:
        saved["layers"].append(saved["layers"][0])
    else:
        saved["layers"][0] |= changes
    (tmp_path / "saved.json").write_text(json.dumps(saved))
    assert main(["compare", str(run), str(tmp_path / "saved.json")]) == 1
    error = capsys.readouterr().err
    assert f"saved.json is damaged: {expected}" in error or (changes is None and expected in error)
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", "{", "not valid JSON"),
        ("a.json", '{"kind": "routing", "schema_version": "9.0"}', "schema version 9.0"),
        ("a.json", '{"kind": "routing"}', "no schema_version"),
        ("a.json", '{"kind": "routing", "schema_version": "1.0", "layers": [{}]}', "lacks what its kind has"),
        ("a.json", '{"kind": "doctor", "schema_version": "1.0"}', "no values that can be compared"),
        ("a.json", "[1]", "not a document"),
        ("a.html", "<p>", "holds no documents"),
        (
            "a.html",
            '<script type="application/gzip" id="observatory-documents">AAAA</script>',
            "are damaged",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str, expected: str
) -> None:
    (tmp_path / name).write_text(content)
    run = made_run(tmp_path / "run", steps=2)
    assert main(["compare", str(run), str(tmp_path / name)]) == 1
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


def test_what_is_no_comparison_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made_run(tmp_path / "run", steps=2)
    assert main(["compare", str(run)]) == 1
    assert "one input alone" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["compare", str(run), str(tmp_path / "empty")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_simulated_device_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, other = (made_run(tmp_path / kind, device_kind=kind) for kind in ("nvidia", "replay"))
    (item,) = document(capsys, base, other)["comparisons"]
    assert (item["base"]["simulated_device"], item["other"]["simulated_device"]) == (False, True)
    sides = [reason["side"] for reason in item["confounders"] if reason["code"] == "simulated_device"]
    assert sides == ["the other"]
    page = tmp_path / "page.html"
    assert main(["compare", str(base), str(other), "--html", str(page)]) == 0
    assert "simulated device)" in capsys.readouterr().out.replace("\n", " ")
    assert "simulated device)" in page.read_text()


def test_csv_has_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(made_run(tmp_path / name, seed=seed)) for seed, name in enumerate(("a", "=b"))]
    assert main(["compare", *runs, "--csv", "--table", "layers"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("base_name,other_name,name,phase,metric")
    assert len(rows) == 2 * 2 * 5


def test_the_page_is_one_offline_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = made_run(tmp_path / "base", model="<script>alert(1)</script>")
    other = made_run(tmp_path / "other", seed=3, skew=2.0, model="</script><img src=x>")
    page = tmp_path / "page.html"
    options = [str(base), str(other), "--html", str(page), "--fail-if", "prefill.gini > +3 %"]
    assert main(["compare", *options]) == 1
    text = page.read_text()
    assert "<script>alert" not in text
    assert "<img" not in text
    assert not re.search(r"(?:src|href)=[\"'](?!#)", text)
    assert text.count("<svg") > 4
    embedded = re.search(r'id="observatory-documents">(.*?)</script>', text)
    assert embedded is not None
    assert json.loads(embedded.group(1))[0]["kind"] == "compare"
    capsys.readouterr()
    assert main(["compare", *options]) == 1
    assert "exists" in capsys.readouterr().err
    assert main(["compare", *options, "--force"]) == 1


def test_further_runs_of_the_baseline_widen_intervals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scatter = (10.0, 12.5, 9.0, 11.5)
    runs = [made_run(tmp_path / f"run{n}", seed=n, tokens_seed=0, ms=ms) for n, ms in enumerate(scatter)]
    other = made_run(tmp_path / "other", seed=9, tokens_seed=0, ms=12.5)
    assert row(document(capsys, runs[0], other), "decode.ms")["verdict"] == "higher"
    repeats = [word for run in runs[1:] for word in ("--repeat", run)]
    compared = document(capsys, runs[0], other, *repeats)
    assert row(compared, "decode.ms")["verdict"] == "same"
    assert row(compared, "decode.ms")["runs"] == 4
    assert row(compared, "decode.gini")["verdict"] == "identical"
    elsewhere = made_run(tmp_path / "elsewhere", seed=10, tokens_seed=10)  # other tokens of one distribution
    assert row(document(capsys, runs[0], elsewhere, *repeats), "decode.gini")["verdict"] == "same"
    assert "several_runs" in {reason["code"] for reason in compared["comparisons"][0]["confounders"]}
    assert main(["compare", str(runs[0]), str(other), "--repeat", str(runs[1])]) == 1
    assert "two --repeat" in capsys.readouterr().err
    alien = made_run(tmp_path / "alien", model="alien")
    options = ["--repeat", str(runs[1]), "--repeat", str(alien)]
    assert main(["compare", str(runs[0]), str(other), *options]) == 1
    assert "differs from the baseline in its model" in capsys.readouterr().err
    copied = shutil.copytree(runs[1], tmp_path / "copied")
    for given in (copied, runs[0], other):
        options = ["--repeat", str(runs[1]), "--repeat", str(given)]
        assert main(["compare", str(runs[0]), str(other), *options]) == 1
        assert "is the same run as" in capsys.readouterr().err.splitlines()[-1]


def made_grid(folder: Path) -> Path:
    cells = []
    for number, (model, condition) in enumerate(
        (m, c) for m in ("first", "second") for c in ("prose", "code")
    ):
        name = f"{model}--{condition}"
        path = folder / "cells" / name
        made_run(path, seed=number, model=model, condition=condition, skew=2.0 if model == "second" else 0.5)
        cells.append({"name": name, "model": model, "data": condition, "state": "complete", "error": None})
    (folder / "grid.json").write_text(json.dumps({"config": {}, "cells": cells}))
    return folder


def test_models_of_a_grid_stand_next_to_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = made_grid(tmp_path / "grid")
    compared = document(capsys, grid)
    rows = {(item["model"], item["phase"]): item for item in compared["architectures"]}
    assert set(rows) == {(model, phase) for model in ("first", "second") for phase in ("prefill", "decode")}
    assert rows["second", "prefill"]["gini"] > rows["first", "prefill"]["gini"]
    assert rows["second", "prefill"]["conditions"] == ["code", "prose"]
    pairs = [(item["base"]["model"], item["other"]["model"]) for item in compared["comparisons"]]
    assert pairs == [("first", "second")] * 2
    assert main(["compare", str(grid), "--html", str(tmp_path / "page.html")]) == 0
    printed = capsys.readouterr()
    assert "No times of exchanges" in printed.out
    page = (tmp_path / "page.html").read_text()
    assert 'id="models-figure"' in page
    assert page.count('<details class="pair">') == 2
    assert main(["compare", str(grid), "--csv", "--table", "architectures"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.startswith("model,mixer,phase")
    assert len(lines) == 4
    (tmp_path / "scan.json").write_text('{"rows": [], "skipped": []}')
    assert main(["compare", str(grid), str(tmp_path / "scan.json")]) == 1
    assert "is the scan of a grid; give the grid's directory" in capsys.readouterr().err


def test_cells_of_two_grids_are_matched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = made_grid(tmp_path / "before"), made_grid(tmp_path / "after")
    compared = document(capsys, before, after)
    assert len(compared["comparisons"]) == 4
    for item in compared["comparisons"]:
        assert (item["base"]["model"], item["base"]["data"]) == (
            item["other"]["model"],
            item["other"]["data"],
        )
    lonely = document(capsys, before, after / "cells" / "first--code")["without_counterpart"]
    assert {reason["code"] for reason in lonely} == {"no_counterpart"}


def test_premises_of_advice_stand_next_to_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = made_grid(tmp_path / "grid")
    advised = str(sized_run(tmp_path / "sized"))
    out = str(tmp_path / "advice.json")
    assert main(["advise", advised, "--ranks", "4", "--hardware", "h100-sxm", "--out", out]) == 0
    capsys.readouterr()
    premises = document(capsys, grid, "--advice", out)["premises"]
    assert {"model": "sized", "phase": "prefill", "change": "placement", "holds": True} in premises
    assert main(["compare", str(grid), "--advice", out]) == 0
    assert "whether the premises of changes hold" in capsys.readouterr().out
    assert main(["compare", str(grid), "--advice", str(grid / "grid.json")]) == 1
    assert capsys.readouterr().err.count("\n") == 1

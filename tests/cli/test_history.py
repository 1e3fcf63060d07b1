"""``observatory history``, as its user sees it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from observatory.cli import main
from tests.analysis.compare.made import made_run


def test_a_series_of_runs_and_what_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(12):
        made_run(
            tmp_path / "nightly" / f"run{number}",
            seed=number,
            ms=10.0 + 0.03 * number % 0.1 + (2.0 if number >= 6 else 0.0),
            started=1e9 + number,
            steps=8,
            phases=("decode",),
        )
    (tmp_path / "nightly" / "damaged").mkdir()
    (tmp_path / "nightly" / "damaged" / "run.json").write_text("{")
    assert main(["history", str(tmp_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [item["name"] for item in document["left_out"]] == ["nightly/damaged"]
    (series,) = document["series"]
    (change,) = [row for row in series["changes"] if row["name"] == "decode.ms"]
    assert change["from"] == "nightly/run6"
    assert document["conclusion"][0]["code"] == "level_changed"
    assert main(["history", str(tmp_path)]) == 0
    assert "decode.ms" in capsys.readouterr().out
    assert main(["history", str(tmp_path), "--csv", "--table", "values"]) == 0
    assert capsys.readouterr().out.count("decode.ms,") == 12
    assert main(["history", str(tmp_path), "--html", str(tmp_path / "page.html")]) == 0
    assert "nightly/run6" in (tmp_path / "page.html").read_text()


def test_a_folder_without_runs_or_with_few_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["history", str(tmp_path)]) == 1
    assert "holds no runs" in capsys.readouterr().err
    assert main(["history", str(tmp_path / "missing")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    made_run(tmp_path / "one", steps=2)
    assert main(["history", str(tmp_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["conclusion"][0]["code"] == "too_few_points"
    assert {track["reason"]["code"] for track in document["series"][0]["tracks"]} == {"few_points"}


def test_a_folder_that_may_not_be_entered_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made_run(tmp_path / "one", steps=2)
    (tmp_path / "lost+found").mkdir()
    real = os.stat

    def stat(path: Any, **options: Any) -> os.stat_result:
        if "lost+found/" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, **options)

    monkeypatch.setattr(os, "stat", stat)
    assert main(["history", str(tmp_path), "--json"]) == 0
    (series,) = json.loads(capsys.readouterr().out)["series"]
    assert [point["name"] for point in series["points"]] == ["one"]


def test_a_run_whose_rows_fold_steps_is_a_series_of_its_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made_run(tmp_path / "folded", steps=40, window_steps=4, phases=("train_forward",), times=False)
    assert main(["history", str(run), "--json"]) == 0
    (series,) = json.loads(capsys.readouterr().out)["series"]
    assert len(series["points"]) == 40
    assert {track["name"] for track in series["tracks"]} == {
        f"train_forward.{metric}" for metric in ("gini", "entropy_bits", "dead_experts", "expert_drift")
    }
    assert main(["compare", str(run), str(made_run(tmp_path / "other", steps=12)), "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)
    codes = {row["name"]: row["reason"]["code"] for row in compared["comparisons"][0]["rows"]}
    assert codes["train_forward.gini"] == "one_side"
    assert codes["prefill.activated_experts"] == "steps_folded"
    assert compared["conclusion"] == [{"code": "no_difference_known"}]

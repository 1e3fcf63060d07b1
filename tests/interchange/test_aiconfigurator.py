"""The exponent that a performance model would be given for a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from observatory.cli import main
from tests.reports.sample_runs import manifest, steady_run, write_run


def test_the_command_writes_an_exponent_for_each_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(write_run(tmp_path / "run", manifest(layers=2)))
    out = tmp_path / "alpha.json"
    assert main(["export", run, "aiconfigurator", "--out", str(out)]) == 0
    said = capsys.readouterr().err
    assert "prefill: alpha " in said
    document = json.loads(out.read_text())
    assert (document["experts"], document["top_k"]) == (32, 4)
    rows = document["rows"]
    assert [(row["phase"], row["layer"]) for row in rows] == [
        (phase, layer) for phase in ("prefill", "decode") for layer in (None, 0, 1)
    ]
    prefill = rows[0]
    assert (prefill["tokens"], prefill["steps"]) == (2048, 40)
    assert prefill["misplaced_share"] <= prefill["balanced_misplaced_share"]
    assert main(["export", run, "aiconfigurator", "--out", str(out)]) == 1
    assert "is there already" in capsys.readouterr().err


def test_equal_loads_are_balanced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(steady_run(tmp_path / "run", "m", "prose", [5, 5, 5, 5]))
    assert main(["export", run, "aiconfigurator", "--out", str(tmp_path / "a.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "aiconfigurator"
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert {(row["alpha"], row["nearest"], row["misplaced_share"]) for row in rows} == {
        (0.0, "balanced", 0.0)
    }

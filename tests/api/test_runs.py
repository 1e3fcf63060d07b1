"""A run opened in Python: its analyses as frames, its report, and how it shows itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import observatory
from observatory.errors import EnergyError, RunError
from tests.analysis.compare.made import made_run
from tests.collectives.bench.runs import write_captured_run
from tests.conftest import MakeRun


def test_imbalance_is_one_row_for_each_layer_and_phase(make_run: MakeRun) -> None:
    run = observatory.open_run(make_run())
    (row,) = run.imbalance().to_dict("records")
    assert (row["layer"], row["phase"], row["experts"]) == (3, "prefill", 4)
    # loads 1, 1, 2, 4: mean absolute difference 20 / 16, over twice the mean of 2
    assert row["gini"] == pytest.approx(20 / 16 / (2 * 2))
    assert row["expert_max_over_mean"] == 2.0
    assert run.imbalance(by="phase")["gini"].tolist() == [row["gini"]]


def test_scan_takes_degrees_or_those_that_fit(make_run: MakeRun) -> None:
    run = observatory.open_run(make_run())
    assert run.scan()["ep"].tolist() == [4]
    scanned = run.scan(ep=[2, 4], gpus_per_node=2)
    # linear: experts 0 and 1 on one rank (load 2), 2 and 3 on the other (load 6); mean 4
    assert scanned.set_index("ep")["rank_max_over_mean"].to_dict() == {2: 1.5, 4: 2.0}


def test_what_a_run_does_not_hold_is_refused_with_a_way_to_get_it(make_run: MakeRun) -> None:
    run = observatory.open_run(make_run())
    with pytest.raises(RunError, match="holds no exchanges; profile with several ranks"):
        run.exchange_summary()
    with pytest.raises(EnergyError, match="holds no power samples"):
        run.energy()
    with pytest.raises(RunError, match="by is 'expert'; expected one of layer, phase"):
        run.imbalance(by="expert")  # type: ignore[arg-type]


def test_the_report_of_a_run_is_one_file_and_not_overwritten_unasked(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = observatory.open_run(make_run())
    path = run.report(tmp_path / "report.html", ep=[2])
    assert "hand-made" in path.read_text("utf-8")
    with pytest.raises(RunError, match="exists; choose another place, or pass overwrite=True"):
        run.report(path)
    assert run.report(path, overwrite=True) == path


def test_a_run_shows_model_steps_phases_ranks_and_state(make_run: MakeRun, tmp_path: Path) -> None:
    run = observatory.open_run(make_run())
    facts = "model hand-made, data prose, MoE layers 1 of 4 experts, steps 6, phases prefill, ranks 1, "
    assert repr(run) == f"<Run '{tmp_path / 'run'}': {facts}state complete>"


def test_the_table_of_a_notebook_is_escaped(make_run: MakeRun) -> None:
    shown = observatory.open_run(make_run(model="<script>alert(1)</script>"))._repr_html_()
    assert "<script>" not in shown
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shown


def test_opening_and_analysing_a_run_needs_no_torch(tmp_path: Path) -> None:
    path = write_captured_run(tmp_path / "run")
    code = (
        "import sys, observatory; "
        f"run = observatory.open_run({str(path)!r}); run.imbalance(); run.scan(ep=[2]); "
        "print(run, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("ranks 2, state complete> False\n")


def test_two_runs_are_compared(tmp_path: Path) -> None:
    base, other = (
        observatory.open_run(made_run(tmp_path / name, seed=seed, skew=2.0 * seed))
        for seed, name in enumerate(("base", "other"))
    )
    rows = base.compare(other).set_index("name")
    assert rows.loc["prefill.gini", "verdict"] == "higher"
    assert rows.loc["prefill.gini", "relative_low"] > 0
    assert base.compare(other, layers=True)["layer"].tolist().count(1) == 10

"""Tidy tables of a run, read back by pandas."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pandas as pd
import pyarrow.parquet
import pytest

from observatory.cli import main
from observatory.errors import RunError
from observatory.interchange.exporters.tables import MOST_MARKDOWN_ROWS, write_tables
from observatory.run import open_run
from tests.conftest import MakeRun
from tests.interchange.test_tensorboard import two_ranks
from tests.reports.sample_power import a_load, a_power_run, samples_of
from tests.reports.sample_runs import manifest, write_run


def test_csv_and_parquet_hold_what_the_run_holds(tmp_path: Path) -> None:
    run = open_run(two_ranks(tmp_path / "run"))
    for form in ("csv", "parquet"):
        out = tmp_path / form
        written = write_tables(run, out, form=form)  # type: ignore[arg-type]
        assert [path.stem for path in written.files] == [
            "tokens", "loads", "exchanges", "exchange_bytes", "spans",
        ]  # fmt: skip
        frames = {
            path.stem: pd.read_csv(path) if form == "csv" else pd.read_parquet(path) for path in written.files
        }
        key = ["step", "layer", "source_rank", "expert"]
        loads = frames["loads"].sort_values(key)
        truth = run.expert_load().sort_values(key)
        assert loads[[*key, "load"]].to_numpy().tolist() == truth[[*key, "load"]].to_numpy().tolist()
        sent = frames["exchange_bytes"].query("direction == 'send' and step == 1")
        assert sent[["source_rank", "member", "bytes"]].to_numpy().tolist() == [
            [0, 0, 10], [0, 1, 20], [1, 0, 30], [1, 1, 40],
        ]  # fmt: skip
        received = frames["exchange_bytes"].query("direction == 'receive' and step == 0 and source_rank == 1")
        assert received["bytes"].tolist() == [20, 40]
        assert frames["exchanges"]["start_ns"].tolist() == run.exchanges()["start_ns"].tolist()
        assert written.rows == sum(map(len, frames.values()))


def test_cells_of_a_csv_are_no_formulas_and_of_markdown_no_markup(tmp_path: Path) -> None:
    for number, name in enumerate(("=HYPERLINK(1)", "@x|<b>y</b>", "-1+cmd", "\t=1", 'a","=1')):
        run = open_run(
            a_power_run(tmp_path / f"{number}", power=samples_of(a_load()).assign(device_uuid=name))
        )
        out = tmp_path / f"out-{number}"
        write_tables(run, out / "csv", form="csv")
        with (out / "csv" / "power.csv").open(newline="", encoding="utf-8") as file:
            cells = {row["device_uuid"] for row in csv.DictReader(file)}
        assert cells == {name if name[0] == "a" else f"'{name}"}
        write_tables(run, out / "parquet", form="parquet")
        kept = (
            pyarrow.parquet.read_table(out / "parquet" / "power.parquet")["device_uuid"].unique().to_pylist()
        )
        assert kept == [name], "no spreadsheet opens it: as it was"
        write_tables(run, out / "markdown", form="markdown")
        lines = (out / "markdown" / "power.md").read_text(encoding="utf-8").splitlines()
        assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
        assert "<b>" not in lines[2]


def test_markdown_is_for_people(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path / "run", manifest()))
    written = write_tables(run, tmp_path / "out", form="markdown", phase="decode", layers=[2])
    assert written.notes == ()
    lines = (tmp_path / "out" / "loads.md").read_text().splitlines()
    assert lines[0] == "| step | phase | layer | source_rank | window_steps | expert | load |"
    assert len(lines) == 2 + 20 * 32
    assert {line.split(" | ")[1:3][0] for line in lines[2:]} == {"decode"}
    written = write_tables(run, tmp_path / "all", form="markdown")
    assert written.notes == (f"loads.md has the first {MOST_MARKDOWN_ROWS} of {40 * 4 * 32} rows",)
    assert len((tmp_path / "all" / "loads.md").read_text().splitlines()) == 2 + MOST_MARKDOWN_ROWS


def test_the_command_writes_tables(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = str(make_run()), tmp_path / "out"
    assert main(["export", run, "csv", "--out", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["rows"], document["files"]) == (
        6 + 24,
        [str(out / "tokens.csv"), str(out / "loads.csv")],
    )
    assert main(["export", run, "csv", "--out", str(out)]) == 1
    assert "is there already" in capsys.readouterr().err
    assert main(["export", run, "csv", "--out", str(tmp_path / "b"), "--steps", "3"]) == 1
    assert "leave out --steps" in capsys.readouterr().err
    with pytest.raises(RunError, match="no rows of what was asked for"):
        write_tables(open_run(run), tmp_path / "c", form="csv", phase="decode")
    assert not (tmp_path / "c").exists()

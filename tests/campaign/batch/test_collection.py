"""What a campaign lacks: stated by `collect` and its report, run again by `submit`."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.campaign.batch.conftest import Login, commands
from tests.campaign.test_reduction import write_ranks

_PROFILES = 'models = ["tiny-mha"]\ndata = ["mock"]\nep = [1, 2]\n[profile]\npower = "off"\n'


def _campaign(login: Login) -> tuple[Path, Path]:
    """Two profiles that are finished, and a command that failed; the runs of the two, the spread one last."""
    login.submit(_PROFILES + commands("breaks", script="exit 7").replace("report = false\n", ""))
    assert login.slurm.run("103_0")[0] == 7
    runs = []
    for ranks in (1, 2):
        run = login.point(f"tiny-mha--mock--ep{ranks}") / "result" / "out" / "run"
        run.parent.mkdir(parents=True)
        runs.append(write_ranks(run, ranks=ranks))
    for job in ("101_0", "102_0", "104"):
        login.slurm.forget(job)
    return runs[0], runs[1]


def gaps_of(report: Path) -> str:
    """What the report says of gaps in the data."""
    problems = re.search(r'<div id="problems".*?</div>', report.read_text(), re.DOTALL)
    assert problems is not None
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", problems[0]))


def test_the_report_states_which_points_are_missing_and_why(login: Login) -> None:
    whole, _ = _campaign(login)
    (whole / "run.json").write_text("{")
    report = login.folder / "report.html"
    code, out, _ = login.command("collect", str(login.campaign), "--report", str(report), "--json")
    assert code == 0
    assert [gap["state"] for gap in json.loads(out)["gaps"]] == ["damaged", "failed"]
    text = gaps_of(report)
    assert "Missing: breaks failed, exit code 7" in text
    assert re.search(
        r"Missing: tiny-mha on mock, EP 1, both damaged; what it captured is in points/\S+", text
    )


def test_a_report_of_too_many_points_says_where_the_others_are(
    login: Login, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("observatory.campaign.batch.collection._MOST_REPORTED", 1)
    _campaign(login)
    report = login.folder / "report.html"
    code, out, _ = login.command("collect", str(login.campaign), "--report", str(report), "--json")
    assert code == 0
    assert len(json.loads(out)["conditions"]) == 2
    assert "Missing: 1 of 2 points are in summary.json alone" in gaps_of(report)


def test_what_a_finished_run_lacks_is_stated_and_submission_runs_it_again(login: Login) -> None:
    whole, spread = _campaign(login)
    assert "1 of 3 points would be submitted, 2 done already" in login.submit(
        (login.folder / "campaign.toml").read_text(), "--dry-run"
    )
    for table in ("routing", "spans", "exchange"):
        shutil.rmtree(whole / table)
    (spread / "routing" / "rank-00001" / "part-000000.parquet").write_bytes(b"PAR1")
    document = json.loads(login.command("collect", str(login.campaign), "--json")[1])
    first, second, third = document["notes"]
    assert first == "tiny-mha on mock, EP 1, both: it holds neither routing rows nor steps"
    assert second == "tiny-mha on mock, EP 2, both: rank 1 left no routing rows"
    assert "rank-00001/part-000000.parquet is truncated or corrupt" in third
    said = login.submit((login.folder / "campaign.toml").read_text())
    assert "3 of 3 points submitted" in said
    assert not (spread.parents[1]).exists()
    assert len(list(login.campaign.glob("points/*/damaged-*"))) == 2


def test_a_summary_is_written_even_where_the_report_cannot_be(login: Login) -> None:
    _campaign(login)
    place = login.folder / "report.html"
    place.mkdir()
    code, _, said = login.command("collect", str(login.campaign), "--report", str(place))
    assert (code, said.count("is a directory")) == (1, 1)
    assert len(json.loads((login.campaign / "summary.json").read_text())["conditions"]) == 2


@pytest.mark.parametrize("damage", ["bench.json", "out"])
def test_a_result_that_is_gone_or_damaged_is_none(damage: str, login: Login) -> None:
    text = commands("one") + "[fabric]\nranks = 2\n"
    login.submit(text)
    assert login.slurm.run("102_0")[0] == 0
    fabric = login.point("fabric--2-ranks") / "result" / "out"
    fabric.mkdir(parents=True)
    for job in ("101_0", "102_0"):
        login.slurm.forget(job)
    if damage == "bench.json":
        (fabric / "bench.json").write_text("{}")
        assert login.states() == {"network between 2 ranks": "damaged", "one": "done"}
    else:
        (login.point("one") / "result" / "out").rmdir()
        assert login.states()["one"] == "damaged"
        assert "2 of 2 points submitted" in login.submit(text)

"""The three formats of a report, and that comparisons read what a page holds."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from observatory.analysis.compare.collect import measure_run
from observatory.analysis.compare.comparing import compare_subjects
from observatory.analysis.compare.saved import load_subjects
from observatory.cli import main
from observatory.reports import write_report
from observatory.run import open_run
from observatory.run.manifest import Manifest
from tests.analysis.compare.made import made_run
from tests.reports.sample_power import a_power_run
from tests.reports.sample_runs import manifest, write_run
from tests.reports.test_report import HOSTILE, hostile

MakeRun = Callable[..., Path]


def test_a_page_holds_the_documents_that_the_json_format_writes(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    page = write_report([run], tmp_path / "a.html", ep_degrees=(2,), title="</script><b>").read_text(
        encoding="utf-8"
    )
    held = page.split('id="observatory-documents">')[1].split("</script>")[0]
    alone = write_report([run], tmp_path / "a.json", ep_degrees=(2,), title="</script><b>", form="json")
    documents = json.loads(alone.read_text(encoding="utf-8"))
    assert json.loads(gzip.decompress(base64.b64decode(held))) == documents
    assert [document["kind"] for document in documents] == ["report", "routing"]
    assert documents[0]["answer"]
    assert documents[1]["layers"][0]["gini"] == 0.3125


def test_comparisons_read_pages_and_json_back(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("one"), a_power_run(tmp_path / "power")]
    for form in ("html", "json"):
        out = write_report(runs, tmp_path / f"report.{form}", ep_degrees=(2,), form=form)  # type: ignore[arg-type]
        subjects = load_subjects(out)
        metrics = {key.metric for subject in subjects for key in subject.series}
        assert {"gini", "entropy_bits", "mj_per_token", "power_w"} <= metrics
    other = write_report([make_run("two")], tmp_path / "other.html", ep_degrees=(2,))
    assert main(["compare", str(tmp_path / "report.html"), str(other)]) in (0, 1)


def test_pages_compare_as_their_runs_do(tmp_path: Path) -> None:
    runs = [
        made_run(tmp_path / name, seed=seed, tokens_seed=1, ms=ms)
        for seed, (name, ms) in enumerate((("a", 10.0), ("b", 11.0)))
    ]
    pages = [write_report([run], tmp_path / f"{run.name}.html", ep_degrees=(2,)) for run in runs]
    of_runs = compare_subjects(*[measure_run(open_run(run)) for run in runs])
    of_pages = compare_subjects(*[load_subjects(page)[0] for page in pages])
    held = {row.key: row for row in of_pages.rows}
    timed = [row for row in of_runs.rows if row.key.metric in ("ms", "tokens_per_s")]
    assert {row.key.name for row in timed} >= {"decode.ms", "decode.tokens_per_s"}
    for row in timed:
        mine = held[row.key]
        assert (mine.base, mine.other) == pytest.approx((row.base, row.other), rel=1e-5)
        assert mine.difference is not None
        assert row.difference is not None
        assert mine.difference.paired == row.difference.paired
        ends = [(each.difference, each.low, each.high) for each in (mine.difference, row.difference)]
        assert ends[0] == pytest.approx(ends[1], rel=1e-4)


def test_markdown_holds_sentences_and_tables_and_no_markup_of_a_run(tmp_path: Path) -> None:
    described = hostile(manifest(layers=2, experts=8, top_k=2).model_dump(mode="json"))
    run = write_run(tmp_path / "run", Manifest.model_validate(described), steps=6)
    out, argv = tmp_path / "report.md", ["report", str(run), "--format", "md", "--title", HOSTILE]
    assert main([*argv, "--out", str(out), "--ep", "4"]) == 0
    text = out.read_text(encoding="utf-8")
    for head in (
        "## Verdicts and findings",
        "## What was run",
        "## Which experts",
        "## Not captured",
        "## Methods",
    ):
        assert head in text
    assert not re.search(r"(?<!\\)<", text)
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) > 5
    for lines in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1

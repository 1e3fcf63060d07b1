"""Capacity plans in a report."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from observatory.cli import main
from observatory.errors import PlanError
from observatory.reports import write_report
from observatory.reports.figures.plan import plan_plane
from observatory.run.documents.plan import load_plan
from tests.analysis.capacity.configs import QWEN3_30B
from tests.conftest import MakeRun


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    config, out = tmp_path / "config.json", tmp_path / "plan.json"
    config.write_text(json.dumps(QWEN3_30B))
    argv = ["plan", str(config), "--target-tokens-per-s", "20000", "--context", "4096", "--output", "512"]
    argv += ["--hardware", "h20", "--hardware", "l40s", "--max-ms-per-token", "40", "--out", str(out)]
    assert main(argv) == 0
    return out


def test_a_report_answers_how_many(plan: Path, make_run: MakeRun, tmp_path: Path) -> None:
    run, out = make_run(), tmp_path / "report.html"
    assert main(["report", str(run), "--plan", str(plan), "--out", str(out)]) == 0
    page = out.read_text(encoding="utf-8")
    best = load_plan(plan).candidates[0]
    assert re.search(rf'Plan: <a href="#plan-plane-rows"[^>]*>{best.gpus}.devices?</a>', page)
    for target in ("plan-plane-rows", "plan-plane", "formula-gpus"):
        assert f'href="#{target}"' in page
        assert f'id="{target}"' in page
    for text in ('id="plan-plane"', "How many GPUs?", "What ruled out other set-ups", "--plan"):
        assert text in page
    write_report([run], out, overwrite=True)
    page = out.read_text(encoding="utf-8")
    assert "plan-plane" not in page
    assert "No plan was given" in page


def test_the_line_joins_what_nothing_beats(plan: Path) -> None:
    rows = json.loads(plan.read_text())["candidates"]
    line = next(trace for trace in plan_plane(rows).data if trace.mode == "lines")
    points = list(zip(line.x, line.y, strict=True))
    assert len(points) > 2
    assert points == sorted(points, key=lambda point: (point[0], -point[1]))
    assert [y for _, y in points] == sorted((y for _, y in points), reverse=True)
    for row in rows:
        user, device = row["tokens_per_s_user"], row["tokens_per_s_gpu"]
        assert any(x >= user - 1e-9 and y >= device - 1e-9 for x, y in points)


def test_a_plan_that_found_nothing_names_what_is_in_the_way(
    plan: Path, make_run: MakeRun, tmp_path: Path
) -> None:
    document = json.loads(plan.read_text())
    document["candidates"] = []
    plan.write_text(json.dumps(document))
    write_report([make_run()], tmp_path / "report.html", plans=[plan])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "No set-up meets the targets" in page
    assert "plan-plane" not in page


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "advice"},
        {"schema_version": "9.0"},
        {"candidates": [{}]},
        {"candidates": "many"},
        {"targets": {"tokens_per_s": float("nan")}},
        {"rejected_by": [{"constraint": 1}]},
    ],
)
def test_hostile_plans_are_refused(plan: Path, change: dict[str, object]) -> None:
    plan.write_text(json.dumps({**json.loads(plan.read_text()), **change}))
    with pytest.raises(PlanError, match="plan"):
        load_plan(plan)


def test_a_plan_without_newer_keys_is_reported(plan: Path, make_run: MakeRun, tmp_path: Path) -> None:
    document = json.loads(plan.read_text())
    for candidate in document["candidates"]:
        for name in ("joules_per_token", "joules_grade", "is_simulated"):
            candidate.pop(name)
    for assumption in document["assumptions"]:
        assumption.pop("ms_per_token_with_captured")
    document["model"].pop("longest")
    plan.write_text(json.dumps(document))
    write_report([make_run()], tmp_path / "page.html", plans=[plan])
    assert (
        'id="capacity' in (tmp_path / "page.html").read_text()
        or "How many" in (tmp_path / "page.html").read_text()
    )


def test_names_of_a_plan_are_escaped(plan: Path, make_run: MakeRun, tmp_path: Path) -> None:
    document = json.loads(plan.read_text())
    evil = "<script>alert(1)</script>"
    document["model"]["name"] = evil
    for row in document["candidates"]:
        row["hardware"] = row["set_up"] = evil
    for row in document["rejected_by"]:
        row["nearest"] = evil
    plan.write_text(json.dumps(document))
    write_report([make_run()], tmp_path / "report.html", plans=[plan])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"<script>alert", page)

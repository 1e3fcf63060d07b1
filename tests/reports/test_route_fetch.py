from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from observatory.cli import main
from observatory.errors import BenchmarkError
from observatory.reports import write_report
from observatory.reports.figures.decision_map import decision_map
from observatory.reports.frames.route_fetch import collect_route_fetch
from tests.analysis.route_fetch.made import made_result
from tests.conftest import MakeRun


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    path = tmp_path / "rf.json"
    result = made_result("mla:4,128,32", "expert:256", noise=0.05, edits=12, decoder=(64, 128))
    path.write_text(result.model_dump_json())
    return path


def test_the_map_is_blue_where_routing_costs_less_and_the_line_where_both_are_equal(measured: Path) -> None:
    (file,) = collect_route_fetch([measured, measured])
    cells, even = (
        [row for row in file.document[name] if "mla" in row["shape"]] for name in ("map", "break_even")
    )
    figure = decision_map(cells, even, x_title="query rows", y_title="chunk tokens")
    heat, line, *_ = figure.data
    octaves = np.array(heat.z)
    assert octaves.shape == (17, 25)
    assert octaves[-1, 0] < 0 < octaves[0, -1], "few rows and a long chunk; many rows and a short one"
    for x, y in zip(line.x, line.y, strict=True):
        row, column = np.abs(np.array(heat.y) - y).argmin(), np.abs(np.array(heat.x) - x).argmin()
        assert abs(octaves[row, column]) < 0.5


def test_a_report_has_the_maps_their_accuracy_and_the_edits(
    measured: Path, make_run: MakeRun, tmp_path: Path
) -> None:
    run, out = make_run(), tmp_path / "report.html"
    assert main(["report", str(run), "--route-fetch", str(measured), "--out", str(out)]) == 0
    page = out.read_text(encoding="utf-8")
    (section,) = re.findall(r'id="findings".*?</section>', page, re.DOTALL)
    assert 'href="#route-fetch"' in section
    assert "fetching costs less from" in section
    for text in ("decision-map", "mla:4,128,32", "expert:256", "Editing a cache in place", "--route-fetch"):
        assert text in page
    write_report([run], out, overwrite=True)
    assert "decision-map" not in out.read_text(encoding="utf-8")


def test_a_file_that_is_no_measurement_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(BenchmarkError, match="route-fetch measurement"):
        write_report([run], tmp_path / "report.html", route_fetch=[tmp_path / "bad.json"])
    assert not (tmp_path / "report.html").exists()


def test_names_of_a_file_cannot_write_into_the_page(
    measured: Path, make_run: MakeRun, tmp_path: Path
) -> None:
    hostile = tmp_path / "<script>alert(1)<"
    hostile.write_bytes(measured.read_bytes())
    write_report([make_run()], tmp_path / "report.html", route_fetch=[hostile])
    assert "<script>alert" not in (tmp_path / "report.html").read_text(encoding="utf-8")

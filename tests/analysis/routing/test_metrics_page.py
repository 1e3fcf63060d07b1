from __future__ import annotations

import re

import numpy as np
import pytest

from observatory.analysis.parallel.scan import scan_run
from observatory.analysis.routing import bands, layer_metrics, phase_summary
from observatory.run import Run
from tests.analysis.routing.runs import write_run
from tests.paths import ROOT

PAGE = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return write_run(tmp_path_factory.mktemp("runs") / "run", {("prefill", 0): np.ones((2, 1, 4), dtype=int)})


def test_the_page_lists_the_columns_of_every_table_in_order(run: Run) -> None:
    for name, frame in (
        ("layer_metrics", layer_metrics(run)),
        ("phase_summary", phase_summary(run)),
        ("scan_run", scan_run(run, ep_degrees=[2], gpus_per_node=1)),
    ):
        listed = re.search(rf"`{name}`: ([a-z0-9_,\s]+)\.", PAGE)
        assert listed is not None, name
        assert [column.strip() for column in listed[1].split(",")] == list(frame.columns)


def test_the_page_states_the_thresholds_in_force() -> None:
    assert f"gini ≤ {bands.RESILIENT_UP_TO} on every text" in PAGE
    assert f"√(gini² − floor²) > {bands.CONCENTRATED_ABOVE} on every text" in PAGE

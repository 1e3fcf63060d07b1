"""How long steps take, on one rank as well."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from observatory.reports.figures.step_times import step_time_dots
from observatory.reports.frames.collect import collect
from observatory.reports.outline import build_sections, questions
from observatory.reports.page import FigureBlock, Section
from observatory.run import open_run
from tests.analysis.compare.made import made_run


def section_of(*paths: Path) -> Section:
    frames = collect([open_run(path) for path in paths], ep_degrees=(), gpus_per_node=4)
    (section,) = (s for s in build_sections(frames, gpus_per_node=4) if s.id == "step-times")
    return section


def test_a_run_on_one_rank_answers_where_the_time_goes(tmp_path: Path) -> None:
    quick, slow = made_run(tmp_path / "quick", ms=5.0), made_run(tmp_path / "slow", ms=10.0)
    frames = collect([open_run(path) for path in (quick, slow)], ep_degrees=(), gpus_per_node=4)
    asked = questions([s for s in build_sections(frames, gpus_per_node=4) if s.blocks])
    assert asked[0].title == "Where does the time go?"
    assert [section.id for section in asked[0].sections] == ["step-times"]
    block = asked[0].sections[0].blocks[0]
    assert isinstance(block, FigureBlock)
    steps = frames.steps[frames.steps["phase"] == "prefill"]
    assert steps["ms"].to_list() == pytest.approx([5.0, 10.0], rel=0.1)
    rates = steps["tokens"] / steps["ms"] * 1e3
    assert steps["tokens_per_s"].to_list() == pytest.approx(rates.to_list())
    assert (steps["ms_p10"] < steps["ms"]).all()
    assert (steps["ms_p90"] > steps["ms"]).all()
    dots = block.variants[0].figure.data[0]
    assert list(dots.x) == steps["ms"].to_list()


def test_runs_without_times_say_so(tmp_path: Path) -> None:
    section = section_of(made_run(tmp_path / "run", times=False))
    assert (section.blocks, section.reason) == ((), "No run given here has timed steps.")


def test_steps_that_rows_fold_have_times_but_no_tokens(tmp_path: Path) -> None:
    (block,) = section_of(made_run(tmp_path / "run", window_steps=2)).blocks
    assert isinstance(block, FigureBlock)
    (row,) = block.variants[0].numbers.rows
    shown = {head.title: cell.text for head, cell in zip(block.variants[0].numbers.columns, row, strict=True)}
    assert shown["Tokens per step"] == "n/a"
    assert float(shown["Time per step, ms"]) > 0


@pytest.mark.parametrize(("factor", "kind"), [(2.0, None), (1000.0, "log")])
def test_far_apart_times_stand_on_a_logarithmic_axis(factor: float, kind: str | None) -> None:
    points = pd.DataFrame(
        {
            "label": ["a", "a model with a name of three lines or so"],
            "condition": "prose",
            "ms": [1.0, factor],
            "ms_p10": np.nan,
            "ms_p90": np.nan,
            "exchange_ms": [np.nan, factor / 2],
        }
    )
    figure = step_time_dots(points)
    assert figure.layout.xaxis.type == kind
    # Each line has room for the name of its model.
    names = dict(zip(figure.layout.yaxis.ticktext, figure.layout.yaxis.tickvals, strict=True))
    (first, second), (near, far) = names.values(), names
    assert first - second >= (near.count("<br>") + far.count("<br>") + 2) / 2
    assert list(figure.data[-2].y) == [first, second]

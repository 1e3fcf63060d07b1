"""Figures as SVG: where marks stand, what they say, and that no text of a run is markup."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st

from observatory.reports.figures.base import axis, colour_bar, empty_figure, line
from observatory.reports.figures.exchanges import hatched
from observatory.reports.svg import draw
from observatory.reports.svg.axes import Axis, nice_step
from observatory.reports.text import figure_text
from observatory.reports.theme import DIVERGING, light

NS = "{http://www.w3.org/2000/svg}"


def parsed(figure: go.Figure, width: int = 600) -> ElementTree.Element:
    return ElementTree.fromstring(str(draw(figure, width)))


def titles(figure: go.Figure) -> list[str]:
    return [element.text or "" for element in parsed(figure).iter(f"{NS}title")]


def outlines(root: ElementTree.Element, fill: str) -> list[list[float]]:
    """Numbers of the outlines of marks of one colour, those of groups as well."""
    found = [e for g in root.iter() if g.get("fill") == fill for e in g.iter(f"{NS}path")]
    return [[float(text) for text in re.findall(r"-?[\d.]+", e.get("d", ""))] for e in found]


def bar_figure(mode: str = "stack") -> go.Figure:
    figure = empty_figure(300, x=axis("layer", type="category"), y=axis("ms", rangemode="tozero"))
    figure.update_layout(barmode=mode, bargap=0.2)
    for name, values, colour in (("one", [1.0, 2.0], "blue"), ("two", [3.0, 0.0], "orange")):
        figure.add_bar(
            x=["a", "b"], y=values, name=name, marker=hatched(colour, "/" if name == "two" else ""),
            hovertemplate="%{x}: " + name + " %{y:.1f} ms<extra></extra>",
        )  # fmt: skip
    return figure


def test_stacked_bars_stand_on_each_other_and_are_as_long_as_their_values() -> None:
    root = parsed(bar_figure())
    (first, second), (upper,) = outlines(root, "var(--blue)")[:2], outlines(root, "var(--orange)")[:1]
    # M x y h width v height
    assert second[3] == pytest.approx(2 * first[3], abs=0.2)
    assert upper[3] == pytest.approx(3 * first[3], abs=0.3)
    assert upper[1] + upper[3] == pytest.approx(first[1], abs=0.2)
    assert "url(#hatch-slash)" in str(draw(bar_figure(), 600))


def test_hovering_says_what_the_template_says_of_marks_that_are_there() -> None:
    assert titles(bar_figure()) == ["a: one 1.0 ms", "b: one 2.0 ms", "a: two 3.0 ms"]


def test_points_stand_where_their_values_are_on_both_kinds_of_axis() -> None:
    figure = empty_figure(
        400, x=axis("x", type="log", range=[0, 2]), y=axis("y", range=[0, 10]), legend=False
    )
    figure.add_scatter(
        x=[1, 10, 100, None], y=[0, 5, 10, 3], mode="markers",
        marker={"color": light("blue"), "symbol": "square", "size": 8},
    )  # fmt: skip
    (path,) = outlines(parsed(figure), "var(--blue)")
    x, y = path[0::5], path[1::5]  # M x y h v h
    assert len(x) == 3, "one without a value is not drawn"
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)
    assert y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.2)


def test_error_bars_reach_from_end_to_end() -> None:
    figure = empty_figure(400, x=axis("x", range=[0, 2]), y=axis("y", range=[0, 10]), legend=False)
    ends = {"array": [3.0], "arrayminus": [1.0], "color": light("warn")}
    figure.add_scatter(x=[1], y=[5.0], mode="markers", error_y=ends)
    root = parsed(figure)
    (path,) = [e.get("d", "") for e in root.iter(f"{NS}path") if e.get("stroke") == "var(--warn)"]
    start, end = map(float, re.findall(r"M[\d.]+ ([\d.]+)V([\d.]+)", path)[0])
    ticks = {t.text: float(t.get("y", 0)) for t in root.iter(f"{NS}text")}
    unit = (ticks["0"] - ticks["10"]) / 10
    assert start - end == pytest.approx(4 * unit, abs=0.5)


def test_cells_of_one_colour_are_one_outline_and_large_maps_are_described_by_row() -> None:
    figure = empty_figure(300, x=axis("expert"), y=axis("layer", type="category"), legend=False)
    scale = [[index / 10, colour] for index, colour in enumerate(DIVERGING)]
    figure.add_heatmap(
        z=[[0.0, 0.0, 1.0], [0.5, math.nan, 0.5]], zmin=0, zmax=1, colorscale=scale, y=["0", "1"],
        hovertemplate="layer %{y}, expert %{x}: %{z}<extra></extra>", colorbar=colour_bar(),
    )  # fmt: skip
    root = parsed(figure)
    assert [e.text for e in root.iter(f"{NS}title")] == [
        "layer 0, expert 0: 0.0", "layer 0, expert 1: 0.0", "layer 0, expert 2: 1.0",
        "layer 1, expert 0: 0.5", "layer 1, expert 2: 0.5",
    ]  # fmt: skip
    figure.data[0].z = [[0.0] * 255 + [1.0]] * 61
    figure.data[0].y = [str(layer) for layer in range(61)]
    large = titles(figure)
    assert len(large) == 61
    assert large[7] == "largest of the row: layer 7, expert 255: 1"
    assert len(str(draw(figure, 860))) < 40_000


@given(st.text(max_size=60))
def test_no_text_of_a_run_is_markup(text: str) -> None:
    name = figure_text(text)
    figure = empty_figure(300, x=axis("x"), y=axis("", type="category"))
    figure.add_scatter(
        x=[1], y=[name], mode="markers+text", text=[name], name=name, line=line("blue"),
        customdata=[[name]], hovertemplate="%{customdata[0]} " + name + "<extra></extra>",
    )  # fmt: skip
    tags = {element.tag.removeprefix(NS) for element in parsed(figure).iter()}
    assert tags <= {"svg", "g", "path", "text", "title", "rect"}


@pytest.mark.parametrize("width", [350, 620, 860])
def test_nothing_is_written_outside_of_the_picture(width: int) -> None:
    root = parsed(bar_figure(), width)
    height = float(root.get("viewBox", "").split()[3])
    for text in root.iter(f"{NS}text"):
        assert -1 <= float(text.get("x", 0)) <= width
        assert -40 <= float(text.get("y", 0)) <= height


def test_labels_never_stand_closer_than_they_are_wide() -> None:
    names = Axis(name="x", options={"type": "category"}, start=0.0, end=300.0)
    names.see([f"layer {layer}" for layer in range(100)])
    names.choose_range()
    shown = [names.pixel_of_place(place) for place, _ in names.ticks()]
    assert min(later - earlier for earlier, later in pairwise(shown)) > 45


@pytest.mark.parametrize(("rough", "step"), [(0.3, 0.5), (1.0, 1.0), (7.0, 10.0), (0.012, 0.02)])
def test_steps_are_one_two_or_five(rough: float, step: float) -> None:
    assert nice_step(rough) == pytest.approx(step)


@pytest.mark.parametrize(("low", "high"), [(-33.0, 33.0), (-30.0, 53.0), (0.1, 0.9), (3.0, 3.02)])
def test_a_short_axis_has_two_numbers_at_least(low: float, high: float) -> None:
    ticks = Axis(name="x", options={}, low=low, high=high, end=110.0).ticks()
    assert len(ticks) >= 2
    assert all(low <= place <= high for place, _ in ticks)
    assert len({text for _, text in ticks}) == len(ticks)

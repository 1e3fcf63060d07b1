"""What the figures contain, on frames made by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from observatory.reports.figures import (
    LORENZ_GRID,
    condition_dots,
    crossing_shares,
    ep_profile,
    expert_shares,
    floor_lorenz,
    lorenz_curves,
    rank_imbalance,
    step_profile,
)
from observatory.reports.theme import css_colour, heat_level


def _traces(figure) -> dict[str, object]:
    return {trace.name: trace for trace in figure.data}


def _points() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "label": ["a", "a", "a", "b"],
            "condition": ["prose", "code", "mock", "prose"],
            "kind": ["real", "real", "mock", "real"],
            "gini": [0.10, 0.30, 0.40, 0.25],
            "gini_low": [0.08, 0.28, 0.39, 0.2],
            "gini_high": [0.15, 0.33, 0.42, 0.3],
            "gini_floor": [0.05, 0.05, 0.05, 0.06],
        }
    )


def test_every_condition_has_its_own_line_with_interval_and_floor() -> None:
    figure = condition_dots(_points())
    real, floor = _traces(figure)["real text"], _traces(figure)["sampling floor"]
    assert list(real.x) == [0.10, 0.30, 0.25]
    assert np.allclose(real.error_x.array, [0.05, 0.03, 0.05])
    assert np.allclose(real.error_x.arrayminus, [0.02, 0.02, 0.05])
    assert list(floor.x) == [0.05, 0.05, 0.05, 0.06]
    assert len(set(floor.y)) == 4
    assert list(figure.layout.yaxis.ticktext) == ["a", "b"]


def test_the_rule_to_mock_starts_at_the_mean_over_real_text_and_only_where_mock_was_run() -> None:
    span = _traces(condition_dots(_points()))["from the mean over real text to mock"]
    assert span.x[0] == pytest.approx(0.20)
    assert span.x[1:] == (0.40, None)


def _names(points: pd.DataFrame) -> dict[str, tuple[float, str]]:
    (names,) = [trace for trace in condition_dots(points).data if trace.mode == "text"]
    return dict(
        zip([text.strip() for text in names.text], zip(names.x, names.textposition, strict=True), strict=True)
    )


@pytest.mark.parametrize(
    ("mock", "place"),
    [
        (0.40, (0.42, "middle right")),  # the rule comes from the left
        (0.15, (0.14, "middle left")),  # the rule leaves to the right
        (0.03, (0.20, "middle right")),  # it does, and there is no room on the left: beyond the rule
    ],
)
def test_the_name_of_mock_does_not_stand_on_the_rule(mock: float, place: tuple[float, str]) -> None:
    points = _points().iloc[:3].copy()
    points.loc[2, ["gini", "gini_low", "gini_high"]] = [mock, mock - 0.01, mock + 0.02]
    assert _names(points)["mock"] == (pytest.approx(place[0]), place[1])
    assert _names(points)["code"] == (0.33, "middle right")


def test_a_heatmap_shows_each_load_in_percent_of_its_own_layers_mean() -> None:
    loads = pd.DataFrame(
        {"layer": [2, 2, 2, 2, 5, 5, 5, 5], "expert": [0, 1, 2, 3] * 2, "load": [1, 1, 2, 4, 30, 10, 0, 0]}
    )
    heat = expert_shares(loads).data[0]
    assert np.array_equal(heat.z, [[50, 50, 100, 200], [300, 100, 0, 0]])
    assert np.asarray(heat.z).dtype == np.uint16
    assert list(heat.y) == ["2", "5"]


def test_a_colour_stands_for_the_uniform_share_and_the_scale_is_even_in_octaves() -> None:
    heat = expert_shares(pd.DataFrame({"layer": [0, 0], "expert": [0, 1], "load": [1, 1]})).data[0]
    stops = {colour: position for position, colour in heat.colorscale}
    positions = [position for position, _ in heat.colorscale][1:]
    assert stops["#f5f5f4"] * heat.zmax == pytest.approx(100)
    assert np.allclose(np.diff(np.log2(positions)), 0.4)


def test_layers_with_fewer_experts_leave_their_row_open_instead_of_idle() -> None:
    loads = pd.DataFrame({"layer": [0, 0, 1], "expert": [0, 1, 0], "load": [3, 1, 7]})
    shares = np.asarray(expert_shares(loads).data[0].z, dtype=float)
    assert shares[0].tolist() == [150, 50]
    assert shares[1, 0] == 100
    assert np.isnan(shares[1, 1])


def test_a_layer_without_assignments_has_no_shares() -> None:
    loads = pd.DataFrame({"layer": [0, 0, 1, 1], "expert": [0, 1] * 2, "load": [3, 1, 0, 0]})
    assert np.isnan(np.asarray(expert_shares(loads).data[0].z, dtype=float)[1]).all()


@pytest.mark.parametrize("floor", [0.01, 0.1, 0.25])
def test_the_floor_curve_encloses_the_floor(floor: float) -> None:
    curve = floor_lorenz(floor)
    assert curve is not None
    assert 1 - 2 * np.trapezoid(curve, LORENZ_GRID) == pytest.approx(floor, rel=0.02)
    assert (np.diff(curve) >= 0).all()


def test_there_is_no_floor_curve_where_loads_are_too_small_for_one() -> None:
    assert floor_lorenz(0.4) is None
    assert floor_lorenz(float("nan")) is None


def test_the_bold_lorenz_curve_is_the_mean_of_the_thin_ones_which_do_not_join() -> None:
    curves = pd.DataFrame(
        {"layer": [0, 0, 0, 1, 1, 1], "x": [0, 0.5, 1] * 2, "y": [0.0, 0.1, 1.0, 0.0, 0.5, 1.0]}
    )
    traces = _traces(lorenz_curves(curves, gini_floor=0.05, worst_layer=0))
    assert np.allclose(traces["mean over layers"].y, [0, 0.3, 1])
    assert np.allclose(traces["most concentrated: layer 0"].y, [0, 0.1, 1])
    thin = np.asarray(traces["2 layers"].y)
    assert np.isnan(thin[3])
    assert np.isnan(thin[7])


def test_steps_and_window_keep_their_own_floor() -> None:
    layers = pd.DataFrame(
        {
            "layer": [7, 3],
            "gini": [0.2, 0.1],
            "gini_floor": [0.01, 0.02],
            "step_gini_p10": [0.25, 0.15],
            "step_gini_p50": [0.3, 0.2],
            "step_gini_p90": [0.4, 0.25],
            "step_gini_floor": [0.08, 0.09],
        }
    )
    figure = step_profile(layers)
    traces = _traces(figure)
    assert list(figure.layout.xaxis.ticktext) == ["3", "7"]
    assert list(traces["whole window"].y) == [0.1, 0.2]
    assert list(traces["floor of one step"].y) == [0.09, 0.08]
    assert list(traces["floor of the window"].y) == [0.02, 0.01]
    assert np.allclose(traces["single steps: median, p10 to p90"].error_y.array, [0.05, 0.1])


def _scan() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "label": ["a", "a"],
            "ep": [8, 4],
            "expert_max_over_mean": [3.0, 3.0],
            "rank_max_over_mean": [1.8, 1.4],
            "rank_max_over_mean_floor": [1.05, 1.02],
            "rank_max_over_mean_step_p50": [1.9, 1.5],
            "rank_max_over_mean_step_p90": [2.2, 1.6],
            "rank_max_over_mean_step_max": [2.5, 1.9],
            "rank_max_over_mean_step_floor": [1.2, 1.1],
            "cross_rank_fraction": [0.875, 0.75],
            "cross_node_fraction": [0.5, 0.0],
        }
    )


def test_experts_and_ranks_are_separate_lines_in_order_of_degree() -> None:
    traces = _traces(ep_profile(_scan()))
    assert list(traces["ranks, whole window"].x) == [4, 8]
    assert list(traces["ranks, whole window"].y) == [1.4, 1.8]
    assert list(traces["experts, whole window (does not depend on EP)"].y) == [3.0, 3.0]
    assert np.allclose(traces["ranks, single steps: median to p90"].error_y.array, [0.1, 0.3])
    assert list(traces["uniform routing, one step"].y) == [1.1, 1.2]


def test_crossing_shares_tell_ranks_from_nodes() -> None:
    traces = _traces(crossing_shares(_scan()))
    assert list(traces["to another rank"].y) == [0.75, 0.875]
    assert list(traces["to another node"].y) == [0.0, 0.5]


def test_many_models_differ_in_marker_or_dash_as_well_as_colour() -> None:
    many = pd.concat([_scan().assign(label=f"m{index}") for index in range(12)])
    models = [trace for trace in rank_imbalance(many).data if trace.mode == "lines+markers"]
    assert len(models) == 12
    assert len({(trace.line.color, trace.line.dash, trace.marker.symbol) for trace in models}) == 12


def test_the_floor_of_all_models_is_one_line_where_it_is_the_same() -> None:
    floor = "uniform routing of as many tokens"
    same = pd.concat([_scan().assign(label=name) for name in "abc"])
    (line,) = [trace for trace in rank_imbalance(same).data if trace.name == floor]
    assert (list(line.x), list(line.y)) == ([4, 8], [1.02, 1.05])
    other = pd.concat([_scan().assign(label="a"), _scan().assign(label="b", rank_max_over_mean_floor=1.5)])
    figure = rank_imbalance(other)
    lines = [trace for trace in figure.data if trace.name == floor]
    assert [list(trace.y) for trace in lines] == [[1.02, 1.05], [1.5, 1.5]]
    assert [trace.line.color for trace in lines] == [
        trace.line.color for trace in figure.data if trace.mode == "lines+markers"
    ]


def test_every_colour_of_a_figure_has_a_dark_partner() -> None:
    figures = (condition_dots(_points()), ep_profile(_scan()), crossing_shares(_scan()))

    def colours(value: object, key: str = "") -> set[str]:
        if isinstance(value, dict):
            return set().union(*(colours(item, name) for name, item in value.items()))
        return {value} if "color" in key and isinstance(value, str) else set()

    used = set().union(
        *(
            colours(part)
            for figure in figures
            for part in (figure.to_dict()["layout"], *figure.to_dict()["data"])
        )
    )
    unknown = {colour for colour in used if css_colour(colour) == "none" and heat_level(colour) is None}
    assert unknown <= {"rgba(0,0,0,0)"}

"""What SM clocks and power caps do to the time and energy of an iteration."""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from observatory.reports.figures.base import axis, bars, empty_figure, line
from observatory.reports.frames.report import each_row
from observatory.reports.text import figure_text
from observatory.reports.theme import light

#: kind -> name, colour, marker.
_KINDS: dict[str, tuple[str, str, str]] = {
    "lock": ("clock locked", "blue", "circle"),
    "cap": ("power capped", "orange", "square"),
    "both": ("locked and capped", "purple", "triangle-up"),
    "unlocked": ("unlocked", "ink", "star"),
}


def clock_plane(
    points: pd.DataFrame,
    curve: pd.DataFrame,
    *,
    chosen: tuple[float, float, float] | None,
    max_slowdown: float,
    reference: str = "unlocked",
) -> go.Figure:
    """Energy against time, both relative to the reference: the Pareto front and the recommended point.

    Args:
        points: of one series, those with an energy: ``kind``, ``label``, ``requested_mhz``, ``limit_w``,
            ``sm_clock_mhz``, ``slowdown``, ``saving`` with ``_low`` and ``_high``, ``on_front``.
        curve: the fitted curve: ``sm_clock_mhz``, ``slowdown``, ``saving``; below the unlocked clock.
        chosen: the recommended clock, its slowdown and saving; None without one.
        max_slowdown: the budget.
        reference: what the reference is, ``unlocked`` or ``highest clock``.
    """
    than, against = (
        ("unlocked",) * 2 if reference == "unlocked" else (f"at the {reference}", f"the {reference}")
    )
    figure = empty_figure(
        470,
        x=axis(f"longer than {than}, %", zeroline=True, zerolinecolor=light("rule")),
        y=axis(f"energy against {against}, %", zeroline=True, zerolinecolor=light("rule")),
    )
    figure.add_scatter(
        x=curve["slowdown"] * 100,
        y=curve["saving"] * -100,
        mode="lines",
        name="fitted: every clock between",
        line=line("thin", 2),
        customdata=curve["sm_clock_mhz"],
        hovertemplate="model at %{customdata:.0f} MHz: %{x:.2f} % longer, %{y:.1f} % energy<extra></extra>",
    )
    front = points[points["on_front"].astype(bool)].sort_values("slowdown")
    figure.add_scatter(
        x=front["slowdown"] * 100,
        y=front["saving"] * -100,
        mode="lines",
        name="Pareto front of what was measured",
        line=line("green", 2, "dash") | {"shape": "hv"},
        hoverinfo="skip",
    )
    # Filled marks first: the legend shows the first one.
    for kind, of_kind in points.sort_values("on_front", ascending=False).groupby("kind", sort=False):
        name, colour, marker = _KINDS[str(kind)]
        figure.add_scatter(
            x=of_kind["slowdown"] * 100,
            y=of_kind["saving"] * -100,
            mode="markers",
            name=name,
            marker={
                "symbol": [marker if row.on_front else f"{marker}-open" for row in each_row(of_kind)],
                "color": light(colour),
                "size": 13 if kind == "unlocked" else 9,
                "line": {"width": 1.5, "color": light(colour)},
            },
            error_x=_bars(of_kind, "slowdown", colour, 100),
            error_y=_bars(of_kind, "saving", colour, -100),
            customdata=[_setting(row) for row in each_row(of_kind)],
            hovertemplate="%{customdata}: %{x:.2f} % longer, %{y:.1f} % energy<extra></extra>",
        )
    if chosen is not None:
        chosen_mhz, slowdown, saving = chosen
        figure.add_scatter(
            x=[slowdown * 100],
            y=[saving * -100],
            mode="markers+text",
            text=[f"{chosen_mhz:.0f} MHz"],
            textposition="bottom right",
            textfont={"size": 12, "color": light("warn")},
            name="recommended",
            marker={
                "symbol": "circle-open",
                "size": 22,
                "color": light("warn"),
                "line": {"width": 3, "color": light("warn")},
            },
            hovertemplate="recommended: %{x:.2f} % longer, %{y:.1f} % energy<extra></extra>",
        )
    figure.add_shape(
        type="line", x0=max_slowdown * 100, x1=max_slowdown * 100, yref="paper", y0=0, y1=1,
        line=line("warn", 1.3, "dot"),
    )  # fmt: skip
    figure.add_annotation(
        x=max_slowdown * 100, yref="paper", y=1, xanchor="left", yanchor="top", showarrow=False,
        text=f" budget {100 * max_slowdown:.3g} %", font={"size": 12, "color": light("warn")},
    )  # fmt: skip
    return figure


def clock_curves(
    points: pd.DataFrame,
    curve: pd.DataFrame,
    *,
    chosen_mhz: float | None,
    reference_mhz: float,
    reference: str = "unlocked",
) -> go.Figure:
    """Time above, energy below, of one iteration against the sampled SM clock, with the fit and its band.

    Args:
        points: of one series, those with a clock: ``kind``, ``label``, ``sm_clock_mhz``, ``iteration_ms``,
            ``energy_mj`` (missing: not known) with ``_low`` and ``_high`` over repeats.
        curve: columns of ``SeriesView.curve``.
        chosen_mhz: the recommended clock; None without one.
        reference_mhz: the clock that all is relative to.
        reference: what it is, ``unlocked`` or ``highest clock``.
    """
    energy = points["energy_mj"].notna().any()
    figure = empty_figure(
        560 if energy else 340,
        x={},
        y=axis("ms per iteration", domain=[0.54 if energy else 0.0, 1.0]),
    )
    clocks = [*points["sm_clock_mhz"], *curve["sm_clock_mhz"], reference_mhz]
    margin = 0.04 * max(max(clocks) - min(clocks), 1.0)
    reach = (min(clocks) - margin, max(clocks) + margin)
    bottom = axis("SM clock as sampled, MHz", anchor="y2" if energy else "y", range=reach)
    if energy:
        figure.update_layout(
            xaxis=axis("", showticklabels=False, ticks="", anchor="y", matches="x2", range=reach),
            xaxis2=bottom,
            yaxis2=axis("J per iteration", domain=[0.0, 0.46], anchor="x2"),
        )
    else:
        figure.update_layout(xaxis=bottom)
    panels: list[tuple[str, str, str, str, float, float]] = [
        ("x", "y", "iteration_s", "iteration_ms", 1e3, 1.0)
    ]
    panels += [("x2", "y2", "energy_mj", "energy_mj", 1e-3, 1e-3)] if energy else []
    for xaxis, yaxis, fitted, measured, of_curve, of_point in panels:
        axes = {"xaxis": xaxis, "yaxis": yaxis}
        first = xaxis == "x"
        if curve[fitted].notna().all():
            _add_curve(figure, curve, fitted, of_curve, axes, legend=first)
        for kind, of_kind in points.groupby("kind", sort=False):
            _add_measured(
                figure, of_kind[of_kind[measured].notna()], str(kind), measured, of_point, axes, legend=first
            )
        for mhz, name, colour in ((reference_mhz, reference, "muted"), (chosen_mhz, "recommended", "warn")):
            if mhz is not None:
                figure.add_shape(
                    type="line", xref=xaxis, x0=mhz, x1=mhz, yref=f"{yaxis} domain", y0=0, y1=1,
                    line=line(colour, 1.5, "dot"),
                )  # fmt: skip
                if first:
                    figure.add_annotation(
                        xref=xaxis, x=mhz, yref="paper", y=0.5 if energy else 1.0, showarrow=False,
                        xanchor="left" if mhz < sum(reach) / 2 else "right", text=f" {name} {mhz:.0f} MHz ",
                        yshift=-8 if name == reference else 8, font={"size": 12, "color": light(colour)},
                    )  # fmt: skip
    return figure


def _add_curve(
    figure: go.Figure, curve: pd.DataFrame, column: str, factor: float, axes: dict[str, str], *, legend: bool
) -> None:
    mhz = curve["sm_clock_mhz"]
    high, low = (curve[f"{column}_{end}"] * factor for end in ("high", "low"))
    figure.add_scatter(
        x=[*mhz, *mhz[::-1]], y=[*high, *low[::-1]], fill="toself", fillcolor=light("thin"), opacity=0.35,
        mode="none", name="90 % interval of the fit", hoverinfo="skip", showlegend=legend, **axes,
    )  # fmt: skip
    figure.add_scatter(
        x=mhz, y=curve[column] * factor, mode="lines", name="fitted", line=line("slate", 2),
        showlegend=legend,
        hovertemplate="model at %{x:.0f} MHz: %{y:.4g}<extra></extra>", **axes,
    )  # fmt: skip


def _add_measured(
    figure: go.Figure, points: pd.DataFrame, kind: str, column: str, factor: float, axes: dict[str, str], *,
    legend: bool,
) -> None:  # fmt: skip
    if points.empty:
        return
    name, colour, marker = _KINDS[kind]
    met = (points["label"] == "ok") | ((points["label"] == "power-capped") & (kind == "cap"))
    points, met = points.loc[met.sort_values(ascending=False).index], met.sort_values(ascending=False)
    figure.add_scatter(
        x=points["sm_clock_mhz"],
        y=points[column] * factor,
        mode="markers",
        name=name,
        showlegend=legend,
        marker={
            "symbol": [marker if as_asked else f"{marker}-open" for as_asked in met],
            "color": light(colour),
            "size": 12 if kind == "unlocked" else 8,
            "line": {"width": 1.5, "color": light(colour)},
        },
        error_y=_bars(points, column, colour, factor),
        customdata=[_setting(row) for row in each_row(points)],
        hovertemplate="%{customdata}: %{y:.4g}<extra></extra>",
        **axes,
    )


def _bars(points: pd.DataFrame, column: str, colour: str, factor: float) -> dict[str, Any]:
    """Bars from ``_low`` to ``_high``; with a negative factor the ends change places."""
    middle, low, high = (points[f"{column}{end}"].astype(float) * factor for end in ("", "_low", "_high"))
    if factor < 0:
        low, high = high, low
    return bars(middle, low, high, colour)


def _setting(row: Any) -> str:
    """What was asked for, what came of it."""
    parts = [] if pd.isna(row.requested_mhz) else [f"locked to {row.requested_mhz:.0f} MHz"]
    parts += [] if pd.isna(row.limit_w) else [f"capped at {row.limit_w:.0f} W"]
    sampled = "clock not sampled" if pd.isna(row.sm_clock_mhz) else f"ran at {row.sm_clock_mhz:.0f} MHz"
    return figure_text(f"{' and '.join(parts) or 'unlocked'}, {sampled} ({row.label})", 90)

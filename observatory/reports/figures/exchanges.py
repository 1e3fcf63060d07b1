"""Dispatch anatomy, traffic between ranks, and who waits for whom."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from observatory.reports.figures.base import axis, colour_bar, empty_figure
from observatory.reports.frames.report import each_row
from observatory.reports.text import figure_text
from observatory.reports.theme import DIVERGING, light

#: Colour and hatching of each phase: exchanges are hatched.
_PHASES: dict[str, tuple[str, str]] = {
    "route": ("slate", ""),
    "count_exchange": ("purple", "/"),
    "pack": ("sky", ""),
    "dispatch": ("orange", "/"),
    "experts": ("blue", ""),
    "combine": ("green", "/"),
    "unpack": ("thin", ""),
}
_OTHER = ("muted", "x")

#: What a rank's time in exchanges consists of: column -> name, colour, hatching.
_SHARES: dict[str, tuple[str, str, str]] = {
    "transfer_s": ("transfer", "blue", ""),
    "wait_s": ("waiting for those it exchanges with", "orange", "/"),
    "held_s": ("kept by the backend for others", "purple", "x"),
    "idle_s": ("exchanges nothing itself", "thin", ""),
    "unknown_s": ("not known", "slate", "."),
}
_NUMBERED_UP_TO = 8
_EVERY_LABEL = 24


def hatched(colour: str, hatch: str) -> dict[str, Any]:
    """Marker of bars in a theme colour, with a pattern (empty for none)."""
    pattern = {"shape": hatch, "fillmode": "overlay", "size": 5, "solidity": 0.35, "fgcolor": light("paper")}
    return {"color": light(colour), "line": {"width": 0}, "pattern": pattern}


def layer_anatomy(phases: pd.DataFrame) -> go.Figure:
    """Stacked bars: mean time of each phase per layer; all but waiting, and the slowest ranks' time.

    Args:
        phases: one row per ``layer`` and ``name`` of one run and phase, in the order in which they are
            stacked: ``mean_s``, ``wait_s``, ``critical_s``.
    """
    layers = sorted(phases["layer"].unique())
    figure = empty_figure(
        460,
        x=axis("layer", type="category", showgrid=False, nticks=_EVERY_LABEL),
        y=axis("milliseconds per step", rangemode="tozero"),
    )
    # In the order of time, which stacked bars would turn round.
    figure.update_layout(barmode="stack", bargap=0.25, legend_traceorder="normal")
    for name, of_name in phases.groupby("name", sort=False):
        colour, hatch = _PHASES.get(str(name), _OTHER)
        values = of_name.set_index("layer").reindex(layers)
        figure.add_bar(
            x=[str(layer) for layer in layers],
            y=values["mean_s"] * 1e3,
            name=figure_text(name, 24),
            marker=hatched(colour, hatch),
            customdata=(values[["wait_s", "critical_s"]] * 1e3).to_numpy(),
            hovertemplate=f"layer %{{x}}, {figure_text(name, 24)}: mean over ranks %{{y:.3f}} ms, of it "
            "waiting %{customdata[0]:.3f} ms; slowest rank %{customdata[1]:.3f} ms<extra></extra>",
        )
    spent = phases.groupby("layer")[["mean_s", "wait_s"]].sum(min_count=1).reindex(layers)
    known = phases["wait_s"].notna().groupby(phases["layer"]).all().reindex(layers)
    marks = (
        ("mean without waiting", "diamond", (spent["mean_s"] - spent["wait_s"]).where(known)),
        ("slowest ranks without waiting", "line-ew", phases.groupby("layer")["critical_s"].sum()),
    )
    for name, symbol, value in marks:
        if value.isna().all():
            continue
        edge = light("ink" if symbol == "line-ew" else "paper")
        figure.add_scatter(
            x=[str(layer) for layer in layers],
            y=value * 1e3,
            mode="markers",
            name=name,
            marker={
                "symbol": symbol,
                "size": 24 if symbol == "line-ew" else 10,
                "color": light("ink"),
                "line": {"width": 2, "color": edge},
            },
            hovertemplate="layer %{x}, " + name + ": %{y:.3f} ms<extra></extra>",
        )
    return figure


def traffic_map(traffic: pd.DataFrame, *, ranks: int) -> go.Figure:
    """Bytes from each rank to each other, senders as rows, in square cells.

    What a rank keeps is written on the diagonal without a colour: it loads no link.

    Args:
        traffic: ``source_rank``, ``peer_rank``, ``bytes`` (summed over the layers shown).
        ranks: P; pairs that are not there stay open.
    """
    sent_PP = np.full((ranks, ranks), np.nan)
    sent_PP[traffic["source_rank"].to_numpy(int), traffic["peer_rank"].to_numpy(int)] = traffic["bytes"]
    size = min(max(ranks * 26, 250), 520)
    square: dict[str, Any] = {
        "type": "category",
        "showgrid": False,
        "constrain": "domain",
        "nticks": _EVERY_LABEL,
    }
    figure = empty_figure(
        size + 120,
        x=axis("to rank", constraintoward="left", **square),
        y=axis("from rank", constraintoward="top", autorange="reversed", scaleanchor="x", ticks="", **square),
        legend=False,
    )
    figure.update_layout(margin_t=46)
    kept_PP = np.where(np.eye(ranks, dtype=bool), sent_PP, np.nan)
    sent_PP[np.eye(ranks, dtype=bool)] = np.nan
    names = [str(rank) for rank in range(ranks)]
    stops = DIVERGING[5:]
    figure.add_heatmap(
        z=(sent_PP / 1e6).astype(np.float32),
        x=names,
        y=names,
        zmin=0,
        zmax=max(float(np.nanmax(sent_PP, initial=0.0)) / 1e6, 1e-9),
        colorscale=[[index / (len(stops) - 1), colour] for index, colour in enumerate(stops)],
        texttemplate="%{z:.3g}" if ranks <= _NUMBERED_UP_TO else "",
        textfont={"size": 12},
        hovertemplate="rank %{y} to rank %{x}: %{z:.4g} MB<extra></extra>",
        hoverongaps=False,
        xgap=1,
        ygap=1,
        colorbar=colour_bar(nticks=5, ticksuffix=" MB"),
    )
    figure.add_heatmap(
        z=(kept_PP / 1e6).astype(np.float32),
        x=names,
        y=names,
        colorscale=[[0, light("grid")], [1, light("grid")]],
        showscale=False,
        texttemplate="%{z:.3g}" if ranks <= _NUMBERED_UP_TO else "",
        textfont={"size": 12, "color": light("muted")},
        hovertemplate="rank %{y} keeps %{z:.4g} MB<extra></extra>",
        hoverongaps=False,
        xgap=1,
        ygap=1,
    )
    return figure


def waiting_map(layers: pd.DataFrame) -> go.Figure:
    """Share of the ranks' time in exchanges that is waiting, layers as columns, kinds of exchange as rows.

    Args:
        layers: rows of one run and phase: ``layer`` (missing: none known), ``role``, ``wait_share`` (missing:
            not known), ``longest_p50_s``, ``transfer_longest_p50_s``, ``slowest_rank``, ``slowest_cause``.
    """
    names = [_layer_name(layer) for layer in layers["layer"]]
    columns, roles = list(dict.fromkeys(names)), list(dict.fromkeys(layers["role"]))
    share_RL = np.full((len(roles), len(columns)), np.nan)
    told_RL = np.full((len(roles), len(columns)), "", dtype=object)
    for name, row in zip(names, each_row(layers), strict=True):
        place = roles.index(row.role), columns.index(name)
        share_RL[place], told_RL[place] = row.wait_share, _waiting_hover(row)
    figure = empty_figure(
        118 + 34 * len(roles),
        x=axis("layer", type="category", showgrid=False, nticks=_EVERY_LABEL),
        y=axis("", type="category", showgrid=False, autorange="reversed", ticks=""),
        legend=False,
    )
    figure.update_layout(margin_t=46)
    stops = DIVERGING[5:]
    figure.add_heatmap(
        z=(share_RL * 100).astype(np.float32),
        x=columns,
        y=[figure_text(role, 16) for role in roles],
        customdata=told_RL,
        zmin=0,
        zmax=100,
        colorscale=[[index / (len(stops) - 1), colour] for index, colour in enumerate(stops)],
        texttemplate="%{z:.0f} %" if len(columns) <= _NUMBERED_UP_TO else "",
        textfont={"size": 12},
        hovertemplate="layer %{x}, %{y}: %{z:.0f} % waiting<br>%{customdata}<extra></extra>",
        hoverongaps=False,
        xgap=1,
        ygap=1,
        colorbar=colour_bar(tickvals=[0, 25, 50, 75], ticktext=["0", "25 %", "50 %", "75 %"]),
    )
    return figure


def _layer_name(layer: Any) -> str:
    return "not known" if pd.isna(layer) else str(layer)


def _waiting_hover(row: Any) -> str:
    """What hovering over one cell shows in addition to the share."""
    times_ms = (row.longest_p50_s * 1e3, row.transfer_longest_p50_s * 1e3)
    longest = "longest rank {:.3f} ms, of it transfer {:.3f} ms".format(*times_ms)
    if pd.isna(row.slowest_rank):
        return longest
    return f"{longest}<br>slowest: rank {row.slowest_rank} ({figure_text(row.slowest_cause or 'unknown')})"


def rank_time(ranks: pd.DataFrame) -> go.Figure:
    """One bar per rank: its time in exchanges, and what the others waited for it.

    Args:
        ranks: one row per rank of one run and phase: ``source_rank``, ``transfer_s``, ``wait_s``, ``held_s``,
            ``idle_s``, ``unknown_s``, ``caused_wait_s``.
    """
    ranks = ranks.sort_values("source_rank")
    names = [f"rank {rank}" for rank in ranks["source_rank"]]
    slowest = ranks["caused_wait_s"].max() > 0
    worst = ranks["caused_wait_s"].idxmax() if slowest else None
    labels = [
        f"<b>{name} (slowest)</b>" if index == worst else name
        for index, name in zip(ranks.index, names, strict=True)
    ]
    figure = empty_figure(
        150 + min(max(24 * len(ranks), 60), 900),
        x=axis("ms in exchanges, whole run", rangemode="tozero"),
        y=axis("", showgrid=False, autorange="reversed", ticks=""),
    )
    figure.update_layout(barmode="stack", bargap=0.3, legend_traceorder="normal")
    for column, (name, colour, hatch) in _SHARES.items():
        values = ranks[column].fillna(0) * 1e3
        if not (values > 0).any():
            continue
        figure.add_bar(
            x=values,
            y=labels,
            orientation="h",
            name=name,
            marker=hatched(colour, hatch),
            hovertemplate="%{y}, " + name + ": %{x:.3f} ms<extra></extra>",
        )
    figure.add_scatter(
        x=ranks["caused_wait_s"] * 1e3,
        y=labels,
        mode="markers",
        name="what the others waited for it, together",
        marker={
            "symbol": "diamond",
            "size": 10,
            "color": light("ink"),
            "line": {"width": 1.5, "color": light("paper")},
        },
        customdata=[[str(row.cause or "unknown")] for row in each_row(ranks)],
        hovertemplate="the others waited %{x:.3f} ms for %{y} (%{customdata[0]})<extra></extra>",
    )
    return figure

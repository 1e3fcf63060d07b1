"""Energy per token of each phase, and where the energy of each device went; idle apart."""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from observatory.reports.figures.base import axis, bars, empty_figure, line
from observatory.reports.figures.power import PHASE_COLOURS
from observatory.reports.frames.report import each_group, each_row
from observatory.reports.text import figure_text
from observatory.reports.theme import light

_BAR_PX, _PANEL_PX, _FRAME_PX = 34, 66, 76
#: Energy of no phase: colour and hatching.
_IDLE = {
    "idle power during phases": ("thin", "/"),
    "idle time": ("thin", ""),
    "not attributed": ("slate", "x"),
}


def _bar(colour: str, hatch: str = "") -> dict[str, Any]:
    pattern = {"shape": hatch, "fillmode": "overlay", "size": 5, "solidity": 0.35, "fgcolor": light("paper")}
    return {"color": light(colour), "line": {"width": 0}, "pattern": pattern}


def token_energy(tokens: pd.DataFrame) -> go.Figure:
    """One panel per phase with a scale of its own: what a token takes on each rank.

    Args:
        tokens: rows with a value: ``source_rank``, ``phase``, ``kind``, ``tokens``, ``mj_per_token``, its
            ``_low`` and ``_high``, ``idle_mj_per_token``, ``above_idle_mj_per_token`` (missing: not known),
            ``flag``.
    """
    phases = list(dict.fromkeys(tokens["phase"]))
    rows = [int((tokens["phase"] == phase).sum()) for phase in phases]
    heights = [_BAR_PX * count for count in rows]
    whole = sum(heights) + _PANEL_PX * (len(phases) - 1)
    figure = empty_figure(whole + _FRAME_PX + _PANEL_PX, x={}, y={})
    top = float(whole)
    for index, (phase, height) in enumerate(zip(phases, heights, strict=True)):
        of_phase = tokens[tokens["phase"] == phase].sort_values("source_rank")
        number = "" if index == 0 else str(index + 1)
        kind = str(of_phase["kind"].iloc[0])
        figure.update_layout(
            {
                f"yaxis{number}": axis(
                    "", domain=[max(0.0, (top - height) / whole), top / whole], anchor=f"x{number}", ticks="",
                    showgrid=False, type="category", autorange="reversed",
                ),
                f"xaxis{number}": axis(
                    f"{figure_text(phase, 24)}: mJ per {figure_text(kind, 12)} token", anchor=f"y{number}",
                    rangemode="tozero", nticks=6,
                ),
            }
        )  # fmt: skip
        _add_tokens(figure, of_phase, str(phase), number, first=index == 0)
        top -= height + _PANEL_PX
    figure.update_layout(barmode="stack", bargap=0.35, legend_traceorder="normal")
    return figure


def _add_tokens(figure: go.Figure, tokens: pd.DataFrame, phase: str, number: str, *, first: bool) -> None:
    """Bars of one phase (idle, then above idle) and the whole with its interval."""
    names = [f"rank {rank}" for rank in tokens["source_rank"]]
    axes = {"xaxis": f"x{number}", "yaxis": f"y{number}"}
    split = tokens["above_idle_mj_per_token"].notna()
    # What is not above idle, within its error, is all idle power.
    above = tokens["above_idle_mj_per_token"].clip(lower=0)
    parts = (
        ("idle power over the same time", "idle", (tokens["mj_per_token"] - above).where(split), _bar("thin",
        "/"),
        first),
        (
            f"{figure_text(phase, 24)}, above idle", f"above {phase}",
            above.where(split), _bar(PHASE_COLOURS.get(phase, "slate")), True,
        ),
        (
            f"{figure_text(phase, 24)}, idle part not known", f"whole {phase}",
            tokens["mj_per_token"].where(~split), _bar("slate", "x"), True,
        ),
    )  # fmt: skip
    for name, group, value, marker, legend in parts:
        if value.notna().any():
            figure.add_bar(
                orientation="h",
                x=value,
                y=names,
                name=name,
                legendgroup=group,
                showlegend=legend,
                marker=marker,
                hovertemplate="%{y}, " + name + ": %{x:.4g} mJ per token<extra></extra>",
                **axes,
            )
    for flagged in (False, True):
        chosen = tokens[tokens["flag"].notna() == flagged]
        if chosen.empty:
            continue
        figure.add_scatter(
            x=chosen["mj_per_token"],
            y=[f"rank {rank}" for rank in chosen["source_rank"]],
            mode="markers",
            name="all of it, flagged: see below" if flagged else "all of it, 90 % interval",
            legendgroup=f"whole {flagged}",
            showlegend=first,
            marker={
                "symbol": "x" if flagged else "diamond",
                "size": 10,
                "color": light("warn" if flagged else "ink"),
                "line": {"width": 1.5, "color": light("paper")},
            },
            error_x=bars(
                chosen["mj_per_token"],
                chosen["mj_per_token_low"],
                chosen["mj_per_token_high"],
                "warn" if flagged else "ink",
                width=5,
            ),
            customdata=[[row.mj_per_token_low, row.mj_per_token_high] for row in each_row(chosen)],
            hovertemplate="%{y}: %{x:.4g} mJ per token (%{customdata[0]:.4g} to %{customdata[1]:.4g})"
            "<extra></extra>",
            **axes,
        )


def device_energy(devices: pd.DataFrame, parts: pd.DataFrame) -> go.Figure:
    """One bar per device: each phase above idle, idle power meanwhile, idle time, and what is not attributed.

    Args:
        devices: ``device_uuid``, ``energy_mj``, ``error`` (relative half-width of 90 %), ``flag``.
        parts: ``device_uuid``, ``part`` (what it is called), ``phase`` (empty for none), ``mj``.
    """
    labels = {uuid: figure_text(uuid, 20) for uuid in devices["device_uuid"]}
    figure = empty_figure(
        150 + 40 * len(devices),
        x=axis("joules", rangemode="tozero"),
        y=axis("", showgrid=False, ticks="", type="category", autorange="reversed"),
    )
    figure.update_layout(barmode="stack", bargap=0.35, legend_traceorder="normal")
    for (part, phase), stack in each_group(parts, ["part", "phase"]):
        name = figure_text(part, 40)
        colour, hatch = _IDLE.get(str(part), (PHASE_COLOURS.get(str(phase), "slate"), ""))
        figure.add_bar(
            orientation="h",
            x=stack["mj"] / 1e3,
            y=[labels[uuid] for uuid in stack["device_uuid"]],
            name=name,
            marker=_bar(colour, hatch),
            hovertemplate="%{y}: " + name + " %{x:.4g} J<extra></extra>",
        )
    measured = devices[devices["energy_mj"].notna()]
    figure.add_scatter(
        x=measured["energy_mj"] / 1e3,
        y=[labels[uuid] for uuid in measured["device_uuid"]],
        mode="markers",
        name="energy of the device, 90 % interval",
        marker={
            "symbol": ["x" if pd.notna(flag) else "diamond" for flag in measured["flag"]],
            "size": 10,
            "color": [light("warn" if pd.notna(flag) else "ink") for flag in measured["flag"]],
            "line": {"width": 1.5, "color": light("paper")},
        },
        error_x={
            "type": "data",
            "array": (measured["error"].fillna(0) * measured["energy_mj"]) / 1e3,
            "color": line("ink")["color"],
            "thickness": 1.5,
            "width": 5,
        },
        hovertemplate="%{y}: %{x:.5g} J<extra></extra>",
    )
    return figure

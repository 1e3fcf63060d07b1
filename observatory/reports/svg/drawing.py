"""A figure as one SVG: room for labels and legend, then panels, marks and what is written on them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from markupsafe import Markup

from observatory.reports.svg.axes import Axis
from observatory.reports.svg.marks import (
    Panel,
    bars,
    cells,
    dashes,
    grid_values,
    half_step,
    hatch,
    marker_path,
    marker_style,
    scatter,
    stacked,
    values,
)
from observatory.reports.svg.markup import coordinate, element, label, label_width, paint
from observatory.reports.theme import DIVERGING, HEAT_LEVELS, light

_TICK_PX, _LABEL, _TITLE, _LEGEND = 4, 12.0, 13.0, 12.0
_LEGEND_ROW_PX, _KEY_PX = 19, 30
#: Width for which figures state their height, pixels.
_STATED_FOR_PX = 700


@dataclass(frozen=True, slots=True, kw_only=True)
class _Box:
    """The area of the panels, in pixels."""

    left: float
    right: float
    top: float
    bottom: float


def draw(figure: go.Figure, width: int, *, mark: str = "") -> Markup:
    """The figure ``width`` pixels wide; taller than it asks for where its legend needs more lines.

    Args:
        figure: what is drawn.
        width: of the picture, pixels.
        mark: stands above the panels, to the right; empty for nothing.
    """
    layout: dict[str, Any] = figure.layout.to_plotly_json()
    traces = [trace.to_plotly_json() for trace in figure.data]
    axes = _axes(layout, traces)
    legend = _legend(layout, traces)
    rows = _legend_rows(legend, width)
    height = float(layout["height"]) + _LEGEND_ROW_PX * (rows - _legend_rows(legend, _STATED_FOR_PX))
    box = _box(layout, axes, float(width), height - rows * _LEGEND_ROW_PX - (8 if rows else 0))
    _spread(axes, box)
    _keep_square(axes, box)
    drawn = "".join(
        [
            *(
                _shape(shape, axes, box)
                for shape in layout.get("shapes", ())
                if shape.get("layer") == "below"
            ),
            *(_heat(trace, axes) for trace in traces if trace["type"] == "heatmap"),
            *(_grid(axis, axes) for axis in axes.values()),
            *_bars(layout, traces, axes),
            *(scatter(trace, _panel(trace, axes)) for trace in traces if trace["type"] == "scatter"),
            *(
                _shape(shape, axes, box)
                for shape in layout.get("shapes", ())
                if shape.get("layer") != "below"
            ),
            *(_annotation(note, axes, box) for note in layout.get("annotations", ())),
            *(_labels(axis, axes) for axis in axes.values()),
            *(
                _colour_bar(trace, box)
                for trace in traces
                if trace["type"] == "heatmap" and trace.get("showscale") is not False
            ),
            label(mark, width - 14.0, 9.0, size=10.0, anchor="end", colour=light("warn")),
            _legend_drawn(legend, width, height - rows * _LEGEND_ROW_PX, box),
        ]
    )
    return Markup(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {coordinate(height)}" '
        f'width="{width}" height="{coordinate(height)}" aria-hidden="true" focusable="false">{drawn}</svg>'
    )


def _axes(layout: dict[str, Any], traces: Sequence[dict[str, Any]]) -> dict[str, Axis]:
    """All axes with their ranges."""
    axes: dict[str, Axis] = {}
    for key, options in layout.items():
        match = re.fullmatch(r"([xy])axis(\d*)", key)
        if match and options:
            axes["".join(match.groups())] = Axis(name="".join(match.groups()), options=options)
    placed = _placed_bars(layout, traces)
    for index, trace in enumerate(traces):
        panel = _panel(trace, axes)
        for axis, name in ((panel.x, "x"), (panel.y, "y")):
            _see(axis, name, trace, placed.get(index, []))
    for axis in axes.values():
        other = axes.get(axis.options.get("matches", ""))
        if other is not None:
            both = axis.extent + other.extent, axis.fixed + other.fixed
            axis.extent, axis.fixed = both
            other.extent, other.fixed = both
    for axis in axes.values():
        axis.choose_range()
    return axes


def _see(axis: Axis, name: str, trace: dict[str, Any], placed: Sequence[Any]) -> None:
    if axis.options.get("type") is None and any(isinstance(value, str) for value in values(trace, name)):
        axis.options = {**axis.options, "type": "category"}
    if trace["type"] == "heatmap":
        z = np.asarray(trace["z"])
        held = grid_values(trace, name, z.shape[1] if name == "x" else z.shape[0])
        axis.see(held, padded=False)
        if axis.categories is None:
            half = half_step([axis.place(value) for value in held])
            axis.fixed += [axis.place(held[0]) - half, axis.place(held[-1]) + half]
        return
    is_length = trace["type"] == "bar" and (name == "x") == (trace.get("orientation") == "h")
    if is_length:
        axis.see([end for bar in placed for end in (bar.start, bar.end)])
        axis.see([0.0] if not trace.get("base") else [], padded=False)
        return
    held = values(trace, name)
    axis.see(held, padded="markers" in trace.get("mode", "") or name == "y" or trace["type"] == "bar")
    bars_of = trace.get(f"error_{name}") or {}
    if bars_of.get("array") is not None and axis.categories is None:
        up = values(bars_of, "array")
        down = values(bars_of, "arrayminus") or up
        known = [(v, m, n) for v, m, n in zip(held, up, down, strict=True) if v is not None]
        axis.see([end for value, more, less in known for end in (value - less, value + more)])


def _placed_bars(layout: dict[str, Any], traces: Sequence[dict[str, Any]]) -> dict[int, list[Any]]:
    """Bars of every trace by its position, stacked panel by panel."""
    placed: dict[int, list[Any]] = {}
    by_panel: dict[tuple[str, str], list[int]] = {}
    for index, trace in enumerate(traces):
        if trace["type"] == "bar":
            by_panel.setdefault((trace.get("xaxis", "x"), trace.get("yaxis", "y")), []).append(index)
    for members in by_panel.values():
        placed |= dict(
            zip(
                members, stacked([traces[index] for index in members], layout.get("barmode", "")), strict=True
            )
        )
    return placed


def _panel(trace: dict[str, Any], axes: dict[str, Axis]) -> Panel:
    return Panel(x=axes[trace.get("xaxis") or "x"], y=axes[trace.get("yaxis") or "y"])


def _title(axis: Axis) -> str:
    return str((axis.options.get("title") or {}).get("text") or "")


def _box(layout: dict[str, Any], axes: dict[str, Axis], width: float, bottom: float) -> _Box:
    """What labels and titles leave of the picture."""
    margin = layout.get("margin", {})
    upright = [axis for axis in axes.values() if not axis.across]
    top = float(margin.get("t", 10))
    low = [axis for axis in axes.values() if axis.across and _lowest(axis, axes)]
    below = 6.0
    for axis in low:
        labels = 18.0 if axis.options.get("showticklabels") is not False else 0.0
        below = max(below, labels + (22.0 if _title(axis) else 6.0))
    left = 10.0
    for axis in upright:
        # Ticks depend on the length of the axis alone, so the width of their labels can be asked for now.
        domain = axis.options.get("domain") or (0.0, 1.0)
        axis.start, axis.end = (
            (bottom - below - top) * (1 - domain[0]),
            (bottom - below - top) * (1 - domain[1]),
        )
        shown = axis.options.get("showticklabels") is not False
        widest = max((label_width(text, _LABEL) for _, text in axis.ticks()), default=0.0)
        left = max(left, (widest + 12 if shown else 4.0) + (20.0 if _title(axis) else 0.0))
    return _Box(left=left, right=width - float(margin.get("r", 14)), top=top, bottom=bottom - below)


def _lowest(axis: Axis, axes: dict[str, Axis]) -> bool:
    """Whether labels of an x axis stand below all panels."""
    partner = axes.get(axis.options.get("anchor") or "y")
    domain = (partner.options.get("domain") if partner else None) or (0.0, 1.0)
    return bool(domain[0] <= 1e-6)


def _spread(axes: dict[str, Axis], box: _Box) -> None:
    for axis in axes.values():
        low, high = axis.options.get("domain") or (0.0, 1.0)
        if axis.across:
            whole = box.right - box.left
            axis.start, axis.end = box.left + whole * low, box.left + whole * high
        else:
            whole = box.bottom - box.top
            axis.start, axis.end = box.bottom - whole * low, box.bottom - whole * high


def _keep_square(axes: dict[str, Axis], box: _Box) -> None:
    """Cells of equal sides where an axis asks for them, from the upper left corner."""
    for axis in axes.values():
        other = axes.get(axis.options.get("scaleanchor", ""))
        if other is None:
            continue
        unit = min(abs((one.end - one.start) / (one.high - one.low)) for one in (axis, other))
        for one in (axis, other):
            length = unit * abs(one.high - one.low)
            if one.across:
                one.start, one.end = box.left, box.left + length
            else:
                one.start, one.end = box.top + length, box.top


def _heat(trace: dict[str, Any], axes: dict[str, Axis]) -> str:
    return cells(trace, _panel(trace, axes))


def _bars(layout: dict[str, Any], traces: Sequence[dict[str, Any]], axes: dict[str, Axis]) -> Iterator[str]:
    placed = _placed_bars(layout, traces)
    for index, trace in enumerate(traces):
        if index in placed:
            yield bars(trace, placed[index], _panel(trace, axes), float(layout.get("bargap", 0.2)))


def _crossing(axis: Axis, axes: dict[str, Axis]) -> Axis:
    """The axis at whose start this one stands."""
    return axes.get(axis.options.get("anchor") or "") or axes["y" if axis.across else "x"]


def _grid(axis: Axis, axes: dict[str, Axis]) -> str:
    """Grid lines, and the line at zero where it is asked for."""
    other, options, drawn = _crossing(axis, axes), axis.options, ""
    places = [place for place, _ in axis.ticks()] if options.get("showgrid") is not False else []
    path = "".join(_line(axis, other, place) for place in places)
    if path:
        drawn += element("path", d=path, stroke=paint(options.get("gridcolor")), stroke_width=1, fill="none")
    if options.get("zeroline") and min(axis.low, axis.high) < 0 < max(axis.low, axis.high):
        drawn += element(
            "path", d=_line(axis, other, 0.0), stroke="var(--rule)", stroke_width=1.5, fill="none"
        )
    return drawn


def _line(axis: Axis, other: Axis, place: float) -> str:
    at = coordinate(axis.pixel_of_place(place))
    start, end = coordinate(other.start), coordinate(other.end)
    return f"M{at} {start}V{end}" if axis.across else f"M{start} {at}H{end}"


def _labels(axis: Axis, axes: dict[str, Axis]) -> str:
    """Axis line, ticks, their labels and the title."""
    options, other = axis.options, _crossing(axis, axes)
    edge, colour = other.start, (options.get("tickfont") or {}).get("color")
    shown = options.get("showticklabels") is not False
    path = (
        f"M{coordinate(axis.start)} {coordinate(edge)}H{coordinate(axis.end)}"
        if axis.across
        else f"M{coordinate(edge)} {coordinate(axis.start)}V{coordinate(axis.end)}"
    )
    drawn = ""
    for place, text in axis.ticks():
        at = axis.pixel_of_place(place)
        if options.get("ticks"):
            path += (
                f"M{coordinate(at)} {coordinate(edge)}v{_TICK_PX}"
                if axis.across
                else f"M{coordinate(edge)} {coordinate(at)}h{-_TICK_PX}"
            )
        if shown and axis.across:
            drawn += label(text, at, edge + 17, size=_LABEL, anchor="middle", colour=colour)
        elif shown:
            drawn += label(text, edge - 8, at, size=_LABEL, anchor="end", colour=colour, centred=True)
    name, middle = _title(axis), (axis.start + axis.end) / 2
    if name and axis.across:
        drawn += label(
            name, middle, edge + (36 if shown else 18), size=_TITLE, anchor="middle", colour=colour
        )
    elif name:
        text = label(name, 0.0, 0.0, size=_TITLE, anchor="middle", colour=colour)
        drawn += f'<g transform="translate(13 {coordinate(middle)}) rotate(-90)">{text}</g>'
    return element("path", d=path, stroke="var(--rule)", stroke_width=1, fill="none") + drawn


def _ends(shape: dict[str, Any], name: str, axes: dict[str, Axis], box: _Box) -> tuple[float, float]:
    """Where a shape starts and ends along one direction."""
    ref = str(shape.get(f"{name}ref") or name)
    first, last = shape[f"{name}0"], shape[f"{name}1"]
    if ref == "paper":
        low, high = (box.left, box.right) if name == "x" else (box.bottom, box.top)
        return low + (high - low) * float(first), low + (high - low) * float(last)
    axis = axes[ref.split(maxsplit=1)[0]]
    if ref.endswith("domain"):
        return axis.start + (axis.end - axis.start) * float(first), axis.start + (
            axis.end - axis.start
        ) * float(last)
    return axis.pixel(first), axis.pixel(last)


def _shape(shape: dict[str, Any], axes: dict[str, Axis], box: _Box) -> str:
    (x0, x1), (y0, y1) = (_ends(shape, name, axes, box) for name in ("x", "y"))
    if not all(map(math.isfinite, (x0, x1, y0, y1))):
        return ""
    style = shape.get("line") or {}
    if shape.get("type") == "rect":
        return element(
            "rect", x=min(x0, x1), y=min(y0, y1), width=abs(x1 - x0), height=abs(y1 - y0),
            fill=paint(shape.get("fillcolor")), opacity=shape.get("opacity"),
        )  # fmt: skip
    return element(
        "path",
        d=f"M{coordinate(x0)} {coordinate(y0)}L{coordinate(x1)} {coordinate(y1)}",
        stroke=paint(style.get("color")),
        stroke_width=style.get("width", 1),
        stroke_dasharray=dashes(style),
        fill="none",
    )


def _annotation(note: dict[str, Any], axes: dict[str, Axis], box: _Box) -> str:
    place = {}
    for name in ("x", "y"):
        ref = str(note.get(f"{name}ref") or name)
        low, high = (box.left, box.right) if name == "x" else (box.bottom, box.top)
        place[name] = (
            low + (high - low) * float(note[name]) if ref == "paper" else axes[ref].pixel(note[name])
        )
    size = float((note.get("font") or {}).get("size", 12))
    anchor = {"left": "start", "right": "end"}.get(note.get("xanchor", ""), "middle")
    down = size if note.get("yanchor") == "top" else size * 0.35
    return label(
        str(note.get("text", "")), place["x"] + (4 if anchor == "start" else -4 if anchor == "end" else 0),
        place["y"] + down - float(note.get("yshift", 0)), size=size, anchor=anchor,
        colour=(note.get("font") or {}).get("color"),
    )  # fmt: skip


def _colour_bar(trace: dict[str, Any], box: _Box) -> str:
    """The scale of a heatmap, above it."""
    bar = trace["colorbar"]
    width = (box.right - box.left) * float(bar.get("len", 0.72))
    low, high = float(trace["zmin"]), float(trace["zmax"])
    stops = [(float(stop), str(colour)) for stop, colour in trace["colorscale"]]
    drawn, pieces = "", 60
    levels = [4.0 * DIVERGING.index(colour) for _, colour in stops]
    for piece in range(pieces):
        level = round(float(np.interp((piece + 0.5) / pieces, [stop for stop, _ in stops], levels)))
        left, step = box.left + width * piece / pieces, coordinate(width / pieces + 0.3)
        outline = f"M{coordinate(left)} 2h{step}v9h-{step}z"
        drawn += element("path", d=outline, fill=f"var(--h{min(level, HEAT_LEVELS)})")
    axis = Axis(name="x", options={**bar, "range": [low, high]}, start=box.left, end=box.left + width)
    axis.choose_range()
    suffix = str(bar.get("ticksuffix", ""))
    for place, text in axis.ticks():
        at = axis.pixel_of_place(place)
        anchor = "start" if at - box.left < 8 else "middle"
        drawn += label(
            text + suffix, at, 24.0, size=11.0, anchor=anchor, colour=(bar.get("tickfont") or {}).get("color")
        )
    return f'<g shape-rendering="crispEdges">{drawn}</g>'


def _legend(layout: dict[str, Any], traces: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Traces that the legend names, in its order."""
    if not layout.get("showlegend"):
        return []
    named = [
        trace
        for trace in traces
        if trace["type"] != "heatmap" and trace.get("showlegend") is not False and trace.get("name")
    ]
    return sorted(named, key=lambda trace: int(trace.get("legendrank", 1000)))


def _columns(legend: Sequence[dict[str, Any]], width: float) -> int:
    widest = max(label_width(trace["name"], _LEGEND) for trace in legend) + _KEY_PX + 22
    return max(1, min(len(legend), int((width - 12) / widest)))


def _legend_rows(legend: Sequence[dict[str, Any]], width: float) -> int:
    return -(-len(legend) // _columns(legend, width)) if legend else 0


def _legend_drawn(legend: Sequence[dict[str, Any]], width: float, top: float, box: _Box) -> str:
    if not legend:
        return ""
    columns = _columns(legend, width)
    widest = max(label_width(trace["name"], _LEGEND) for trace in legend) + _KEY_PX + 22
    left = 6.0 if columns * widest > box.right - box.left else box.left
    drawn = ""
    for index, trace in enumerate(legend):
        row, column = divmod(index, columns)
        x, y = left + column * widest, top + row * _LEGEND_ROW_PX + 9
        drawn += _key(trace, x, y) + label(trace["name"], x + _KEY_PX, y + 4, size=_LEGEND)
    return drawn


def _key(trace: dict[str, Any], x: float, y: float) -> str:
    """What a trace looks like, in little."""
    mode = trace.get("mode", "lines")
    if trace["type"] == "bar" or trace.get("fill") == "toself":
        colour = (trace.get("marker") or {}).get("color") or trace.get("fillcolor")
        square = f"M{coordinate(x + 6)} {coordinate(y - 6)}h12v12h-12z"
        drawn = element("path", d=square, fill=paint(colour), opacity=trace.get("opacity"))
        pattern = hatch(trace.get("marker") or {})
        return drawn + (element("path", d=square, fill=pattern) if pattern else "")
    drawn = ""
    if "lines" in mode:
        style = trace.get("line") or {}
        drawn += element(
            "path",
            d=f"M{coordinate(x)} {coordinate(y)}h24",
            stroke=paint(style.get("color")),
            stroke_width=style.get("width", 2),
            stroke_dasharray=dashes(style),
            fill="none",
        )
    if "markers" in mode:
        symbol, size, attributes = marker_style(trace, 0)
        drawn += element("path", d=marker_path(symbol, x + 12, y, min(size, 14.0)), **attributes)
    return drawn

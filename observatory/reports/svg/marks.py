"""Marks of traces: lines, points, bars and cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from observatory.reports.svg.axes import Axis
from observatory.reports.svg.markup import coordinate as c
from observatory.reports.svg.markup import element, hover_text, label, number, paint, text_width, title
from observatory.reports.theme import HEAT_LEVELS, heat_level

#: Lengths of strokes and gaps of each kind of line.
_DASHES = {"dot": "1.5 3", "dash": "7 4", "dashdot": "7 3 1.5 3", "longdash": "11 5"}
#: More cells than this are described row by row.
_MOST_TITLES = 1500
_HATCHES = {"/": "slash", "x": "cross", ".": "dots"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """The axes that a trace is drawn on."""

    x: Axis
    y: Axis

    def clipped(self, content: str) -> str:
        """What lies outside of the panel is not shown."""
        (left, right), (top, bottom) = sorted((self.x.start, self.x.end)), sorted((self.y.start, self.y.end))
        box = {"x": left, "y": top, "width": right - left, "height": bottom - top}
        view = " ".join(map(c, box.values()))
        return element("svg", content, **box, viewBox=view) if content else ""


def values(trace: dict[str, Any], name: str) -> list[Any]:
    """Values of a trace as plain ones, None for NaN."""
    held = trace.get(name)
    held = [] if held is None else held
    plain = [each.item() if isinstance(each, np.generic) else each for each in held]
    plain = [each.tolist() if isinstance(each, np.ndarray) else each for each in plain]
    return [None if isinstance(each, float) and math.isnan(each) else each for each in plain]


def dashes(style: dict[str, Any]) -> str | None:
    """Strokes and gaps of a line; None for a solid one."""
    return _DASHES.get(style.get("dash", "solid"))


def hatch(marker: dict[str, Any]) -> str | None:
    """Reference to the pattern of the page that bars are hatched with; None for none."""
    name = _HATCHES.get((marker.get("pattern") or {}).get("shape") or "")
    return name and f"url(#hatch-{name})"


def _each(setting: Any, index: int, otherwise: Any) -> Any:
    """A setting of all marks, or the one of this mark."""
    if isinstance(setting, list | tuple | np.ndarray):
        return setting[index]
    return otherwise if setting is None else setting


def marker_path(symbol: str, x: float, y: float, size: float) -> str:
    """Outline of a marker."""
    r = size / 2
    match symbol:
        case "square":
            return f"M{c(x - r)} {c(y - r)}h{c(size)}v{c(size)}h{c(-size)}z"
        case "diamond":
            d = r * 1.3
            return f"M{c(x)} {c(y - d)}l{c(d)} {c(d)}l{c(-d)} {c(d)}l{c(-d)} {c(-d)}z"
        case "triangle-up":
            return f"M{c(x)} {c(y - r * 1.2)}l{c(r * 1.15)} {c(r * 1.8)}h{c(-r * 2.3)}z"
        case "x" | "cross":
            turn = math.pi / 4 if symbol == "x" else 0.0
            outline = [(r * 1.1, 0.35 * r), (0.35 * r, 0.35 * r), (0.35 * r, r * 1.1)]
            points = []
            for quarter in range(4):
                angle = turn + quarter * math.pi / 2
                points += [
                    (
                        x + u * math.cos(angle) - v * math.sin(angle),
                        y + u * math.sin(angle) + v * math.cos(angle),
                    )
                    for u, v in outline
                ]
            return "M" + "L".join(f"{c(u)} {c(v)}" for u, v in points) + "z"
        case "star":
            points = [
                (
                    x + (r * 1.4 if k % 2 == 0 else r * 0.6) * math.sin(k * math.pi / 5),
                    y - (r * 1.4 if k % 2 == 0 else r * 0.6) * math.cos(k * math.pi / 5),
                )
                for k in range(10)
            ]
            return "M" + "L".join(f"{c(u)} {c(v)}" for u, v in points) + "z"
        case "line-ew":
            return f"M{c(x - r)} {c(y)}h{c(size)}"
        case "line-ns":
            return f"M{c(x)} {c(y - r)}v{c(size)}"
    return f"M{c(x - r)} {c(y)}a{c(r)} {c(r)} 0 1 0 {c(size)} 0a{c(r)} {c(r)} 0 1 0 {c(-size)} 0z"


def marker_style(trace: dict[str, Any], index: int) -> tuple[str, float, dict[str, Any]]:
    """Symbol, size and attributes of one mark."""
    marker = trace.get("marker", {})
    symbol, size = (
        str(_each(marker.get("symbol"), index, "circle")),
        float(_each(marker.get("size"), index, 6)),
    )
    colour = paint(_each(marker.get("color"), index, None)) or "var(--slate)"
    edge = marker.get("line", {})
    edge_colour, width = paint(edge.get("color")), edge.get("width")
    if symbol.startswith("line-"):
        return symbol, size, {"stroke": edge_colour or colour, "stroke_width": width or 1}
    if symbol.endswith("-open"):
        return (
            symbol.removesuffix("-open"),
            size,
            {"fill": "none", "stroke": edge_colour or colour, "stroke_width": width or 1.2},
        )
    return (
        symbol,
        size,
        {"fill": colour, "stroke": edge_colour, "stroke_width": width if edge_colour else None},
    )


def scatter(trace: dict[str, Any], panel: Panel) -> str:
    """Lines, areas, error bars, markers and texts of one trace."""
    xs, ys = values(trace, "x"), values(trace, "y")
    points = [(panel.x.pixel(x), panel.y.pixel(y)) for x, y in zip(xs, ys, strict=True)]
    mode = trace.get("mode", "lines")
    drawn = ""
    if trace.get("fill") == "toself" and points:
        drawn += element("path", d=_path(points, None) + "z", fill=paint(trace.get("fillcolor")))
    if "lines" in mode:
        style = trace.get("line", {})
        drawn += element(
            "path",
            d=_path(points, style.get("shape")),
            fill="none",
            stroke=paint(style.get("color")),
            stroke_width=style.get("width", 2),
            stroke_dasharray=dashes(style),
        )
    drawn = panel.clipped(drawn + _error_bars(trace, panel, xs, ys))
    if "markers" in mode:
        drawn += _markers(trace, points, xs, ys)
    if "text" in mode:
        drawn += _texts(trace, points)
    opacity = trace.get("opacity")
    return element("g", drawn, opacity=float(opacity)) if drawn and opacity else drawn


def _path(points: Sequence[tuple[float, float]], shape: str | None) -> str:
    """A line through points, interrupted where one is missing; steps where asked for."""
    path, before = [], None
    for x, y in points:
        if not (math.isfinite(x) and math.isfinite(y)):
            before = None
            continue
        if before is None:
            path.append(f"M{c(x)} {c(y)}")
        elif shape == "hv":
            path.append(f"H{c(x)}V{c(y)}")
        elif shape == "hvh":
            path.append(f"H{c((before + x) / 2)}V{c(y)}H{c(x)}")
        else:
            path.append(f"L{c(x)} {c(y)}")
        before = x
    return "".join(path)


def _error_bars(trace: dict[str, Any], panel: Panel, xs: list[Any], ys: list[Any]) -> str:
    drawn = ""
    for direction, across in (("error_x", True), ("error_y", False)):
        bars = trace.get(direction)
        if not bars or bars.get("array") is None:
            continue
        up, cap = values(bars, "array"), float(bars.get("width", 4))
        down = values(bars, "arrayminus") or up
        path = []
        for x, y, more, less in zip(xs, ys, up, down, strict=True):
            middle = x if across else y
            if middle is None or not (more or less):
                continue
            axis, other = (panel.x, panel.y) if across else (panel.y, panel.x)
            ends = [axis.pixel(middle - (less or 0)), axis.pixel(middle + (more or 0))]
            ends = [axis.start if not math.isfinite(end) else end for end in ends]
            at = other.pixel(y if across else x)
            size = c(2 * cap)
            if across:
                path += [f"M{c(end)} {c(at - cap)}v{size}" for end in ends]
                path.append(f"M{c(ends[0])} {c(at)}H{c(ends[1])}")
            else:
                path += [f"M{c(at - cap)} {c(end)}h{size}" for end in ends]
                path.append(f"M{c(at)} {c(ends[0])}V{c(ends[1])}")
        if path:
            drawn += element(
                "path",
                d="".join(path),
                stroke=paint(bars.get("color")),
                stroke_width=bars.get("thickness", 1.5),
                fill="none",
            )
    return drawn


def _markers(
    trace: dict[str, Any], points: Sequence[tuple[float, float]], xs: list[Any], ys: list[Any]
) -> str:
    drawn = ""
    silent: dict[tuple[tuple[str, Any], ...], list[str]] = {}
    template = "" if trace.get("hoverinfo") == "skip" else trace.get("hovertemplate", "")
    custom = values(trace, "customdata")
    for index, (x, y) in enumerate(points):
        symbol, size, style = marker_style(trace, index)
        if not (math.isfinite(x) and math.isfinite(y)) or size <= 0:
            continue
        outline = marker_path(symbol, x, y, size)
        if template:
            known = {"x": xs[index], "y": ys[index], "customdata": custom[index] if custom else None}
            drawn += element("path", title(hover_text(template, known)), d=outline, **style)
        else:
            silent.setdefault(tuple(style.items()), []).append(outline)
    for style_items, outlines in silent.items():
        drawn += element("path", d="".join(outlines), **dict(style_items))
    return drawn


def _texts(trace: dict[str, Any], points: Sequence[tuple[float, float]]) -> str:
    drawn, font = "", trace.get("textfont", {})
    size = float(font.get("size", 12))
    for index, ((x, y), text) in enumerate(zip(points, values(trace, "text"), strict=True)):
        if not (math.isfinite(x) and math.isfinite(y)):
            continue
        position = str(_each(trace.get("textposition"), index, "middle center"))
        anchor = "start" if "right" in position else "end" if "left" in position else "middle"
        aside = {"start": 5.0, "end": -5.0, "middle": 0.0}[anchor]
        below = size * 1.1 if position.startswith("bottom") else -size if position.startswith("top") else 0.0
        drawn += label(
            str(text).strip(),
            x + aside,
            y + below,
            size=size,
            anchor=anchor,
            colour=font.get("color"),
            centred=True,
        )
    return drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """Ends of one bar in values: along its length, and its middle and thickness in places."""

    at: Any
    start: float
    end: float


def stacked(traces: Sequence[dict[str, Any]], mode: str) -> list[list[Bar]]:
    """Bars of every trace of one panel, each where the one before it ends."""
    tops: dict[tuple[Any, bool], float] = {}
    placed = []
    for trace in traces:
        sideways = trace.get("orientation") == "h"
        ats, lengths = (
            (values(trace, "y"), values(trace, "x")) if sideways else (values(trace, "x"), values(trace, "y"))
        )
        bases = trace.get("base")
        bars = []
        for index, (at, given) in enumerate(zip(ats, lengths, strict=True)):
            length = float(given or 0.0)
            if bases is not None or mode != "stack":
                start = float(_each(bases, index, 0.0))
            else:
                start = tops.get((at, length >= 0), 0.0)
                tops[at, length >= 0] = start + length
            bars.append(Bar(at=at, start=start, end=start + length))
        placed.append(bars)
    return placed


def bars(trace: dict[str, Any], placed: Sequence[Bar], panel: Panel, gap: float) -> str:
    """Rectangles of one trace, hatched where it asks for it."""
    sideways = trace.get("orientation") == "h"
    along, across = (panel.x, panel.y) if sideways else (panel.y, panel.x)
    unit = abs(across.pixel_of_place(1.0) - across.pixel_of_place(0.0))
    thick = unit * float(trace["width"]) if trace.get("width") else unit * (1 - gap)
    marker, custom = trace.get("marker", {}), values(trace, "customdata")
    template = "" if trace.get("hoverinfo") == "skip" else trace.get("hovertemplate", "")
    xs, ys = values(trace, "x"), values(trace, "y")
    drawn, hatched = "", []
    for index, bar in enumerate(placed):
        middle = across.pixel(bar.at)
        low, high = sorted((along.pixel(bar.start), along.pixel(bar.end)))
        edge = sorted((along.start, along.end))
        low, high = max(low, edge[0]), min(high, edge[1])
        if not math.isfinite(middle) or high - low < 0.05:
            continue
        box = (
            (low, middle - thick / 2, high - low, thick)
            if sideways
            else (middle - thick / 2, low, thick, high - low)
        )
        outline = f"M{c(box[0])} {c(box[1])}h{c(box[2])}v{c(box[3])}h{c(-box[2])}z"
        known = {"x": xs[index], "y": ys[index], "customdata": custom[index] if custom else None}
        drawn += element("path", title(hover_text(template, known)) if template else "", d=outline)
        hatched.append(outline)
    pattern = hatch(marker)
    if pattern and hatched:
        drawn += element("path", d="".join(hatched), fill=pattern, class_="over")
    return element("g", drawn, fill=paint(marker.get("color"))) if drawn else ""


def cells(trace: dict[str, Any], panel: Panel) -> str:
    """Cells of a heatmap, those of one colour as one outline; texts and titles on top."""
    z = np.asarray(trace["z"], dtype=np.float64)
    xs, ys = grid_values(trace, "x", z.shape[1]), grid_values(trace, "y", z.shape[0])
    left, top = _edges(panel.x, xs), _edges(panel.y, ys)
    gap = 1.0 if trace.get("xgap") and abs(left[0][1] - left[0][0]) > 6 else 0.0
    scale = [(float(stop), heat_level(str(colour))) for stop, colour in trace["colorscale"]]
    plain = any(each is None for _, each in scale)
    level = np.full(z.shape, -1)
    known = np.isfinite(z)
    if plain:
        level[known] = HEAT_LEVELS
    else:
        low, high = float(trace["zmin"]), float(trace["zmax"])
        share = np.clip((z[known] - low) / (high - low or 1.0), 0, 1)
        levels = [each for _, each in scale if each is not None]
        level[known] = np.round(np.interp(share, [stop for stop, _ in scale], levels)).astype(int)
    paths: dict[int, list[str]] = {}
    for (y0, y1), of_row in zip(top, level.tolist(), strict=True):
        first = 0
        for column in range(1, len(of_row) + 1):
            if column < len(of_row) and of_row[column] == of_row[first] and not gap:
                continue
            x0, x1 = left[first][0], left[column - 1][1]
            paths.setdefault(of_row[first], []).append(
                f"M{c(x0)} {c(y0)}H{c(x1 - gap)}V{c(y1 - gap)}H{c(x0)}z"
            )
            first = column
    drawn = "".join(
        element("path", d="".join(path), fill="var(--grid)" if plain else f"var(--h{value})")
        for value, path in sorted(paths.items())
        if value >= 0
    )
    return f'<g shape-rendering="crispEdges">{drawn}</g>' + _cell_texts(
        trace, z, xs, ys, left, top, level, plain
    )


def grid_values(trace: dict[str, Any], name: str, count: int) -> list[Any]:
    """Values of the columns or rows of a heatmap."""
    given = values(trace, name)
    return given or [trace.get(f"{name}0", 0) + index * trace.get(f"d{name}", 1) for index in range(count)]


def half_step(places: Sequence[float]) -> float:
    """Half of what lies between neighbours."""
    return abs(places[1] - places[0]) / 2 if len(places) > 1 else 0.5


def _edges(axis: Axis, held: Sequence[Any]) -> list[tuple[float, float]]:
    places = [axis.place(value) for value in held]
    half = half_step(places)
    return [
        (min(ends), max(ends))
        for ends in (
            (axis.pixel_of_place(place - half), axis.pixel_of_place(place + half)) for place in places
        )
    ]


def _cell_texts(
    trace: dict[str, Any], z: np.ndarray[Any, Any], xs: list[Any], ys: list[Any],
    left: list[tuple[float, float]], top: list[tuple[float, float]], level: np.ndarray[Any, Any], plain: bool,
) -> str:  # fmt: skip
    template, text_of = trace.get("hovertemplate", ""), trace.get("texttemplate") or ""
    custom = trace.get("customdata")
    drawn = ""
    few = z.size <= _MOST_TITLES
    for row in range(z.shape[0]):
        if not few and np.isfinite(z[row]).any():
            column = int(np.nanargmax(z[row]))
            text = "largest of the row: " + hover_text(
                template, {"x": xs[column], "y": ys[row], "z": number(float(z[row, column]), ".4g")}
            )
            drawn += _touch(
                left[0][0], top[row][0], left[-1][1] - left[0][0], top[row][1] - top[row][0], text
            )
            continue
        for column in range(z.shape[1]) if few else ():
            value = float(z[row, column])
            if not math.isfinite(value):
                continue
            (x0, x1), (y0, y1) = left[column], top[row]
            known = {
                "x": xs[column],
                "y": ys[row],
                "z": round(value, 4),
                "customdata": None if custom is None else custom[row][column],
            }
            drawn += _touch(x0, y0, x1 - x0, y1 - y0, hover_text(template, known))
            if text_of:
                shown = hover_text(text_of, known)
                size = min(12.0, 0.9 * (x1 - x0) / max(text_width(shown, 1.0), 0.1))
                if size >= 6:
                    middle = HEAT_LEVELS // 2
                    dark = not plain and abs(int(level[row, column]) - middle) > middle * 0.45
                    drawn += element(
                        "text",
                        shown,
                        x=(x0 + x1) / 2,
                        y=(y0 + y1) / 2 + size * 0.35,
                        font_size=c(size),
                        text_anchor="middle",
                        fill="var(--paper)" if dark else "var(--ink)",
                        class_="over",
                    )
    return drawn


def _touch(x: float, y: float, width: float, height: float, text: str) -> str:
    """An area that is not painted and shows a text on hovering."""
    return element(
        "rect",
        title(text),
        x=float(x),
        y=float(y),
        width=float(width),
        height=float(height),
        fill="none",
        pointer_events="all",
    )

"""Elements, text and colours of an SVG."""

from __future__ import annotations

import html
import math
import re
from typing import Any

from markupsafe import escape

from observatory.reports.theme import css_colour

_TAG = re.compile(r"<(/?)(b|br)>")
_NARROW, _WIDE = set("iljtfrI.,:;'|()[] \u202f"), set("mwMW@%—≥≤÷")
_FIELD = re.compile(r"%\{([a-z]+)(?:\[(\d+)\])?(?::([^}]*))?\}")


def coordinate(value: float) -> str:
    """At most one digit behind the point, which no screen and no printer resolves further."""
    text = f"{value:.1f}"
    return text[:-2] if text.endswith(".0") else text


def element(name: str, content: str = "", **attributes: Any) -> str:
    """One element; ``stroke_width`` becomes ``stroke-width``; attributes that are None are left out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_attribute(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{written}>{content}</{name}>" if content else f"<{name}{written}/>"


def _attribute(value: Any) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(escape(value))


def paint(colour: Any) -> str | None:
    """A light colour of the theme as its custom property; None for none."""
    return None if colour is None else css_colour(str(colour))


def text_width(text: str, size: float) -> float:
    """About as wide as the fonts of the page set it, in pixels."""
    whole = 0.0
    for character in text:
        whole += (
            0.36
            if character in _NARROW
            else 0.92
            if character in _WIDE
            else 0.68
            if character.isupper()
            else 0.6
        )
    return 1.04 * whole * size


def label_width(markup: Any, size: float) -> float:
    """Width of the longest line of a label."""
    wider = 1.1 if "<b>" in str(markup) else 1.0
    return max(text_width(line, size) for line in lines_of(markup)) * wider


def lines_of(markup: Any) -> list[str]:
    """The lines of a label, without markup."""
    return [html.unescape(re.sub(r"</?b>", "", line)) for line in str(markup).split("<br>")]


def label(
    markup: Any,
    x: float,
    y: float,
    *,
    size: float,
    anchor: str = "start",
    colour: Any = None,
    centred: bool = False,
) -> str:
    """Text of one or several lines; ``y`` is the base line of the first, or the middle of all."""
    lines = str(markup).split("<br>")
    top = y + size * 0.35 - (len(lines) - 1) * size * 0.6 if centred else y
    rows = []
    for index, line in enumerate(lines):
        bold = "<b>" in line
        shown = escape(html.unescape(_TAG.sub("", line)))
        rows.append(
            element(
                "text", str(shown), x=float(x), y=float(top + index * size * 1.2), font_size=coordinate(size),
                text_anchor=None if anchor == "start" else anchor, fill=paint(colour),
                font_weight="bold" if bold else None,
            )
        )  # fmt: skip
    return "".join(rows) if len(lines) > 1 or lines[0].strip() else ""


def number(value: Any, form: str) -> str:
    """A value in the form of a hover template, ``.3f``, ``.1%`` or ``.4g``."""
    if isinstance(value, str) or not form:
        return str(value)
    if value is None or math.isnan(value):
        return "n/a"
    return f"{value:{form}}".replace("-", "\u2212").replace("%", " %")


def hover_text(template: str, values: dict[str, Any]) -> str:
    """What a hover template says of one mark, one line per ``<br>``."""

    def field(match: re.Match[str]) -> str:
        name, index, form = match.groups()
        value = values.get(name)
        value = value[int(index)] if index is not None and value is not None else value
        return number(value, form or "")

    text = _FIELD.sub(field, template.replace("<extra></extra>", ""))
    return "\n".join(lines_of(text))


def title(text: str) -> str:
    """A ``title`` element, which browsers show on hovering."""
    return f"<title>{escape(text)}</title>" if text else ""

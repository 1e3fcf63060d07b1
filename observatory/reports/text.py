"""Text that came from a run, made fit for a page, and numbers, made fit for reading.

HTML is escaped by the templates. Figures need more care: plotly reads a small markup (``<b>``, ``<a href>``,
``<br>``, entities) in every label and ``%{name}`` in every hover template.
"""

from __future__ import annotations

import math
import re
import unicodedata

#: Stands where there is no number; the reason is given next to it.
MISSING = "n/a"
_BIDI_OR_CONTROL = re.compile("[\u202a-\u202e\u2066-\u2069\u200e\u200f\ufeff]")
_BEFORE_UNIT = re.compile(r"(?<=\d) (?=(?:%|µs|ms|s|[mk]?J|W|MHz|[KMG]?i?B|GB/s)(?![\w/]))")
_BREAK_AFTER = re.compile(r"(?<=[\s/_.:-])")


def plain(value: object) -> str:
    """Text without control characters or direction overrides, which could disguise what it says."""
    text = _BIDI_OR_CONTROL.sub("\ufffd", str(value))
    return "".join(
        " "
        if character in "\n\t\r"
        else "\ufffd"
        if unicodedata.category(character) in ("Cc", "Cs")
        else character
        for character in text
    )


def shorten(value: object, width: int = 40) -> str:
    """At most ``width`` characters, the middle left out: both ends of a model name identify it."""
    text = plain(value)
    if len(text) <= width:
        return text
    head = (width - 1) * 2 // 3
    return f"{text[:head]}…{text[-(width - 1 - head) :]}"


def figure_text(value: object, width: int = 60) -> str:
    """Text for a figure: shortened, and with nothing left that plotly would take for markup or a template."""
    text = shorten(value, width).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return text.replace("%{", "&#37;{")


def figure_label(value: object, *, line: int = 16, lines: int = 3) -> str:
    """Axis label over at most ``lines`` lines of about ``line`` characters, broken at spaces and joints."""
    rows = [""]
    for piece in _BREAK_AFTER.split(shorten(value, line * lines)):
        for start in range(0, len(piece), line):
            part = piece[start : start + line]
            if rows[-1] and len(rows[-1]) + len(part.rstrip()) > line:
                rows.append("")
            rows[-1] += part
    if len(rows) > lines:
        rows = [*rows[: lines - 1], rows[lines - 1].rstrip() + "…"]
    return "<br>".join(figure_text(row.strip(), line + 2) for row in rows)


def unbroken(text: str) -> str:
    """Prose in which no number stands on another line than its unit."""
    return _BEFORE_UNIT.sub("\u00a0", text)


def _absent(value: float | None) -> bool:
    return value is None or not math.isfinite(value)


def number(value: float | None, digits: int = 3) -> str:
    """Fixed number of digits after the point, or ``n/a``."""
    return MISSING if value is None or _absent(value) else f"{value:.{digits}f}"


def count(value: float | None) -> str:
    """Whole number with thin spaces between thousands, or ``n/a``."""
    return MISSING if value is None or _absent(value) else f"{round(value):,}".replace(",", "\u202f")


def times(value: float | None, digits: int = 2) -> str:
    """A ratio such as ``1.83×``, or ``n/a``."""
    return MISSING if value is None or _absent(value) else f"{value:.{digits}f}×"


def percent(value: float | None, digits: int | None = None) -> str:
    """A share as a percentage, or ``n/a``; without ``digits``, one behind the point below 10 %."""
    if value is None or _absent(value):
        return MISSING
    shown = int(abs(value) < 0.0995) if digits is None else digits
    return f"{100 * value:.{shown}f} %"


def interval(low: float | None, high: float | None, digits: int = 3) -> str:
    """``low to high``, or ``n/a`` when an end is missing."""
    if low is None or high is None or _absent(low) or _absent(high):
        return MISSING
    return f"{low:.{digits}f} to {high:.{digits}f}"


def bytes_text(value: float | None) -> str:
    """Bytes in the unit that reads best, binary."""
    if value is None or _absent(value):
        return MISSING
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def microseconds(value: float | None, *, signed: bool = False) -> str:
    """A time in the unit that reads best, three digits or so; ``signed`` puts + before what is more."""
    if value is None or _absent(value):
        return MISSING
    for unit, factor in (("µs", 1.0), ("ms", 1e3), ("s", 1e6)):
        scaled = value / factor
        if abs(scaled) < 1000 or unit == "s":
            break
    digits = 0 if abs(scaled) >= 100 else 1 if abs(scaled) >= 10 else 2
    form = ".1e" if abs(scaled) >= 1e5 else f".{digits}f"
    text = f"{scaled:{'+' if signed else ''}{form}}"
    return f"{text} {unit}".replace("-", "−")


def millijoules(value: float | None) -> str:
    """An energy in the unit that reads best, three digits or so."""
    if value is None or _absent(value):
        return MISSING
    if value == 0:
        return "0 J"
    for unit, factor in (("µJ", 1e-3), ("mJ", 1.0), ("J", 1e3), ("kJ", 1e6)):
        scaled = value / factor
        if abs(scaled) < 1000 or unit == "kJ":
            break
    digits = 0 if abs(scaled) >= 100 else 1 if abs(scaled) >= 10 else 2
    return f"{scaled:.{digits}f} {unit}".replace("-", "−")


def millijoules_interval(low: float | None, high: float | None) -> str:
    """``1.20 to 1.31 mJ``, the unit once where both ends have it; ``n/a`` when an end is missing."""
    ends = millijoules(low), millijoules(high)
    if MISSING in ends:
        return MISSING
    first, _, unit = ends[0].partition(" ")
    return f"{first} to {ends[1]}" if ends[1].endswith(f" {unit}") else " to ".join(ends)


def quantity(value: float, unit: str, *, signed: bool = False) -> str | None:
    """A time, an energy or bytes in the unit that reads best; None for any other unit.

    ``signed`` puts + before a time above zero.
    """
    if unit in ("us", "ms"):
        return microseconds(value * (1e3 if unit == "ms" else 1.0), signed=signed)
    if unit in ("mJ", "J"):
        return millijoules(value * (1e3 if unit == "J" else 1.0))
    return bytes_text(value) if unit == "B" else None

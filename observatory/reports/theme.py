"""Colours of the page and of the figures: one table, two schemes.

Figures are built with the light colours. In the browser the page's script replaces every light colour by
its dark partner where the reader prefers a dark scheme, so that a figure is stored once.
Hues are distinguishable with any common colour vision (after Okabe and Ito; RdBu for diverging
scales); where lines are compared, marker and dash differ as well.
"""

from __future__ import annotations

#: Fonts of the reader's own system; nothing is downloaded.
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif'

#: name -> (light, dark)
_COLOURS: dict[str, tuple[str, str]] = {
    "paper": ("#ffffff", "#14171b"),
    "panel": ("#f6f7f8", "#1b1f25"),
    "ink": ("#1a1e23", "#e7e9ec"),
    "muted": ("#565f69", "#a3acb6"),
    "rule": ("#d9dde2", "#363c45"),
    "grid": ("#e7eaed", "#2a3038"),
    "link": ("#0a5a97", "#7cbcf5"),
    "warn": ("#8a4a00", "#f0b26b"),
    "warn-panel": ("#fdf4e7", "#2b2318"),
    "heat": ("#e4762b", "#d9702a"),
    "blue": ("#0b62a5", "#6cb2f0"),
    "orange": ("#c4550a", "#f39c4a"),
    "green": ("#00785a", "#41c79b"),
    "purple": ("#8b4a9f", "#cd93e3"),
    "slate": ("#4a5560", "#b3bcc6"),
    "sky": ("#2b93c4", "#9cdcf7"),
    "blue-soft": ("#c9dff0", "#23435f"),
    "thin": ("#a9b4bf", "#5b6672"),
}

#: (light, dark) stops from far below to far above; the middle is the page's background.
_DIVERGING: tuple[tuple[str, str], ...] = (
    ("#053061", "#a9d3ff"),
    ("#2166ac", "#76b5f2"),
    ("#4393c3", "#4a93d6"),
    ("#92c5de", "#336ea8"),
    ("#d1e5f0", "#26496a"),
    ("#f5f5f4", "#23282e"),
    ("#fddbc7", "#5a3527"),
    ("#f4a582", "#8f472a"),
    ("#d6604d", "#c86838"),
    ("#b2182b", "#ee985b"),
    ("#67001f", "#ffd3a8"),
)

#: Light stops of the diverging scale, evenly spaced in the logarithm of what they show.
DIVERGING: tuple[str, ...] = tuple(pair[0] for pair in _DIVERGING)

#: Every light colour and what replaces it in the dark scheme.
LIGHT_TO_DARK: dict[str, str] = dict((*_COLOURS.values(), *_DIVERGING))

#: Colours and markers of series, in step.
SERIES: tuple[str, ...] = tuple(
    _COLOURS[name][0] for name in ("blue", "orange", "green", "purple", "slate", "sky")
)
MARKERS: tuple[str, ...] = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross")


def light(name: str) -> str:
    """Light colour called ``name``, as figures use it."""
    return _COLOURS[name][0]


def css_variables(*, dark: bool) -> str:
    """Custom properties of one scheme, ``--ink: #...;`` and so on."""
    return " ".join(f"--{name}: {pair[dark]};" for name, pair in _COLOURS.items())

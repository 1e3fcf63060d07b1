"""Colours of the page and of the figures: one table, two schemes.

Figures are built with the light colours and drawn with the custom properties of the same names, which have
other values where the reader prefers a dark scheme, so that a figure is stored once.
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
#: Cells of heatmaps have one of so many colours and one more, ``--h0`` to ``--h40``.
HEAT_LEVELS = 4 * (len(DIVERGING) - 1)

#: Colours and markers of series, in step.
SERIES: tuple[str, ...] = tuple(
    _COLOURS[name][0] for name in ("blue", "orange", "green", "purple", "slate", "sky")
)
MARKERS: tuple[str, ...] = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross")
_NAMES = {pair[0]: name for name, pair in _COLOURS.items()}


def light(name: str) -> str:
    """Light colour called ``name``, as figures use it."""
    return _COLOURS[name][0]


def css_colour(colour: str) -> str:
    """A light colour as the custom property that follows the scheme; anything else is not painted."""
    return f"var(--{_NAMES[colour]})" if colour in _NAMES else "none"


def heat_level(colour: str) -> float | None:
    """Level of a stop of the diverging scale; None for any other colour."""
    return 4.0 * DIVERGING.index(colour) if colour in DIVERGING else None


def css_variables(*, dark: bool) -> str:
    """Custom properties of one scheme, ``--ink: #...;`` and so on."""
    named = [f"--{name}: {pair[dark]};" for name, pair in _COLOURS.items()]
    stops = [[int(pair[dark][start : start + 2], 16) for start in (1, 3, 5)] for pair in _DIVERGING]
    for level in range(HEAT_LEVELS + 1):
        lower, part = divmod(level, 4)
        upper = stops[min(lower + 1, len(stops) - 1)]
        mixed = [
            round(one + (other - one) * part / 4) for one, other in zip(stops[lower], upper, strict=True)
        ]
        named.append(f"--h{level}: #{''.join(f'{channel:02x}' for channel in mixed)};")
    return " ".join(named)

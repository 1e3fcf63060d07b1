"""Axes: from values to pixels, and where ticks stand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from observatory.reports.svg.markup import label_width
from observatory.reports.svg.markup import number as formatted

#: Pixels between ticks, across and upwards.
_ACROSS_PX, _UPWARDS_PX = 88, 46
_LINE_PX = 15
#: One number alone states no scale.
_FEWEST_NUMBERS = 2


@dataclass(slots=True, kw_only=True)
class Axis:
    """One axis.

    Attributes:
        name: ``x``, ``y2`` and so on.
        options: as in the figure.
        categories: values in order of appearance; None on an axis of numbers.
        low, high: ends, in exponents of ten on a logarithmic axis, in places of categories.
        start, end: pixels of ``low`` and ``high``.
    """

    name: str
    options: Mapping[str, Any]
    categories: list[Any] | None = None
    low: float = 0.0
    high: float = 1.0
    start: float = 0.0
    end: float = 1.0
    extent: list[float] = field(default_factory=list)
    fixed: list[float] = field(default_factory=list)

    @property
    def across(self) -> bool:
        """Whether it is an x axis."""
        return self.name[0] == "x"

    @property
    def size(self) -> float:
        """Text size of its labels, pixels."""
        return 12.0

    def place(self, value: Any) -> float:
        """A value on the axis' own scale; NaN where it has none."""
        if self.categories is not None:
            text = str(value)
            return float(self.categories.index(text)) if text in self.categories else math.nan
        if value is None or isinstance(value, str):
            return math.nan
        number = float(value)
        if self.options.get("type") == "log":
            return math.log10(number) if number > 0 else math.nan
        return number

    def pixel(self, value: Any) -> float:
        """Where a value stands, in pixels."""
        return self.pixel_of_place(self.place(value))

    def pixel_of_place(self, place: float) -> float:
        """Where a place of the axis' own scale stands."""
        span = self.high - self.low
        return self.start + (place - self.low) / (span or 1.0) * (self.end - self.start)

    def see(self, values: Iterable[Any], *, padded: bool = True) -> None:
        """Values that the range is to hold; those that are not padded may stand at its edge."""
        if self.options.get("type") == "category":
            self.categories = self.categories if self.categories is not None else []
            self.categories += [
                text for text in dict.fromkeys(map(str, values)) if text not in self.categories
            ]
            return
        places = [place for place in map(self.place, values) if math.isfinite(place)]
        (self.extent if padded else self.fixed).extend(places)

    def choose_range(self) -> None:
        """The range asked for, or one that holds all values that were seen."""
        asked = self.options.get("range")
        reverse = self.options.get("autorange") == "reversed"
        if asked is not None:
            self.low, self.high = (float(end) for end in asked)
        elif self.categories is not None:
            self.low, self.high = -0.5, max(len(self.categories), 1) - 0.5
        else:
            self._from_values()
        if reverse:
            self.low, self.high = self.high, self.low

    def _from_values(self) -> None:
        values = self.extent + self.fixed
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        is_log = self.options.get("type") == "log"
        from_zero = self.options.get("rangemode") == "tozero" and not is_log
        low, high = (min(low, 0.0), max(high, 0.0)) if from_zero else (low, high)
        margin = 0.055 * (high - low) or (0.3 if is_log else abs(high) * 0.1 or 1.0)
        loose = set(self.extent)
        self.low = (
            low if (from_zero and low == 0) or (low in self.fixed and low not in loose) else low - margin
        )
        self.high = (
            high if (high in self.fixed and high not in loose) or (from_zero and high == 0) else high + margin
        )

    def ticks(self) -> list[tuple[float, str]]:
        """(place, label), as many as there is room for."""
        options, length = self.options, abs(self.end - self.start)
        if options.get("tickvals") is not None:
            texts = options.get("ticktext") or [f"{value:g}" for value in options["tickvals"]]
            marks = [
                (self.place(value), str(text))
                for value, text in zip(options["tickvals"], texts, strict=False)
            ]
        elif self.categories is not None:
            marks = [(float(index), text) for index, text in enumerate(self.categories)]
        else:
            marks = self._numbers(length)
        low, high = sorted((self.low, self.high))
        slack = 1e-6 * (high - low)
        marks = [(place, text) for place, text in marks if low - slack <= place <= high + slack]
        return marks[:: self._every(marks)]

    def _every(self, marks: Sequence[tuple[float, str]]) -> int:
        """Every how many-th label has room."""
        if len(marks) < 2:
            return 1
        apart = min(
            abs(self.pixel_of_place(one[0]) - self.pixel_of_place(other[0])) for one, other in pairwise(marks)
        )
        widest = max(label_width(text, self.size) for _, text in marks) + 10
        needed = widest if self.across else _LINE_PX
        most = self.options.get("nticks") or len(marks)
        return max(1, math.ceil(needed / max(apart, 1e-6)), math.ceil(len(marks) / most))

    def _numbers(self, length: float) -> list[tuple[float, str]]:
        low, high = sorted((self.low, self.high))
        wanted = max(
            2, min(length / (_ACROSS_PX if self.across else _UPWARDS_PX), self.options.get("nticks") or 99)
        )
        step = self.options.get("dtick") or nice_step((high - low) / wanted)
        places = _multiples(step, low, high)
        while len(places) < _FEWEST_NUMBERS and "dtick" not in self.options and high > low:
            step = nice_step(0.4 * step)
            places = _multiples(step, low, high)
        form = self.options.get("tickformat")
        if form:
            return [(place, formatted(place, form)) for place in places]
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        return [(place, f"{place + 0.0:.{digits}f}".replace("-", "\u2212")) for place in places]


def _multiples(step: float, low: float, high: float) -> list[float]:
    """Multiples of a step from ``low`` to ``high``."""
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def nice_step(rough: float) -> float:
    """1, 2 or 5 times a power of ten, at least ``rough``."""
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)

"""Columns of tables: which values of a frame are shown, in which unit and with how many digits.

A table's columns are declared once, next to the frame; the command line and the reports only lay them out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: Stands where a value is missing.
MISSING = "n/a"
#: A number that needs more characters than this is written with an exponent.
_LONGEST_NUMBER = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column of a table.

    Attributes:
        name: key of the value in a row.
        title: head of the column, without its unit.
        unit: unit that numbers are shown in, after ``scale``; "%" for shares, which are shown times 100.
        digits: digits after the point of a number; None: whole numbers in full, others with three
            significant digits, which a page shows in the unit that reads best (us, ms or s).
        scale: from the unit in the frame to the one shown; nothing needs to be given for "%".
        signed: numbers above zero have a plus sign.
        interval: keys of the lower and the upper end, shown with the value.
        of: key of the total that a count belongs to, shown as "54 of 240".
        otherwise: shown where the value is missing.
        text: the values are text, which is aligned left and may be folded; a number never is.
        key: the column identifies its row, and is repeated where a table is split to fit.
        wide: shown on request only.
        legend: what the column holds, where the head does not say it.
    """

    name: str
    title: str
    unit: str = ""
    digits: int | None = None
    scale: float = 1.0
    signed: bool = False
    interval: tuple[str, str] | None = None
    of: str | None = None
    otherwise: str = MISSING
    text: bool = False
    key: bool = False
    wide: bool = False
    legend: str = ""

    @property
    def head(self) -> str:
        """Title and unit."""
        return f"{self.title} {self.unit}".strip()

    @property
    def factor(self) -> float:
        """Factor from the value in the frame to the value shown."""
        return 100.0 if self.unit == "%" else self.scale

    def cell(self, row: Mapping[str, Any]) -> str:
        """The value of a row (of `frame_records`, so plain Python values) as text."""
        value = row[self.name]
        if is_missing(value):
            return self.otherwise
        shown = self.number(value)
        if self.of is not None:
            return f"{shown} of {self.number(row[self.of])}"
        if self.interval is not None:
            low, high = (row[end] for end in self.interval)
            if not is_missing(low) and not is_missing(high):
                joined_by = " to " if low < 0 or self.signed else "-"
                return f"{shown} ({self.number(low)}{joined_by}{self.number(high)})"
        return shown

    def number(self, value: Any) -> str:
        """A value in the unit and with the digits of the column; text and truth values as words."""
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, int) and self.factor == 1.0 and self.digits is None:
            return str(value)
        if not isinstance(value, int | float):
            return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        scaled = value * self.factor
        shown = self._digits(scaled)
        return f"+{shown}" if self.signed and scaled > 0 else shown

    def _digits(self, scaled: float) -> str:
        if self.digits is None:
            return f"{scaled:.0f}" if 1e3 <= abs(scaled) < 10.0**_LONGEST_NUMBER else f"{scaled:.3g}"
        fixed = f"{scaled:.{self.digits}f}"
        return fixed if len(fixed) <= _LONGEST_NUMBER else f"{scaled:.3g}"


def chosen(columns: Sequence[Column], *names: str) -> tuple[Column, ...]:
    """The columns of these names, in this order."""
    named = {column.name: column for column in columns}
    return tuple(named[name] for name in names)


def is_missing(value: object) -> bool:
    """Whether a row holds no value: None, or a number that is not finite."""
    return value is None or (isinstance(value, float) and not math.isfinite(value))


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows with the columns that people are shown; programs get all values of the rows.

    Attributes:
        name: what it is called in the document that holds its rows, and by ``--table``.
        columns: what is shown, in order.
        rows: plain Python values by name, units in the names.
        title: one line above the table.
    """

    name: str
    columns: tuple[Column, ...]
    rows: Sequence[Mapping[str, Any]]
    title: str = ""


def short_names(names: Sequence[str], *, shortest: int = 12) -> dict[str, str]:
    """Each name cut to the fewest characters, at least ``shortest``, that keep all of them distinct."""
    distinct = set(names)
    longest = max(map(len, distinct), default=0)
    for length in range(shortest, longest):
        if len({name[:length] for name in distinct}) == len(distinct):
            return {name: name[:length] for name in distinct}
    return {name: name for name in distinct}

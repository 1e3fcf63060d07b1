"""What a page is made of: sections of prose, tables and figures, without any HTML.

Every figure carries what a distrustful reader asks for: a caption, a note (what, over which window, how
many tokens, which floor, which formula), a text alternative and a table of its numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import plotly.graph_objects as go

from observatory.analysis.columns import Column, is_missing
from observatory.reports.text import count, plain, quantity, shorten

#: Longest text of a cell.
_LONGEST = 600
#: Units, titles and stand-ins that a terminal shows in ASCII.
_TYPESET = {"us": "µs", "+-": "±", "-": "–", "ED2P": "ED²P"}
#: Columns by which a page is filtered.
_KEYS = {"label": "model", "condition": "condition", "phase": "phase", "source_rank": "rank"}
#: Words that keep their small letter at the head of a column.
_SMALL = ("algbw", "busbw")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: what it says.
        detail: smaller second line, empty for none.
        heat: 0..1, depth of the cell's tint; None for no tint.
        heading: it names its row.
    """

    text: str
    detail: str = ""
    heat: float | None = None
    heading: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Heading of a column.

    Attributes:
        title: what it says.
        detail: what the second lines of its cells are.
        numeric: its cells are numbers, set right-aligned.
        folded: shown on request.
        key: what a page is filtered by that its cells hold, empty for nothing.
        detail_key: likewise their second lines.
    """

    title: str
    detail: str = ""
    numeric: bool = True
    folded: bool = False
    key: str = ""
    detail_key: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table with its caption and a note below it (empty for none)."""

    caption: str
    columns: tuple[Head, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One of the pictures a figure can show.

    Attributes:
        group: heading under which the choice is listed, empty for none.
        label: the choice.
        figure: the picture.
        alt: what the picture shows, for those who do not see it.
        note: what was counted, over which window, how many tokens, which floor.
        numbers: table of the same numbers.
        keys: model, condition, phase of what is shown, by which a page is filtered.
    """

    group: str = ""
    label: str
    figure: go.Figure
    alt: str
    note: str
    numbers: Table
    keys: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class FigureBlock:
    """A figure with one or several variants.

    Attributes:
        id: anchor, and name of the file a picture is saved to.
        title: heading.
        caption: what is drawn and how it was computed.
        choice: name of the control that chooses the variant.
        narrow: keep it near square.
        variants: at least one.
    """

    id: str
    title: str
    caption: str
    choice: str = "Show"
    narrow: bool = False
    variants: tuple[Variant, ...]


Block = FigureBlock | Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A section of the page.

    Attributes:
        id: anchor.
        title: heading.
        short: name in the list of sections, the title when empty.
        lead: paragraphs before the blocks.
        blocks: figures and tables in reading order.
        reason: why there are no blocks. The page names such a section, with the reason, in one list at its
            end.
        absent: (what, why) of parts of the section that are left out, for the same list.
    """

    id: str
    title: str
    short: str = ""
    lead: tuple[str, ...] = ()
    blocks: tuple[Block, ...] = ()
    reason: str = ""
    absent: tuple[tuple[str, str], ...] = ()


def frame_table(
    caption: str,
    columns: Sequence[Column],
    rows: Sequence[Mapping[str, Any]],
    *,
    note: str = "",
    leave_out: Sequence[str] = (),
    folded: Sequence[str] = (),
    below: Mapping[str, str] | None = None,
) -> Table:
    """The tables of a page: where the command line shows the same rows, its columns, wide ones as well.

    Args:
        caption: of the table.
        columns: as they are declared with the frame or the section; the first names the row.
        rows: plain Python values (`frame_records`); a value that is a `Cell` is shown as it is.
        note: sentences in front of the legend of the columns.
        leave_out: names of columns that the table lacks.
        folded: names of columns that are shown on request; copies and CSV files always hold them.
        below: names of columns whose values are the second lines of others, by the names of those.
    """
    named = {column.name: column for column in columns}
    lower = {upper: named[name] for upper, name in (below or {}).items()}
    kept = [column for column in columns if column.name not in leave_out]
    shown = [column for column in kept if column not in lower.values()]
    cells = tuple(
        tuple(_cell(column, row, column is shown[0], lower.get(column.name)) for column in shown)
        for row in rows
    )
    legend = [f"{_title(column)}: {column.legend}." for column in kept if column.legend]
    heads = tuple(
        replace(_head(column, lower.get(column.name)), folded=column.name in folded) for column in shown
    )
    return Table(caption=caption, columns=heads, rows=cells, note=" ".join(filter(None, (note, *legend))))


def _head(column: Column, lower: Column | None) -> Head:
    """The unit stands with the values where it is a percent sign or chosen for each of them."""
    by_value = column.unit == "%" or (column.digits is None and quantity(0, column.unit) is not None)
    unit = "" if by_value else _TYPESET.get(column.unit, column.unit)
    title = ", ".join(filter(None, (_title(column), unit)))
    detail = "" if lower is None else _TYPESET.get(lower.title, lower.title)
    return Head(
        title=title,
        detail=detail,
        numeric=not column.text,
        key=_KEYS.get(column.name, ""),
        detail_key="" if lower is None else _KEYS.get(lower.name, ""),
    )


def _title(column: Column) -> str:
    title = _TYPESET.get(column.title, column.title)
    first = title.partition(" ")[0]
    small = first in _SMALL or any(char.isdigit() or char == "_" for char in first)
    return title if small else title[:1].upper() + title[1:]


def _cell(column: Column, row: Mapping[str, Any], heading: bool, lower: Column | None = None) -> Cell:
    value = row[column.name]
    if isinstance(value, Cell):
        return replace(value, heading=heading)
    detail = "" if lower is None else _cell(lower, row, False).text
    if is_missing(value):
        return Cell(text=_TYPESET.get(column.otherwise, column.otherwise), detail=detail, heading=heading)
    text = _value(column, value)
    if column.of is not None:
        text = f"{text} of {_value(column, row[column.of])}"
    ends = [row[end] for end in column.interval or ()]
    if ends and not any(map(is_missing, ends)):
        low, high = (_unmarked(column, end) for end in ends)
        detail = f"{low} to {high}"
    return Cell(text=text, detail=detail, heading=heading)


def _value(column: Column, value: Any) -> str:
    percent = column.unit == "%" and isinstance(value, int | float)
    return f"{_unmarked(column, value)} %" if percent else _unmarked(column, value)


def _unmarked(column: Column, value: Any) -> str:
    """A value as a page shows it, in the unit that reads best where no digits are asked for; without "%"."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return shorten(column.number(value), _LONGEST)
    if column.digits is None:
        best = quantity(value * column.factor, column.unit, signed=column.signed)
        if best is not None:
            return best
        if isinstance(value, int):
            return count(value)
    return plain(column.number(value)).replace("-", "−")

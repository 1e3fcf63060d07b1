"""What a page is made of: sections of prose, tables and figures, without any HTML.

Every figure carries what a distrustful reader asks for: a caption, a note (what, over which window, how
many tokens, which floor, which formula), a text alternative and a table of its numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go


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
class Column:
    """Heading of a column; numbers are set right-aligned."""

    title: str
    detail: str = ""
    numeric: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table with its caption and a note below it (empty for none)."""

    caption: str
    columns: tuple[Column, ...]
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
    """

    group: str = ""
    label: str
    figure: go.Figure
    alt: str
    note: str
    numbers: Table


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


def table(
    caption: str,
    columns: Sequence[str | Column],
    rows: Sequence[Sequence[str | Cell]],
    *,
    note: str = "",
    text: int = 1,
) -> Table:
    """Table from plain strings: the first ``text`` columns are words, the first column names its row."""
    heads = tuple(
        column if isinstance(column, Column) else Column(title=column, numeric=index >= text)
        for index, column in enumerate(columns)
    )
    cells = tuple(
        tuple(
            cell if isinstance(cell, Cell) else Cell(text=cell, heading=index == 0)
            for index, cell in enumerate(row)
        )
        for row in rows
    )
    return Table(caption=caption, columns=heads, rows=cells, note=note)

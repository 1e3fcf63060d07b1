"""What commands print: tables and documents on stdout, messages and progress on stderr.

A table on a terminal is as wide as the terminal at most. Numbers are never folded: text is folded first, then
heads, and a table that is still too wide is continued below, its key columns repeated; below 60 columns its
rows become records, a line for each value. Piped output is not limited in width.
"""

from __future__ import annotations

import contextlib
import csv as csv_format
import itertools
import json as json_format
import math
import os
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from observatory.analysis.columns import Column, Table

if TYPE_CHECKING:
    from rich.progress import Progress

    from observatory.advice.conclusions import Conclusion
    from observatory.run.manifest import CoreShare

_LONGEST_COMPLAINT = 1200
_GAP = "  "
#: Text is folded to no less than this, unless all of it is shorter.
_NARROWEST_TEXT = 12
#: A longer word may be folded.
_LONGEST_WORD = 13
#: Of a narrower terminal a table that does not fit is shown as one record for each row.
_NARROW_TERMINAL = 60
_NARROWEST_TERMINAL = 40
_USUAL_TERMINAL = 80
#: Between two lines of progress in a log.
_LINE_PERIOD_S = 60.0
#: Text may be folded behind these; elsewhere only where a line has none of them.
_JOINTS = " /_.:-,;"
#: A spreadsheet takes text that starts with one of these for a formula.
_FORMULA_STARTS = ("=", "+", "-", "@")


def say(message: str) -> None:
    """One line for people, on stderr."""
    sys.stderr.write(_one_line(message) + "\n")


def say_cores(shares: Iterable[CoreShare]) -> None:
    """Where ranks have no core of their own, one line for each machine."""
    from observatory.run.usable_cores import core_sentence

    for share in shares:
        say(f"note: {core_sentence(share)}")


def complain(message: str) -> None:
    """The one line an error gets."""
    say(f"observatory: {_short(message)}")


def print_data(
    document: Mapping[str, Any],
    tables: Sequence[Table] = (),
    *,
    json: bool,
    csv: bool = False,
    table: str | None = None,
) -> bool:
    """Print for programs, if that is asked for: the document, or one table of it.

    Args:
        document: for ``--json``.
        tables: for ``--csv``, the one that is printed by default first.
        json: print the document.
        csv: print a table.
        table: name of the table to print; None: the first.

    Returns:
        Whether something was printed.

    Raises:
        ObservatoryError: both are asked for, or there is no such table.
    """
    from observatory.errors import ObservatoryError

    if json and csv:
        raise ObservatoryError("--json and --csv exclude each other; give one of them")
    if table is not None and not csv:
        raise ObservatoryError("--table selects what --csv prints; give both")
    if json:
        print_json(document)
    if csv:
        named = {item.name: item for item in tables}
        if table is not None and table not in named:
            raise ObservatoryError(f"table {table!r} does not exist here; expected one of {', '.join(named)}")
        _print_csv(tables[0] if table is None else named[table])
    return json or csv


def print_json(document: Mapping[str, Any]) -> None:
    """The one JSON document of a ``--json`` command."""
    from observatory.run.documents.writing import dump_json

    sys.stdout.write(dump_json(dict(document)) + "\n")


def _print_csv(table: Table) -> None:
    """All values of all rows (RFC 4180, but for line ends); what is missing is empty, lists are JSON."""
    names = list(dict.fromkeys(name for row in table.rows for name in row))
    names = names or [column.name for column in table.columns]
    writer = csv_format.writer(sys.stdout, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([_csv_cell(row.get(name)) for name in names] for row in table.rows)


def _csv_cell(value: object) -> str | int | float:
    """One value; text cannot break lines, and a spreadsheet does not take it for a formula."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return value
    if isinstance(value, dict | list | tuple):
        return json_format.dumps(value, ensure_ascii=False)
    text = _one_line(str(value))
    return f"'{text}" if text.lstrip().startswith(_FORMULA_STARTS) else text


def print_lines(lines: Iterable[str]) -> None:
    """Lines on stdout that are copied or read by programs, such as commands: never folded."""
    for line in lines:
        sys.stdout.write(_one_line(line) + "\n")


def print_text(lines: Iterable[str]) -> None:
    """Sentences on stdout, folded to the terminal."""
    width = _terminal_width()
    for line in lines:
        print_lines(_fold(_one_line(line), width))


def print_conclusion(conclusion: Conclusion) -> None:
    """The worst place, what it costs and what to do next, at the end of a command's tables."""
    from observatory.advice.words import conclusion_sentences

    print_text(["", *conclusion_sentences(conclusion)])


def print_tables(tables: Iterable[Table], *, wide: bool = False) -> None:
    """Tables on stdout, an empty line between them."""
    for index, table in enumerate(tables):
        print_text([""] if index else [])
        print_table(table, wide=wide)


def print_table(table: Table, *, wide: bool = False) -> None:
    """A table on stdout, with a legend of the heads that need one; ``wide`` shows all columns."""
    width = _terminal_width()
    columns = [column for column in table.columns if wide or not column.wide]
    laid = [_Laid.of(column, [_one_line(column.cell(row)) for row in table.rows]) for column in columns]
    if table.title:
        print_text([table.title])
    blocks = list(_blocks(laid, width))
    if width is None or (
        (len(blocks) == 1 or width >= _NARROW_TERMINAL) and all(_total(block) <= width for block in blocks)
    ):
        for index, block in enumerate(blocks):
            print_lines(["", *_lines(block, width)] if index else _lines(block, width))
    else:
        print_lines(_records(laid, width))
    legend = "; ".join(f"{column.title}: {column.legend}" for column in columns if column.legend)
    print_text([legend] if legend else [])


@dataclass(frozen=True, slots=True)
class _Laid:
    """A column as text.

    Attributes:
        column: what is shown.
        cells: one line each.
        narrowest: fewest characters it can be folded to.
        natural: characters that it takes unfolded.
    """

    column: Column
    cells: list[str]
    narrowest: int
    natural: int

    @classmethod
    def of(cls, column: Column, cells: list[str]) -> _Laid:
        longest = max(map(_width, cells), default=0)
        words = [_width(word) for cell in cells for word in cell.split()]
        kept = max((word for word in words if word <= _LONGEST_WORD), default=0)
        narrowest = max(min(longest, _NARROWEST_TEXT), kept) if column.text else longest
        head = max(map(_width, column.head.split()), default=0)
        return cls(column, cells, max(narrowest, head), max(longest, _width(column.head)))


def _blocks(laid: list[_Laid], width: int | None) -> Iterator[list[_Laid]]:
    """The columns in parts that fit, each with the key columns in front."""
    keys = [item for item in laid if item.column.key]
    block = list(keys)
    for item in laid:
        if item.column.key:
            continue
        if width is not None and len(block) > len(keys) and _total(block, item) > width:
            yield block
            block = list(keys)
        block.append(item)
    yield block


def _records(laid: list[_Laid], width: int) -> Iterator[str]:
    """A line for each cell behind its head, row by row: for a terminal too narrow for a table."""
    longest = max((item.narrowest for item in laid), default=0)
    head_width = min(max((_width(item.column.head) for item in laid), default=0), width - longest - len(_GAP))
    for index in range(max((len(item.cells) for item in laid), default=0)):
        yield from [""] if index else []
        for item in laid:
            heads = _fold(item.column.head, head_width)
            cells = _fold(item.cells[index], width - head_width - len(_GAP))
            for head, cell in itertools.zip_longest(heads, cells, fillvalue=""):
                yield f"{head}{' ' * (head_width - _width(head))}{_GAP}{cell}".rstrip()


def _total(block: list[_Laid], *more: _Laid) -> int:
    items = [*block, *more]
    return sum(item.narrowest for item in items) + len(_GAP) * (len(items) - 1)


def _lines(block: list[_Laid], width: int | None) -> Iterator[str]:
    """Heads, a rule and rows of columns that fit."""
    widths = _widths(block, width)
    heads = [_fold(item.column.head, size) for item, size in zip(block, widths, strict=True)]
    deepest = max(map(len, heads), default=0)
    yield from _folded_row(block, widths, [[""] * (deepest - len(head)) + head for head in heads])
    yield _GAP.join("-" * size for size in widths)
    for cells in zip(*(item.cells for item in block), strict=True):
        folded = [_fold(cell, size) for cell, size in zip(cells, widths, strict=True)]
        yield from _folded_row(block, widths, folded)


def _widths(block: list[_Laid], width: int | None) -> list[int]:
    """Widths that fit: what is left over goes to the column that lacks most, text before heads."""
    if width is None:
        return [item.natural for item in block]
    widths = [item.narrowest for item in block]
    for of_text in (True, False):
        chosen = [index for index, item in enumerate(block) if item.column.text == of_text]
        for _ in range(width - sum(widths) - len(_GAP) * (len(block) - 1)):
            index = max(chosen, key=lambda i: block[i].natural - widths[i], default=None)
            if index is None or widths[index] >= block[index].natural:
                break
            widths[index] += 1
    return widths


def _folded_row(block: list[_Laid], widths: list[int], cells: list[list[str]]) -> Iterator[str]:
    for line in range(max(map(len, cells), default=0)):
        parts = []
        for item, size, folded in zip(block, widths, cells, strict=True):
            text = folded[line] if line < len(folded) else ""
            space = " " * (size - _width(text))
            parts.append(text + space if item.column.text else space + text)
        yield _GAP.join(parts).rstrip()


def _fold(text: str, width: int | None) -> list[str]:
    """Lines of at most so many columns, broken behind spaces and joints where there are any."""
    lines = []
    while width is not None and _width(text) > width:
        end = _fitting(text, width)
        joint = max(text.rfind(char, 0, end) for char in _JOINTS) + 1
        space = text.rfind(" ", 0, end + 1) + 1
        cut = space or (joint if joint > end // 3 else end)
        lines.append(text[:cut].rstrip())
        text = text[cut:].lstrip()
    return [*lines, text]


def _fitting(text: str, width: int) -> int:
    """How many characters fit, at least one."""
    total = 0
    for index, char in enumerate(text):
        total += _width(char)
        if total > width:
            return max(index, 1)
    return len(text)


def _width(text: str) -> int:
    """Columns of a terminal that a text takes."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
        for char in text
    )


def _terminal_width() -> int | None:
    """Columns of the terminal that stdout is; None when it is none."""
    if not sys.stdout.isatty():
        return None
    asked = os.environ.get("COLUMNS", "")
    try:
        width = int(asked) if asked.isdigit() else os.get_terminal_size(sys.stdout.fileno()).columns
    except OSError:
        width = 0
    return max(width or _USUAL_TERMINAL, _NARROWEST_TERMINAL)


class ProgressLines:
    """Progress where stderr is no terminal, as in the log of a batch job: at most a line a minute.

    Args:
        now: seconds of a clock that never goes back.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._began_s: float | None = None
        self._said_s = 0.0
        self._said = ""

    def update(self, what: str, done: int, total: int | None) -> None:
        """State what is done, if the last line is a minute old; the first line and the last always."""
        now_s = self._now()
        if self._began_s is None:
            self._began_s = now_s
        line = f"{what}: {done}" + ("" if total is None else f" of {total}")
        is_last = total is not None and done >= total
        if line != self._said and (not self._said or is_last or now_s - self._said_s >= _LINE_PERIOD_S):
            say(f"{line} after {now_s - self._began_s:.0f} s")
            self._said, self._said_s = line, now_s


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """Progress on a terminal from its ``start()`` on, so that a refusal before it is the only line."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(file=sys.stderr),
    )
    try:
        yield bar
    finally:
        if bar.live.is_started:
            bar.stop()


@contextlib.contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """Progress that appears when it is first called with what is done and what there is in all."""
    if not sys.stderr.isatty():
        lines = ProgressLines()
        yield lambda done, total: lines.update(what, done, total)
        return
    with progress_bar() as bar:
        task = bar.add_task(what, total=None)

        def report(done: int, total: int) -> None:
            bar.start()
            bar.update(task, completed=done, total=total)

        yield report


def _short(message: str) -> str:
    """A message whose middle is left out when names in it are absurdly long; its ends say what and how."""
    if len(message) <= _LONGEST_COMPLAINT:
        return message
    half = _LONGEST_COMPLAINT // 2
    return f"{message[:half]} ... {message[-half:]}"


def _one_line(text: str) -> str:
    """Without line breaks and control characters, which could rewrite a terminal."""
    return "".join(char if char.isprintable() else " " for char in text)

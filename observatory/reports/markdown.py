"""A report as Markdown: its sentences and tables, without figures."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from observatory.reports.frames.report import ReportFrames
from observatory.reports.outline import absent_parts, questions
from observatory.reports.page import FigureBlock, Section, Table
from observatory.reports.sections import (
    FORMULAS,
    Number,
    Verdict,
    findings,
    overview,
    problems,
    run_table,
    setting,
)

#: Characters that Markdown, or HTML inside of it, would read as markup.
_MARKUP = re.compile(r"([\\`*_\[\]<>|#~&$!])")


def markdown(
    frames: ReportFrames, sections: Sequence[Section], *, title: str, answer: str,
    numbers: Sequence[Number], verdicts: Sequence[Verdict],
) -> str:  # fmt: skip
    """The whole report; of a figure, the numbers of its first view."""
    lines = [f"# {_plain(title)}", f"**{_plain(answer)}**"]
    lines.append("\n".join(f"* {_plain(each.value)} {_plain(each.meaning)}" for each in numbers))
    lines += ["## Verdicts and findings"]
    lines += [
        f"* {each.part}: {_plain(' '.join((*each.sentences, each.next_step)).strip())}" for each in verdicts
    ]
    lines += [f"* {_plain(finding.text)}" for finding in findings(frames)]
    lines += ["## What was run", *map(_plain, setting(frames))]
    lines.append(_table(("", ""), [(name, value) for name, value in overview(frames)]))
    lines += [f"* {_plain(name)}: {_plain('; '.join(texts))}" for name, texts in problems(frames)]
    lines += _blocks(run_table(frames))
    for question in questions([section for section in sections if section.blocks]):
        lines.append(f"## {question.title}")
        for section in question.sections:
            lines += [f"### {_plain(section.title)}", *map(_plain, section.lead), *_blocks(section)]
    lines += ["## Not captured, and how to"]
    lines += [f"* {_plain(what)}: {_plain(why)}" for what, why in absent_parts(sections)]
    lines += ["## Methods", *(f"* `{name}`: {_plain(text)}" for name, text in FORMULAS)]
    return "\n\n".join(line for line in lines if line) + "\n"


def _blocks(section: Section) -> Iterator[str]:
    for block in section.blocks:
        table = block.variants[0].numbers if isinstance(block, FigureBlock) else block
        if isinstance(block, FigureBlock):
            yield f"**{_plain(block.title)}.** {_plain(block.variants[0].note)}"
        yield from _of_table(table)


def _of_table(table: Table) -> Iterator[str]:
    yield f"{_plain(table.caption)}:"
    heads = tuple(", ".join(filter(None, (head.title, head.detail))) for head in table.columns)
    yield _table(
        heads, [tuple(" ".join(f"{cell.text} {cell.detail}".split()) for cell in row) for row in table.rows]
    )
    if table.note:
        yield _plain(table.note)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(
        f"| {' | '.join(text if text == '---' else _plain(text) for text in line)} |" for line in lines
    )


def _plain(text: str) -> str:
    """Text that is read as text."""
    return _MARKUP.sub(r"\\\1", " ".join(text.split()))

"""``observatory ctl``: start, stop and mark a capture while it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from observatory.cli.options import CsvOption, JsonOption, WideOption

if TYPE_CHECKING:
    from observatory.analysis.columns import Table
    from observatory.campaign.control import Controlled


def ctl(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run that is being captured.")],
    action: Annotated[str, typer.Argument(metavar="ACTION", help="One of start, stop, mark, flush, status.")],
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Of a mark: what the moment is called.")
    ] = None,
    wait_s: Annotated[
        float,
        typer.Option(
            "--wait", metavar="SECONDS", min=0.1, max=3600, help="Longest time to wait for answers."
        ),
    ] = 10.0,
    csv: CsvOption = False,
    wide: WideOption = False,
    json: JsonOption = False,
) -> None:
    """Start or stop a running capture, mark a moment of it, or see where it stands.

    `start` and `stop` hold from the end of a step on, the same step on all ranks. `flush` writes what was
    captured so far; `status` shows each rank. The program itself is never stopped.
    """
    from observatory.campaign.control import control_run, outcome_sentence
    from observatory.cli.output import print_data, print_table, print_text, say
    from observatory.cli.parsing import parse_word
    from observatory.errors import RunError
    from observatory.run.control import ACTIONS
    from observatory.run.documents.printed import printed_document

    chosen = parse_word("ACTION", action, {word: word for word in ACTIONS})
    if (chosen == "mark") != (name is not None):
        raise RunError(f"{chosen} is given {'a' if name else 'no'} name", remedy="name marks, and only marks")
    done = control_run(run, chosen, name=name, wait_s=wait_s)
    table = _rank_table(done)
    if not print_data(printed_document("ctl", done.document()), [table], json=json, csv=csv):
        if chosen == "status":
            print_table(table, wide=wide)
            print_text(_mark_lines(done))
        else:
            print_text([outcome_sentence(done)])
    late = [word for word in done.ranks if not word.has_answered]
    if late:
        ranks = ", ".join(str(word.answer.rank) for word in late[:8])
        say(f"note: {len(late)} of {len(done.ranks)} ranks have not answered within {wait_s:g} s ({ranks})")


def _mark_lines(done: Controlled) -> list[str]:
    if not done.marks:
        return []
    return ["", "Marks:", *(f"  step {mark.step}: {mark.name}" for mark in done.marks)]


def _rank_table(done: Controlled) -> Table:
    from observatory.analysis.columns import Column, Table
    from observatory.campaign.control import age_words

    columns = (
        Column(name="rank", title="rank", key=True),
        Column(name="state", title="state", text=True),
        Column(name="steps", title="steps ended"),
        Column(name="rows", title="rows"),
        Column(name="next", title="next", text=True, otherwise="-"),
        Column(name="age", title="last word", text=True),
        Column(name="host", title="host", text=True),
        Column(name="pid", title="process", wide=True),
    )
    rows: list[dict[str, Any]] = []
    for word in done.ranks:
        answer = word.answer
        rows.append(
            {
                **answer.model_dump(include={"rank", "state", "steps", "rows", "host", "pid"}),
                "next": None if answer.next_action is None else f"{answer.next_action} at {answer.next_step}",
                "age": f"{age_words(word.age_s)} ago" + ("" if word.has_answered else ", no answer"),
                "age_s": round(word.age_s, 3),
                "has_answered": word.has_answered,
                "next_action": answer.next_action,
                "next_step": answer.next_step,
            }
        )
    return Table(name="ranks", columns=columns, rows=rows, title=f"Capture of {done.run}")

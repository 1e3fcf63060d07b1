"""``observatory check``: whether a run keeps rules."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from observatory.cli.options import CsvOption, JsonOption, RunArgument, WideOption

#: Exit codes: a rule is broken; one could not be judged.
BROKEN, NOT_JUDGED = 1, 4


def check(
    run: RunArgument,
    rules: Annotated[
        Path, typer.Option("--rules", metavar="FILE", help="Rules, a TOML file: docs/check.md.")
    ],
    *,
    wide: WideOption = False,
    csv: CsvOption = False,
    json: JsonOption = False,
) -> None:
    """Check a run against rules, for CI and while a model trains.

    Ends with 1 when a rule is broken, with 4 when one cannot be judged, and shows the rows.
    """
    from observatory.analysis.rules.document import check_csv, check_document, check_sentences, check_table
    from observatory.analysis.rules.judging import judge_rules
    from observatory.analysis.rules.rules_file import load_rules
    from observatory.cli.output import print_data, print_tables, print_text, say
    from observatory.run import open_run

    found = load_rules(rules)
    opened = open_run(run)
    document = check_document(str(run), found, judge_rules(opened, found))
    if not print_data(document, [check_csv(document)], json=json, csv=csv):
        broken = check_table(document)
        if broken.rows:
            print_tables([broken], wide=wide)
            print_text([""])
        print_text(check_sentences(document))
    for problem in opened.problems:
        say(f"note: {problem}")
    states = {rule["state"] for rule in document["rules"]}
    raise typer.Exit(BROKEN if "broken" in states else NOT_JUDGED if "not_judged" in states else 0)

"""``observatory clocks recommend``: the clock for each phase, and the commands that set it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from observatory.cli.options import (
    CsvOption,
    JsonOption,
    MaxSlowdownOption,
    TableOption,
    WideOption,
    WrapperOption,
)

if TYPE_CHECKING:
    from observatory.advice.frequency import ClockAdvice
    from observatory.analysis.columns import Table
    from observatory.analysis.frequency.telemetry_records import TelemetryAdvice


def recommend(
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE", help="Clock model of `clocks fit`; a run directory is taken as --telemetry."
        ),
    ] = None,
    max_slowdown: MaxSlowdownOption = 0.02,
    telemetry: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Run with power samples: what they show without a sweep."),
    ] = None,
    wrapper: WrapperOption = None,
    wide: WideOption = False,
    csv: CsvOption = False,
    table: TableOption = None,
    json: JsonOption = False,
) -> None:
    """Choose the clock of least energy inside a slowdown budget; nothing is set, commands are printed."""
    from observatory.advice.conclusions import conclude_clocks, conclusion_document
    from observatory.advice.frequency import recommend_clocks
    from observatory.advice.tables import advice_table, advised_clocks
    from observatory.analysis.frequency.model_file import load_clock_model
    from observatory.analysis.frequency.tables import telemetry_table
    from observatory.analysis.frequency.telemetry import telemetry_advice
    from observatory.cli.output import print_conclusion, print_data
    from observatory.errors import ClockError
    from observatory.locks.commands import all_commands
    from observatory.run import open_run
    from observatory.run.documents.printed import printed_document

    if model is not None and telemetry is None and model.is_dir():
        model, telemetry = None, model
    if model is None and telemetry is None:
        raise ClockError(
            "nothing to go by; give a clock model of `observatory clocks fit`, or --telemetry RUN"
        )
    content: dict[str, Any] = {}
    tables: list[Table] = []
    advice = seen = None
    if model is not None:
        advice = recommend_clocks(load_clock_model(model), max_slowdown=max_slowdown)
        commands = {
            f"{clock:.0f} MHz": all_commands(advice.device.uuid, clock, wrapper=wrapper)
            for clock in advised_clocks(advice)
        }
        content |= {**advice.model_dump(mode="json"), "commands": commands}
        tables.append(advice_table(advice))
    if telemetry is not None:
        seen = telemetry_advice(open_run(telemetry))
        content["telemetry"] = seen.model_dump(mode="json")
        tables.append(telemetry_table(seen))
    document = printed_document("clock_advice", content)
    conclusion = conclude_clocks(document)
    document["conclusion"] = conclusion_document(conclusion)
    if print_data(document, tables, json=json, csv=csv, table=table):
        return
    if advice is not None:
        _print_advice(advice, tables[0], commands, wide=wide)
    if seen is not None:
        _print_telemetry(seen, tables[-1], wide=wide)
    print_conclusion(conclusion)


def _print_advice(advice: ClockAdvice, table: Table, commands: dict[str, list[str]], *, wide: bool) -> None:
    from observatory.cli.output import print_lines, print_table, print_text, say

    print_table(table, wide=wide)
    for item in advice.series:
        print_text(["", item.text])
        if item.behaviour.fix_first:
            print_text([f"  first: {item.behaviour.fix_first}"])
        if item.unsure_mhz is not None:
            print_text(
                [f"  the estimate alone allows {item.unsure_mhz:.0f} MHz: more repeats may confirm it"]
            )
        print_text([f"  {item.behaviour.text}", f"  {item.lock_against_cap.text}"])
        print_text(f"  {confound.text}" for confound in item.confounds)
    if advice.common:
        print_text(["", advice.common.text])
    for note in advice.notes:
        say(note)
    for clock, lines in commands.items():
        print_lines(["", f"# to lock to {clock}; nothing was set", *lines])


def _print_telemetry(telemetry: TelemetryAdvice, table: Table, *, wide: bool) -> None:
    from observatory.cli.output import print_table, print_text

    print_table(table, wide=wide)
    for item in telemetry.devices:
        print_text(f"{item.device_uuid} {item.phase or 'all'}: {finding}" for finding in item.findings)
    print_text([telemetry.cannot, *(f"  {step}" for step in telemetry.next_steps)])

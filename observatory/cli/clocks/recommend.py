"""``observatory clocks recommend``: the clock for each phase, and the commands that set it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from observatory.cli.options import JsonOption

if TYPE_CHECKING:
    from observatory.advice.frequency import ClockAdvice
    from observatory.analysis.frequency.telemetry_records import Readings, TelemetryAdvice


def recommend(
    model: Annotated[
        Path | None,
        typer.Argument(help="Clock model of clocks fit; a run directory is taken as --telemetry."),
    ] = None,
    max_slowdown: Annotated[
        float, typer.Option(min=0.0, max=10.0, help="Longest an iteration may get, as a share of its time.")
    ] = 0.02,
    telemetry: Annotated[
        Path | None, typer.Option(help="Run with power samples: say what they tell without a sweep.")
    ] = None,
    wrapper: Annotated[
        str | None, typer.Option(help="The site's own command, with {uuid} and {clock_mhz}.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Choose the clock of least energy inside a slowdown budget; nothing is set, commands are printed."""
    from observatory.advice.frequency import recommend_clocks
    from observatory.analysis.frequency.model_file import load_clock_model
    from observatory.analysis.frequency.telemetry import telemetry_advice
    from observatory.cli.output import print_json
    from observatory.errors import ClockError
    from observatory.run import open_run

    if model is not None and telemetry is None and model.is_dir():
        model, telemetry = None, model
    if model is None and telemetry is None:
        raise ClockError(
            "nothing to go by; give a clock model of `observatory clocks fit`, or --telemetry RUN"
        )
    document: dict[str, Any] = {}
    if model is not None:
        advice = recommend_clocks(load_clock_model(model), max_slowdown=max_slowdown)
        commands = _commands(advice, wrapper)
        document |= {**advice.model_dump(mode="json"), "commands": commands}
        if not json:
            _print_advice(advice, commands)
    if telemetry is not None:
        seen = telemetry_advice(open_run(telemetry))
        document["telemetry"] = seen.model_dump(mode="json")
        if not json:
            _print_telemetry(seen)
    if json:
        print_json(document)


def _commands(advice: ClockAdvice, wrapper: str | None) -> dict[str, list[str]]:
    """Commands by the clock they set: the common one first, then each series' own."""
    from observatory.locks.commands import all_commands

    clocks = [advice.common.sm_clock_mhz] if advice.common and advice.common.sm_clock_mhz else []
    clocks += [item.choice.sm_clock_mhz for item in advice.series if item.choice]
    return {
        f"{clock:.0f} MHz": all_commands(advice.device.uuid, clock, wrapper=wrapper)
        for clock in dict.fromkeys(clocks)
    }


def _print_advice(advice: ClockAdvice, commands: dict[str, list[str]]) -> None:
    from observatory.cli.output import print_lines, print_table, say

    print_table(
        ["series", "class", "reference MHz", "lock MHz", "saving", "slowdown", "mJ/token", "EDP MHz", "ED2P "
                                                                                                     "MHz",
         "locks against caps"],
        [
            [
                item.title,
                item.behaviour.words,
                f"{item.reference_mhz:.0f} {'unlocked' if item.reference_how == 'unlocked' else 'highest'}",
                f"{item.choice.sm_clock_mhz:.0f}" if item.choice else item.verdict,
                item.choice.saving.percent() if item.choice else None,
                item.choice.slowdown.percent() if item.choice else None,
                _per_token(item.reference_mj_per_token, item.choice.mj_per_token if item.choice else None),
                f"{item.edp.sm_clock_mhz:.0f}" if item.edp else None,
                f"{item.ed2p.sm_clock_mhz:.0f}" if item.ed2p else None,
                item.lock_against_cap.verdict,
            ]
            for item in advice.series
        ],
        title=f"{advice.device.name or 'device'}: least energy for at most {100 * advice.max_slowdown:.1f} % "
        "more time, 90 % intervals",
    )  # fmt: skip
    for item in advice.series:
        print_lines(["", item.text])
        if item.behaviour.fix_first:
            print_lines([f"  first: {item.behaviour.fix_first}"])
        if item.unsure_mhz is not None:
            print_lines(
                [f"  the estimate alone allows {item.unsure_mhz:.0f} MHz: more repeats may confirm it"]
            )
        print_lines([f"  {item.behaviour.text}", f"  {item.lock_against_cap.text}"])
        print_lines(f"  {confound.text}" for confound in item.confounds)
    if advice.common:
        print_lines(["", advice.common.text])
    for note in advice.notes:
        say(note)
    for clock, lines in commands.items():
        print_lines(["", f"# to lock to {clock}; nothing was set", *lines])


def _per_token(before: float | None, after: float | None) -> str | None:
    if before is None:
        return None
    return f"{before:.3g}" if after is None else f"{before:.3g} -> {after:.3g}"


def _percent(share: float | None) -> str | None:
    from observatory.text import percent_words

    return None if share is None else percent_words(share)


def _mhz(readings: Readings | None) -> str | None:
    clock_mhz = None if readings is None else readings.sm_clock_mhz
    return None if clock_mhz is None else f"{clock_mhz:.0f}"


def _print_telemetry(seen: TelemetryAdvice) -> None:
    from observatory.cli.output import print_lines, print_table

    print_table(
        [
            "device",
            "phase",
            "samples",
            "power W",
            "p95/limit",
            "capped",
            "of busy",
            "idle",
            "clock MHz",
            "busy MHz",
            "capped MHz",
        ],
        [
            [
                item.device_uuid,
                item.phase or "all",
                item.samples,
                None if item.power_median_mw is None else f"{item.power_median_mw / 1e3:.0f}",
                _percent(item.power_over_limit),
                _percent(item.power_cap_share),
                _percent(item.power_cap_busy_share),
                _percent(item.idle_share),
                *(_mhz(readings) for readings in (item, item.in_state("busy"), item.in_state("power cap"))),
            ]
            for item in seen.devices
        ],
        title=f"{seen.run}: what telemetry alone tells",
    )
    for item in seen.devices:
        print_lines(f"{item.device_uuid} {item.phase or 'all'}: {finding}" for finding in item.findings)
    print_lines([seen.cannot, *(f"  {step}" for step in seen.next_steps)])

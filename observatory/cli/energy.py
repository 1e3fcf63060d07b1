"""``observatory energy``: energy of a run per phase and token, idle apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from observatory.cli.numbers import interval_cell, percent_cell, scaled_cell
from observatory.cli.options import JsonOption

#: Rows named before one sentence that is about all of them.
_MOST_PLACES = 4


def energy(
    run: Annotated[Path, typer.Argument(help="Run directory with power samples.")],
    reuse: Annotated[
        Path | None, typer.Option(help="Result of `observatory reuse measure`, to show beside the run.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
    json: JsonOption = False,
) -> None:
    """Show the energy of a run: per device, phase and token, with intervals, or why it is not known."""
    from observatory.analysis.energy import energy_summary, fit_reuse
    from observatory.cli.output import print_json, say
    from observatory.cli.reuse import print_reuse, reuse_document
    from observatory.run import open_run
    from observatory.run.documents.prefix_cache import load_reuse
    from observatory.run.documents.writing import frame_records

    opened = open_run(run)
    measured = None if reuse is None else load_reuse(reuse)
    curve = None if measured is None else fit_reuse(measured, seed=seed)
    summary = energy_summary(opened, seed=seed)
    frames = {
        name: frame_records(getattr(summary, name))
        for name in ("devices", "phases", "tokens", "totals", "aliasing")
    }
    powers = [status.power for status in opened.manifest.ranks if status.power is not None]
    sampling = [note for power in powers for note in power.notes]
    problems = list(dict.fromkeys([*opened.problems, *sampling, *summary.problems]))
    for problem in problems:
        say(f"note: {problem}")
    if json:
        document: dict[str, Any] = {
            "run_id": opened.manifest.run_id,
            "model": opened.manifest.model.name,
            "problems": problems,
            **frames,
        }
        print_json(document if curve is None else document | {"reuse": reuse_document(curve)})
        return
    _print(frames, opened.manifest.model.name)
    if curve is not None and measured is not None:
        print_reuse(curve, measured.model, measured.prompt_tokens)


def _print(frames: dict[str, list[dict[str, Any]]], model: str) -> None:
    from observatory.cli.output import print_table, say

    print_table(
        ["device", "rank", "seconds", "energy J", "+-", "from", "mean W", "idle W", "counter against power"],
        [
            [row["device"] or row["device_uuid"], row["source_rank"], scaled_cell(row["duration_s"], 1, 1),
             scaled_cell(row["energy_mj"], 1e-3, 1), percent_cell(row["error"]), row["source"],
             scaled_cell(row["power_mw"], 1e-3, 1), scaled_cell(row["idle_power_mw"], 1e-3, 1),
             percent_cell(row["disagreement"])]
            for row in frames["devices"]
        ],
        title=f"{model}: energy of the run per device; calibration of the sensor (about 5 %) left out",
    )  # fmt: skip
    for row in frames["devices"]:
        for text in (row["flag"], row["reason"]):
            if text:
                say(f"{row['device_uuid']}: {text}")
    if frames["phases"]:
        print_table(
            ["phase", "rank", "seconds", "W", "90 % interval", "J", "above idle J", "idle J", "method"],
            [_phase_cells(row) for row in frames["phases"]],
            title="per phase, and per span inside a phase",
        )
    for line in _together(frames["phases"], ("flag", "reason"), _place):
        say(line)
    if frames["tokens"]:
        print_table(
            ["phase", "rank", "tokens", "kind", "mJ per token", "90 % interval", "above idle", "idle"],
            [
                [row["phase"], row.get("source_rank", f"all {row.get('ranks')}"), row["tokens"], row["kind"],
                 scaled_cell(row["mj_per_token"], 1, 2),
                 interval_cell(row["mj_per_token_low"], row["mj_per_token_high"], 1, 2),
                 scaled_cell(row["above_idle_mj_per_token"], 1, 2),
                 scaled_cell(row["idle_mj_per_token"], 1, 2)]
                for row in (*frames["tokens"], *frames["totals"])
            ],
            title="energy per token: of a rank's devices over its own tokens",
        )  # fmt: skip
    for line in _together(frames["tokens"], ("flag", "reason"), lambda row: f"tokens of {row['phase']}"):
        say(line)
    for row in frames["aliasing"]:
        if row["error"] > row["error_after"]:
            say(
                f"steps of {row['phase']} ({row['step_period_ms']:.1f} ms) move in time with the power "
                f"sensor ({row['update_ms']:.0f} ms): up to {100 * row['error']:.0f} % error of integrated "
                f"power; {row['shifts']} pauses of {row['shift_ms']:.1f} ms leave "
                f"{percent_cell(row['error_after'])}"
            )
    say("how each number is made: docs/energy.md")


def _together(
    rows: list[dict[str, Any]], columns: tuple[str, ...], name: Callable[[dict[str, Any]], str]
) -> Iterator[str]:
    """What must be known of rows, each sentence once, behind the names of all rows that it is about."""
    concerned: dict[str, list[str]] = {}
    for row in rows:
        for text in filter(None, (row[column] for column in columns)):
            concerned.setdefault(text, []).append(f"{name(row)} on rank {row['source_rank']}")
    for text, places in concerned.items():
        more = f" and {len(places) - _MOST_PLACES} more" if len(places) > _MOST_PLACES else ""
        yield f"{', '.join(places[:_MOST_PLACES])}{more}: {text}"


def _phase_cells(row: dict[str, Any]) -> list[object]:
    return [
        _place(row), row["source_rank"], scaled_cell(row["seconds"], 1, 2),
        scaled_cell(row["power_mw"], 1e-3, 1),
        interval_cell(row["power_low_mw"], row["power_high_mw"], 1e-3, 1),
        scaled_cell(row["energy_mj"], 1e-3, 1),
        scaled_cell(row["above_idle_mj"], 1e-3, 1), scaled_cell(row["idle_mj"], 1e-3, 1),
        None if row["method"] is None else f"{row['method']} ({row['source']})",
    ]  # fmt: skip


def _place(row: dict[str, Any]) -> str:
    return str(row["phase"]) if row["span"] is None else f"{row['phase']} / {row['span']}"

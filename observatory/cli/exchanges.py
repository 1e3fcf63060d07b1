"""``observatory exchanges``: waiting and transfer of every layer's exchanges, and whom they wait for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from observatory.cli.options import JsonOption


def exchanges(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    flight_recorder: Annotated[
        list[str] | None,
        typer.Option(help="RANK=FILE: a flight recorder dump (JSON) to set beside that rank's rows."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show the time of every layer's exchanges, split into waiting and transfer."""
    from observatory.analysis.exchange import (
        critical_path,
        layer_waits,
        problems_of,
        rank_waits,
        recorder_of_run,
        run_waits,
    )
    from observatory.cli.output import print_json, print_table, say, say_cores
    from observatory.cli.parsing import parse_files_of_ranks
    from observatory.errors import RunError
    from observatory.run import open_run
    from observatory.run.documents.writing import frame_records
    from observatory.run.usable_cores import share_document, short_of_cores

    opened = open_run(run)
    waits = run_waits(opened)
    if waits.empty:
        raise RunError(f"{run} holds no exchanges; profile with several ranks, for example --ep 4")
    layers, ranks = frame_records(layer_waits(waits)), frame_records(rank_waits(waits))
    unknown = problems_of(waits)
    phases = frame_records(critical_path(opened.spans(), waits))
    dumps = parse_files_of_ranks(flight_recorder or (), ranks=opened.manifest.topology.ranks)
    recorder = recorder_of_run(opened, dumps=dumps)
    short = short_of_cores(status.cores for status in opened.manifest.ranks)
    say_cores(short)
    for problem in opened.problems:
        say(f"note: {problem}")
    if json:
        print_json(
            {
                "run_id": opened.manifest.run_id,
                "model": opened.manifest.model.name,
                "problems": list(opened.problems),
                "short_of_cores": [share_document(share) for share in short],
                "layers": layers,
                "ranks": ranks,
                "phases": phases,
                "unknown": [{"reason": reason, "rows": rows} for reason, rows in unknown.items()],
                "flight_recorder": None if recorder is None else recorder.document(),
            }
        )
        return
    print_table(
        ["layer", "role", "phase", "collectives", "longest us", "longest transfer us", "wait", "slowest rank",
         "waited for it", "cause"],
        [_layer_cells(row) for row in layers],
        title=f"{opened.manifest.model.name}: exchanges of {len(ranks)} ranks; medians over collectives",
    )  # fmt: skip
    print_table(
        ["rank", "in exchanges ms", "waiting", "held", "transfer", "no traffic", "not known",
         "others waited for it", "last", "cause"],
        [_rank_cells(row) for row in ranks],
        title="per rank, sums over the run in ms",
    )  # fmt: skip
    if recorder is not None:
        print_table(
            ["rank", "algorithm", "exchanges", "found", "recorder starts us later", "at worst", "outside",
             "timed by both", "probe us", "recorder us", "at worst us apart", "differ"],
            [_recorder_cells(row) for row in frame_records(recorder.agreement)],
            title="flight recorder beside the probe, medians",
        )  # fmt: skip
        for reason, rows in recorder.gaps.items():
            say(f"flight recorder, {rows} of {len(waits)} rows: {reason}")
    for reason, rows in unknown.items():
        say(f"no split for {rows} of {len(waits)} rows: {reason}")
    say("wait: share of the time in exchanges; last: how often it arrived last of all; docs/waiting.md")


def _layer_cells(row: dict[str, Any]) -> list[object]:
    return [
        row["layer"], row["role"], row["phase"], row["collectives"], _scaled(row["longest_p50_s"], 1e6),
        _scaled(row["transfer_longest_p50_s"], 1e6), _percent(row["wait_share"]), row["slowest_rank"],
        _percent(row["slowest_share"]), row["slowest_cause"],
    ]  # fmt: skip


def _rank_cells(row: dict[str, Any]) -> list[object]:
    names = ("duration_s", "wait_s", "held_s", "transfer_s", "idle_s", "unknown_s", "caused_wait_s")
    times = [_scaled(row[name], 1e3) for name in names]
    return [row["source_rank"], *times, row["times_last"], row["cause"]]


def _recorder_cells(row: dict[str, Any]) -> list[object]:
    counts = [row[name] for name in ("exchanges", "found")]
    starts = [_scaled(row[name], 1e6) for name in ("start_p50_s", "start_worst_s")]
    names = ("duration_p50_s", "recorder_duration_p50_s", "difference_worst_s")
    times = [_scaled(row[name], 1e6) for name in names]
    return [
        row["source_rank"], row["algorithm"], *counts, *starts, row["outside"], row["timed"], *times,
        row["differ"],
    ]  # fmt: skip


def _scaled(seconds: float | None, factor: float) -> str | None:
    return None if seconds is None else f"{seconds * factor:.1f}"


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.0f} %"

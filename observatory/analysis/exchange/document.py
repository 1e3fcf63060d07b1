"""The document of ``observatory exchanges`` and its tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from observatory.analysis.columns import Column, Table
from observatory.analysis.exchange.flight_recorder import recorder_of_run
from observatory.analysis.exchange.layer_time import critical_path
from observatory.analysis.exchange.summary import layer_waits, problems_of, rank_waits, run_waits
from observatory.errors import RunError
from observatory.run import Run
from observatory.run.documents.printed import printed_document
from observatory.run.documents.writing import frame_records
from observatory.run.usable_cores import share_document, short_of_cores

#: Of `layer_waits`.
LAYER_COLUMNS = (
    Column(name="layer", title="layer", key=True),
    Column(name="role", title="role", text=True, key=True),
    Column(name="phase", title="phase", text=True, key=True),
    Column(name="collectives", title="exchanges"),
    Column(
        name="longest_p50_s",
        title="longest",
        unit="us",
        scale=1e6,
        digits=0,
        legend="time of the slowest rank, median over exchanges",
    ),
    Column(
        name="transfer_longest_p50_s",
        title="longest transfer",
        unit="us",
        scale=1e6,
        digits=0,
        wide=True,
    ),
    Column(
        name="wait_share",
        title="waiting",
        unit="%",
        digits=1,
        legend="share of all ranks' time in these exchanges",
    ),
    Column(
        name="slowest_rank",
        title="slowest rank",
        legend="the rank that the others waited for longest",
    ),
    Column(
        name="slowest_share",
        title="its share",
        unit="%",
        digits=0,
        legend="of all waiting, that for this rank",
    ),
    Column(
        name="slowest_cause",
        title="cause",
        text=True,
        otherwise="-",
        wide=True,
        legend="why it arrived last",
    ),
)

#: Of `rank_waits`.
RANK_COLUMNS = (
    Column(name="source_rank", title="rank", key=True),
    Column(name="duration_s", title="in exchanges", unit="ms", scale=1e3, digits=3),
    Column(name="wait_s", title="waiting", unit="ms", scale=1e3, digits=3),
    Column(
        name="held_s",
        title="held",
        unit="ms",
        scale=1e3,
        digits=3,
        wide=True,
        legend="its peers had arrived, but the backend waits for all ranks",
    ),
    Column(name="transfer_s", title="transfer", unit="ms", scale=1e3, digits=3),
    Column(
        name="idle_s",
        title="no traffic",
        unit="ms",
        scale=1e3,
        digits=3,
        wide=True,
        legend="in exchanges in which it had nothing to send or receive",
    ),
    Column(name="unknown_s", title="not split", unit="ms", scale=1e3, digits=3, wide=True),
    Column(
        name="caused_wait_s",
        title="waited for",
        unit="ms",
        scale=1e3,
        digits=3,
        legend="time that other ranks waited for this one",
    ),
    Column(
        name="times_last",
        title="last",
        of="rows",
        legend="how often it was the last to arrive, of its exchanges",
    ),
    Column(name="cause", title="cause", text=True, otherwise="-", legend="why it was waited for, mostly"),
)

#: Of `recorder_agreement`.
RECORDER_COLUMNS = (
    Column(name="source_rank", title="rank", key=True),
    Column(name="algorithm", title="algorithm", text=True, key=True),
    Column(name="found", title="matched", of="exchanges", legend="exchanges that the recorder holds as well"),
    Column(
        name="start_p50_s",
        title="starts later",
        unit="us",
        scale=1e6,
        digits=1,
        legend="the recorder's start after the probe's",
    ),
    Column(name="start_worst_s", title="at worst", unit="us", scale=1e6, digits=1, wide=True),
    Column(name="outside", title="outside", wide=True, legend="recorder times outside those of the probe"),
    Column(name="timed", title="timed by both", wide=True),
    Column(name="duration_p50_s", title="probe", unit="us", scale=1e6, digits=1),
    Column(name="recorder_duration_p50_s", title="recorder", unit="us", scale=1e6, digits=1),
    Column(name="difference_worst_s", title="worst difference", unit="us", scale=1e6, digits=1, wide=True),
    Column(
        name="differ", title="differ", of="timed", legend="durations that disagree, of those timed by both"
    ),
)


def exchange_document(run: Run, *, dumps: Mapping[int, Path] | None = None) -> dict[str, Any]:
    """Waiting and transfer of a run's exchanges, as ``--json`` prints them (docs/json.md).

    Args:
        run: an open run.
        dumps: flight recorder dumps by rank, in place of what the run holds.

    Raises:
        RunError: the run holds no exchanges.
        RunFormatError: a file is no dump.
    """
    exchanges = run.exchanges(arrow_lists=True)
    waits = run_waits(run, exchanges)
    if waits.empty:
        raise RunError(f"{run.path} holds no exchanges; profile with several ranks, for example --ep 4")
    recorder = recorder_of_run(run, exchanges, dumps=dumps or {})
    del exchanges
    manifest = run.manifest
    taken_part = waits.groupby("source_rank").size()
    return printed_document(
        "exchanges",
        {
            "run_id": manifest.run_id,
            "model": manifest.model.name,
            "problems": list(run.problems),
            "short_of_cores": [
                share_document(share) for share in short_of_cores(status.cores for status in manifest.ranks)
            ],
            "rows": len(waits),
            "layers": frame_records(layer_waits(waits)),
            "ranks": [
                {**row, "collectives": int(taken_part[row["source_rank"]])}
                for row in frame_records(rank_waits(waits))
            ],
            "phases": frame_records(critical_path(run.spans(), waits)),
            "unknown": frame_records(problems_of(waits)),
            "flight_recorder": None if recorder is None else recorder.document(),
        },
    )


def exchange_tables(document: dict[str, Any]) -> list[Table]:
    """Layers, ranks, and the flight recorder where there is one."""
    ranks = len(document["ranks"])
    tables = [
        Table(
            name="layers",
            columns=LAYER_COLUMNS,
            rows=document["layers"],
            title=f"{document['model']}: exchanges of {ranks} ranks",
        ),
        Table(
            name="ranks", columns=RANK_COLUMNS, rows=document["ranks"], title="per rank, sums over the run"
        ),
    ]
    if document["flight_recorder"] is not None:
        rows = document["flight_recorder"]["agreement"]
        title = "flight recorder against the probe, medians"
        tables.append(Table(name="flight_recorder", columns=RECORDER_COLUMNS, rows=rows, title=title))
    return tables

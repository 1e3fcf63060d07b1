"""Small runs of many shapes, the same at every call, and what is said of each as plain values.

``python -m tests.analysis.exchange.shapes`` prints what is said now; ``former.json`` holds what was said by
the analysis that went from collective to collective.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa

from observatory.analysis.exchange import exchange_traffic, run_waits
from observatory.analysis.exchange.document import exchange_document
from observatory.run import Run, RunWriter, open_run
from observatory.run.documents.writing import frame_records
from observatory.run.manifest import ClockSpec, Manifest, ModelSpec, Topology
from observatory.run.tables import EXCHANGE_SCHEMA, POWER_SCHEMA, SPAN_SCHEMA
from tests.analysis.exchange.tables import SHARED

RANKS = 4
Rows = list[dict[str, Any]]

WORLD, HALVES, NODES = (
    (("0-3", (0, 1, 2, 3)),),
    (("0-1", (0, 1)), ("2-3", (2, 3))),
    (("node", (0, 1)), ("node", (2, 3))),
)
ACROSS = (("across", (0, 2)), ("across", (1, 3)))


def rows_of(random: Random, groups: tuple[tuple[str, tuple[int, ...]], ...], **common: Any) -> Rows:
    """Dispatch and combine of two layers in three steps; ``node`` and ``across`` list all ranks' bytes."""
    rows: Rows = []
    now_ns = [10**9] * RANKS
    for number in range(12):
        step, layer, role = number // 4, number // 2 % 2, ("dispatch", "combine")[number % 2]
        for name, members in groups:
            send = [[random.choice((0, 0, 64, 512)) for _ in members] for _ in members]
            start_ns = {rank: now_ns[rank] + random.randrange(200_000) for rank in members}
            for i, rank in enumerate(members):
                now_ns[rank] = max(start_ns.values()) - random.randrange(20_000) + 30_000
                now_ns[rank] = max(now_ns[rank], start_ns[rank] + 1_000)
                lists = send[i], [of_peer[i] for of_peer in send]
                if name in ("node", "across"):
                    lists = tuple(
                        [values[members.index(peer)] if peer in members else 0 for peer in range(RANKS)]
                        for values in lists
                    )
                rows.append(
                    {
                        "step": step,
                        "phase": "prefill",
                        "layer": layer,
                        "source_rank": rank,
                        "role": role,
                        "group": name,
                        "sequence": number,
                        "algorithm": "flat",
                        "backend": "nccl",
                        "start_ns": start_ns[rank],
                        "end_ns": now_ns[rank],
                        "send_bytes": lists[0],
                        "receive_bytes": lists[1],
                        "backend_sequence": number + 7,
                        **common,
                    }
                )
    return rows


def changed(rows: Rows, every: int, *changes: Callable[[dict[str, Any]], Any]) -> Rows:
    """Every so manieth row changed, by one change after the other."""
    for place, row in enumerate(rows[3::every]):
        row.update(changes[place % len(changes)](row))
    return rows


def contradictions(rows: Rows) -> Rows:
    return changed(
        rows,
        5,
        lambda _: {"step": 9},
        lambda _: {"layer": None},
        lambda _: {"algorithm": "tree"},
        lambda _: {"backend_sequence": 99},
        lambda _: {"sequence": 0},
        lambda row: {"send_bytes": [*row["send_bytes"], 1]},
        lambda row: {"send_bytes": [value + 1 for value in row["send_bytes"]]},
        lambda _: {"role": "other"},
        lambda _: {"role": "combine", "send_bytes": [9] * RANKS},
    )


def unfinished(rows: Rows) -> Rows:
    return changed(
        rows,
        4,
        lambda _: {"end_ns": None},
        lambda row: {"end_ns": row["start_ns"] - 1},
        lambda _: {"send_bytes": None},
        lambda _: {"send_bytes": None, "receive_bytes": None},
        lambda row: {"end_ns": row["start_ns"] + 1},
    )


def recorded(rows: Rows) -> Rows:
    return changed(
        rows,
        1,
        lambda row: {"recorder_start_ns": row["start_ns"] + 900, "recorder_duration_ns": 21_000},
        lambda row: {"recorder_start_ns": row["start_ns"] - 5},
        lambda _: {"recorder_problem": "the recorder holds no entry of it"},
    )


def spans_of(random: Random, rows: Rows) -> Rows:
    """The exchanges as spans, and computing before them."""
    spans: Rows = []
    for row in rows:
        where = {name: row[name] for name in ("step", "phase", "layer", "source_rank")}
        start_ns = row["start_ns"]
        spans.append({**where, "name": row["role"], "start_ns": start_ns - 100, "end_ns": row["end_ns"]})
        name = "experts" if row["role"] == "combine" else "route"
        spans.append(
            {**where, "name": name, "start_ns": start_ns - random.randrange(150_000), "end_ns": start_ns}
        )
    return spans


#: Rows, spans and clocks of each run.
def shape(name: str) -> tuple[Rows, Rows, list[ClockSpec | None]]:
    random = Random(name)
    shared: list[ClockSpec | None] = [SHARED] * RANKS
    rows = {
        "one group": lambda: rows_of(random, WORLD),
        "several groups": lambda: rows_of(random, HALVES) + rows_of(random, NODES, algorithm="hierarchical"),
        "across": lambda: rows_of(random, ACROSS) + rows_of(random, WORLD, algorithm="gather"),
        "missing ranks": lambda: [row for row in rows_of(random, WORLD) if random.random() > 0.1],
        "unfinished": lambda: unfinished(rows_of(random, WORLD)),
        "contradictions": lambda: contradictions(rows_of(random, WORLD)),
        "unequal clocks": lambda: rows_of(random, WORLD),
        "one clock not aligned": lambda: rows_of(random, WORLD),
        "held": lambda: changed(rows_of(random, WORLD, backend="gloo"), 17, lambda _: {"end_ns": None}),
        "recorder": lambda: recorded(rows_of(random, WORLD)),
        "backward": lambda: (
            rows_of(random, WORLD, phase="train_forward")
            + [
                row | {"step": row["step"] + 3, "sequence": row["sequence"] + 12}
                for row in rows_of(random, WORLD, phase="train_backward", backend=None, algorithm=None)
            ]
        ),
    }[name]()
    if name == "unequal clocks":
        shared = [
            ClockSpec(
                offset_ns=rank * 15_000,
                uncertainty_ns=8_000,
                method="ping-pong",
                measured_ns=10**9,
                drift_ppm=None if rank % 2 else 3.0,
            )
            for rank in range(RANKS)
        ]
    elif name == "one clock not aligned":
        shared[2] = ClockSpec(method="none", reason="no answer")
    return rows, spans_of(random, rows) if name in ("one group", "backward", "unfinished") else [], shared


NAMES = (
    "one group", "several groups", "across", "missing ranks", "unfinished", "contradictions",
    "unequal clocks", "one clock not aligned", "held", "recorder", "backward",
)  # fmt: skip

#: Columns of waits that are those of the exchanges.
GIVEN = ("step", "phase", "layer", "group", "sequence", "algorithm", "backend")


def write_shape(folder: Path, name: str) -> Run:
    rows, spans, clocks = shape(name)
    manifest = Manifest(
        run_id="run-1",
        created_unix_s=1.0,
        model=ModelSpec(name="m"),
        topology=Topology(ranks=RANKS, node_of_rank=(0, 0, 1, 1)),
    )
    writers = [RunWriter.create(folder, manifest)]
    writers += [RunWriter.join(folder, rank=rank) for rank in range(1, RANKS)]
    for writer, clock in reversed(list(zip(writers, clocks, strict=True))):
        own = [row for row in rows if row["source_rank"] == writer.rank]
        writer.append("exchange", pa.Table.from_pylist(own, schema=EXCHANGE_SCHEMA))
        own = [row for row in spans if row["source_rank"] == writer.rank]
        writer.append("spans", pa.Table.from_pylist(own, schema=SPAN_SCHEMA))
        if name == "one group":
            sample = {"time_ns": 10**9 + 500_000, "device_uuid": f"GPU-{writer.rank}"}
            sample["sm_clock_mhz"] = 1200 if writer.rank == 1 else 1500
            writer.append("power", pa.Table.from_pylist([sample], schema=POWER_SCHEMA))
        if clock is not None:
            writer.set_clock(clock)
        writer.close()
    return open_run(folder)


def said_of(run: Run) -> dict[str, Any]:
    """Everything that the analysis says of a run's exchanges, frames by column."""
    exchanges = run.exchanges()
    waits = run_waits(run).drop(columns=list(GIVEN))
    traffic = exchange_traffic(exchanges, ranks=RANKS, node_of_rank=run.manifest.topology.node_of_rank)
    document = exchange_document(run)
    frames = {
        "waits": frame_records(waits),
        "traffic": frame_records(traffic),
        **{name: document[name] for name in ("layers", "ranks", "phases", "unknown")},
    }
    said: dict[str, Any] = {
        name: {column: [record[column] for record in records] for column in (records[0] if records else ())}
        for name, records in frames.items()
    }
    return said | {"flight_recorder": document["flight_recorder"], "rows": document["rows"]}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        said = {name: said_of(write_shape(Path(folder) / name, name)) for name in NAMES}
    json.dump(said, sys.stdout, separators=(",", ":"))


if __name__ == "__main__":
    main()

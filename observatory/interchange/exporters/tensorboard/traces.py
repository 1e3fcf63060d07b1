"""Traces of single ranks in the words that torch-tb-profiler looks for.

The plugin (0.4.3) takes ``ProfilerStep#N`` for a step, category ``cpu_op`` for work of the host, and for
communication, in its distributed view, five names alone [its ``profiler/trace.py``]: broadcast, reduce,
all_reduce, all_gather and reduce_scatter of ``nccl:`` or ``gloo:``. It knows no all-to-all. A dispatch
therefore stands as an all_gather and a combine as a reduce_scatter, which are what an expert-parallel layer
without all-to-all does in their place; any other all-to-all as an all_reduce. ``args`` say what each is.
The view needs as many of them on every rank; what is on some ranks only keeps its own name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from observatory.interchange.exporters.chrome_trace.rows import Chosen, rows_of
from observatory.interchange.exporters.chrome_trace.survey import survey_run
from observatory.interchange.exporters.chrome_trace.trace import Tracing, write_trace
from observatory.run import Run

_STANDS_FOR = {"dispatch": "all_gather", "combine": "reduce_scatter"}
_ANY_OTHER = "all_reduce"
#: Spans that hold an exchange or others: counted as work, all of an exchange would be overlapped.
_NO_WORK = ("moe_layer", "dispatch", "combine", "count_exchange")

#: The plugin puts names into HTML as they are.
_PLAIN = re.compile(r"[^\w .:/()\[\]#-]")

_Key = tuple[int, int | None, str]


def write_profiler_traces(run: Run, folder: Path, chosen: Chosen) -> tuple[list[Path], list[str]]:
    """Write ``rank_00000.<ms>.pt.trace.json`` and so on into a folder.

    Args:
        run: the run.
        folder: one that is there.
        chosen: rows that are wanted, those of one phase.

    Returns:
        The files, none where nothing was timed, and what a reader must know of them.
    """
    survey = survey_run(run, chosen)
    if not survey.first_ns:
        return [], []
    tracing = Tracing(run, chosen, survey)
    shared, left = _on_every_rank(run, chosen)
    files = []
    for rank in sorted(survey.first_ns):
        files.append(folder / f"rank_{rank:05d}.{int(run.manifest.created_unix_s * 1e3)}.pt.trace.json")
        write_trace(files[-1], tracing, [rank], adapt=_adapter(shared))
    notes = [f"{left} exchanges are not on every rank and not in the distributed view"] if left else []
    return files, [*tracing.notes(), *notes]


def _on_every_rank(run: Run, chosen: Chosen) -> tuple[Counter[_Key], int]:
    """How many exchanges of each step, layer and role every rank has, and how many are left over."""
    of_rank: dict[int, Counter[_Key]] = {}
    for rows in rows_of(run, "exchange"):
        own = chosen.of(rows)
        own = own.filter(pc.is_valid(own.column("end_ns")))
        for row in own.select(["source_rank", "step", "layer", "role"]).to_pylist():
            key = (row["step"], row["layer"], row["role"])
            of_rank.setdefault(row["source_rank"], Counter())[key] += 1
    counts = list(of_rank.values())
    if len(counts) < run.manifest.topology.ranks:
        return Counter(), sum(own.total() for own in counts)
    shared = counts[0].copy()
    for own in counts[1:]:
        shared &= own
    return shared, sum((own - shared).total() for own in counts)


def _adapter(shared: Counter[_Key]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Puts the events of one rank into the plugin's words."""
    left = shared.copy()
    number = 0

    def adapt(event: dict[str, Any]) -> dict[str, Any]:
        nonlocal number
        args = event["args"]
        if event["ph"] != "X" or event["cat"] not in ("span", "exchange"):
            return event
        number += 1
        args = {**args, "External id": number}
        if event["cat"] == "span":
            if "layer" not in args and event["name"] == args["phase"]:
                step = {"name": f"ProfilerStep#{args['step']}", "cat": "user_annotation"}
                return {**event, **step, "args": args}
            if event["name"] in _NO_WORK:
                return event
            return {**event, "name": _PLAIN.sub("_", event["name"]), "cat": "cpu_op", "args": args}
        key = (args["step"], args.get("layer"), args["role"])
        if left[key] <= 0:
            return event
        left[key] -= 1
        library = "nccl" if "nccl" in args.get("backend", "") else "gloo"
        return {
            **event,
            "name": f"{library}:{_STANDS_FOR.get(args['role'], _ANY_OTHER)}",
            "cat": "user_annotation",
            "args": {
                **args,
                "stands for": f"{args['role']}, an all-to-all",
                "Input Dims": [[args.get("send_bytes_total", 0)]],
                "Input type": ["unsigned char"],
            },
        }

    return adapt

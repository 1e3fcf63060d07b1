"""The document of ``observatory reduce`` and its table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from observatory.analysis.columns import Column, Table
from observatory.analysis.reduction.metrics import ReducedRow, row_document
from observatory.run.documents.printed import printed_document

_OF_RUNS = ("run", "run_id", "model", "mixer", "data", "ranks", "ep", "shards", "gaps", "problems")

COLUMNS = (
    Column(name="run", title="run", text=True, key=True),
    Column(name="phase", title="phase", text=True, key=True),
    Column(name="model", title="model", text=True, wide=True),
    Column(name="mixer", title="mixer", text=True, wide=True),
    Column(name="data", title="data", text=True, wide=True),
    Column(name="ep", title="EP", wide=True),
    Column(name="ranks", title="ranks"),
    Column(name="shards", title="read", of="ranks", wide=True),
    Column(name="steps", title="steps"),
    Column(name="tokens", title="tokens", wide=True),
    Column(name="gini", title="Gini", digits=3, legend="of whole-run expert loads, mean over layers"),
    Column(name="entropy_bits", title="entropy", unit="bits", digits=2, wide=True),
    Column(name="idle_experts", title="idle experts", wide=True),
    Column(
        name="rank_max_over_mean",
        title="busiest rank",
        digits=2,
        legend="load over the mean, of whole-run loads, mean over layers",
    ),
    Column(name="rank_degree", title="at EP", wide=True, legend="degree of the busiest rank"),
    Column(name="ms", title="step", unit="ms", digits=2, legend="trimmed mean over steps, slowest rank"),
    Column(name="ms_p50", title="p50", unit="ms", digits=2, wide=True),
    Column(name="ms_p95", title="p95", unit="ms", digits=2),
    Column(name="exchange_ms", title="exchanges", unit="ms", digits=2, wide=True),
    Column(name="exchange_share", title="exchanges", unit="%", digits=1, legend="of the time of steps"),
    Column(name="sent_bytes", title="sent in a step", unit="MB", digits=2, scale=1e-6, wide=True),
    Column(name="mj_per_token", title="energy", unit="mJ/token", digits=2),
)


def reduction_document(rows: Sequence[ReducedRow]) -> dict[str, Any]:
    """Metrics of runs, as ``--json`` prints them (docs/json.md)."""
    documents = [row_document(row) for row in rows]
    runs = {row["run"]: {name: row[name] for name in _OF_RUNS} for row in documents}
    shown = [
        {name: value for name, value in row.items() if name not in ("gaps", "problems")} for row in documents
    ]
    return printed_document("reduction", {"runs": list(runs.values()), "rows": shown})


def reduction_tables(document: dict[str, Any]) -> list[Table]:
    """The rows of a document; runs are called by what their paths do not have in common."""
    names = _short_paths([row["run"] for row in document["rows"]])
    rows = [{**row, "run": names[row["run"]]} for row in document["rows"]]
    return [Table(name="rows", columns=COLUMNS, rows=rows)]


def _short_paths(paths: Sequence[str]) -> dict[str, str]:
    """Paths without the folders that all of them begin with."""
    parts = {path: path.split("/") for path in dict.fromkeys(paths)}
    shared = 0
    longest = min((len(names) for names in parts.values()), default=1) - 1
    while shared < longest and len({names[shared] for names in parts.values()}) == 1:
        shared += 1
    return {path: "/".join(names[shared:]) for path, names in parts.items()}

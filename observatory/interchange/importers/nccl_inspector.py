"""NCCL Inspector: JSON lines of formats v4.0 to v4.2, one for each collective.

A record states how long the kernel took and when it was written, not when it began: exchanges end here when
their record was written. Records of other collectives are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from observatory.interchange.importers.imported import UNIX_CLOCK, ImportedRun, ImportOptions, Rows
from observatory.interchange.importers.json_lines import json_lines, whole
from observatory.interchange.importers.sources import Source
from observatory.run.manifest import ModelSpec
from observatory.run.tables import EXCHANGE_SCHEMA
from observatory.text import counted, listing

_VERSIONS = ("v4.0", "v4.1", "v4.2")
_MOST_RANKS = 4096
#: Of times that the table takes.
_MOST_US = (1 << 61) // 1000


def recognises(head: bytes) -> bool:
    """Whether a file begins like one of this format."""
    return head.startswith(b"{") and b'"inspector_output_format_version"' in head


def read(sources: Sequence[Source], options: ImportOptions) -> ImportedRun:
    """All-to-alls of the ranks of one run.

    Raises:
        InterchangeError: a file is none of these, of another version, or holds no all-to-all.
    """
    rows: dict[int, list[dict[str, Any]]] = {}
    others: dict[str, int] = {}
    versions: set[str] = set()
    ranks = 1
    for source in sources:
        found = False
        for record in json_lines(source):
            header, metadata = (record.get(key) for key in ("header", "metadata"))
            if not isinstance(header, dict) or not isinstance(metadata, dict):
                raise source.refused("has a record without header or metadata")
            version = str(metadata.get("inspector_output_format_version"))[:20]
            if version not in _VERSIONS:
                raise source.refused(f"has format {version!r}", expected=listing(_VERSIONS, joined_by="or"))
            versions.add(version)
            measured = record.get("coll_perf")
            name = str(measured.get("coll", ""))[:40] if isinstance(measured, dict) else "p2p"
            if not isinstance(measured, dict) or not name.lower().startswith("alltoall"):
                others[name] = others.get(name, 0) + 1
                continue
            found = True
            rank = whole(source, header, "rank", _MOST_RANKS - 1)
            ranks = max(ranks, whole(source, header, "n_ranks", _MOST_RANKS), rank + 1)
            rows.setdefault(rank, []).append(_row(source, rank, metadata, measured, options.phase))
        if not found:
            names = listing(sorted(others), most=6) or "nothing"
            raise source.refused(f"holds no all-to-all, but {names}")
    notes = ["exchanges end when their record was written: the format does not state when they began"]
    if others:
        left = ", ".join(
            f"{counted(count, 'record')} of {name}" for name, count in sorted(others.items())[:8]
        )
        notes.append(f"left out: {left}")
    notes.append("bytes to each rank are not stated")
    return ImportedRun(
        version=", ".join(sorted(versions)),
        model=ModelSpec(name=options.model_name(sources)),
        ranks=ranks,
        rows=_rows(rows),
        clocks=dict.fromkeys(rows, UNIX_CLOCK),
        notes=notes,
    )


def _row(
    source: Source, rank: int, metadata: dict[str, Any], measured: dict[str, Any], phase: str
) -> dict[str, Any]:
    end_us = whole(source, metadata, "dump_timestamp_us", _MOST_US)
    return {
        "step": 0,
        "phase": phase,
        "source_rank": rank,
        "role": "other",
        "group": "world",
        "sequence": whole(source, measured, "coll_sn", 1 << 53),
        "backend": "nccl",
        "start_ns": 1000 * (end_us - whole(source, measured, "coll_exec_time_us", _MOST_US)),
        "end_ns": 1000 * end_us,
    }


def _rows(rows: dict[int, list[dict[str, Any]]]) -> Iterator[Rows]:
    for rank, items in sorted(rows.items()):
        schema = pa.schema([EXCHANGE_SCHEMA.field(name) for name in items[0]])
        yield Rows(table="exchange", rank=rank, batch=pa.RecordBatch.from_pylist(items, schema=schema))

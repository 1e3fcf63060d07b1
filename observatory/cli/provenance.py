"""What `observatory doctor` shows of where a program runs here, and of where the ranks of a run ran."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from observatory.analysis.columns import Column, Table

if TYPE_CHECKING:
    from observatory.run.manifest import RankStatus
    from observatory.run.provenance import SchedulerJob

_FACT_COLUMNS = (
    Column(name="name", title="what", text=True, key=True),
    Column(name="value", title="value", text=True, otherwise="not known"),
)
_NOTICE_COLUMNS = (Column(name="notice", title="notice", text=True),)


def here_document() -> dict[str, Any]:
    """Where this process runs, as a run that it makes would record it."""
    status, job = _here()
    assert status.provenance is not None
    assert status.cores is not None
    return {
        "scheduler": None if job is None else job.model_dump(mode="json"),
        "cores": status.cores.model_dump(mode="json"),
        "provenance": status.provenance.model_dump(mode="json"),
    }


def here_table() -> Table:
    """The same in short."""
    from observatory.analysis.provenance.nodes import NODE_COLUMNS, common_facts, node_rows

    status, job = _here()
    (row,) = node_rows([status])
    shown = [column for column in NODE_COLUMNS if column.name not in ("ranks", "wall_clock")]
    facts = [(column.title, column.cell(row)) for column in shown] + common_facts([status], job)
    return _fact_table("here", facts, "Here, as runs record it")


def show_run(path: Path, *, json: bool) -> None:
    """Print where the ranks of a run ran, and what differs between them."""
    from observatory.analysis.provenance.nodes import (
        NODE_COLUMNS,
        common_facts,
        common_settings,
        common_versions,
        node_rows,
        other_settings,
    )
    from observatory.analysis.provenance.notices import provenance_notices, wall_clock_ahead_ns
    from observatory.analysis.provenance.words import notice_sentence
    from observatory.cli.output import print_json, print_tables, say
    from observatory.run import open_run
    from observatory.run.documents.printed import printed_document

    manifest = open_run(path).manifest
    notices = provenance_notices(manifest)
    rows = node_rows(manifest.ranks, wall_clock_ahead_ns(manifest))
    if json:
        content = {
            "run": str(path),
            "scheduler": None if manifest.scheduler is None else manifest.scheduler.model_dump(mode="json"),
            "nodes": rows,
            "versions": common_versions(manifest.ranks),
            "settings": common_settings(manifest.ranks),
            "settings_that_differ": other_settings(manifest.ranks),
            "notices": [notice.document() for notice in notices],
        }
        print_json(printed_document("doctor", content))
        return
    if not rows:
        say(f"run {path} does not state where its ranks ran; it is of a schema before 1.5")
    sentences = [{"notice": notice_sentence(notice)} for notice in notices]
    tables = [
        Table(name="nodes", columns=NODE_COLUMNS, rows=rows, title="Where the ranks ran"),
        _fact_table("common", common_facts(manifest.ranks, manifest.scheduler), "Of all ranks"),
        Table(name="notices", columns=_NOTICE_COLUMNS, rows=sentences, title="What limits the numbers"),
    ]
    print_tables([table for table in tables if table.rows])


def _here() -> tuple[RankStatus, SchedulerJob | None]:
    """This process as a rank of a run, and its batch job."""
    from observatory.host.provenance import find_rank_provenance
    from observatory.host.scheduler import find_scheduler
    from observatory.run.manifest import RankStatus
    from observatory.run.usable_cores import find_cores

    where, cores = find_rank_provenance(), find_cores()
    status = RankStatus(rank=0, state="running", host=cores.host, cores=cores, provenance=where)
    return status, find_scheduler(os.environ)


def _fact_table(name: str, facts: list[tuple[str, str]], title: str) -> Table:
    rows = [{"name": what, "value": value} for what, value in facts]
    return Table(name=name, columns=_FACT_COLUMNS, rows=rows, title=title)

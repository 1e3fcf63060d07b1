"""Tables and sentences about campaigns."""

from __future__ import annotations

from typing import Any

from observatory.analysis.columns import Column, Table
from observatory.campaign.batch.folder import ACTIVE, PointStatus
from observatory.text import listing

_JOB_COLUMNS = (
    Column(name="about", title="point", text=True, key=True),
    Column(name="state", title="state", text=True),
    Column(name="attempts", title="tries"),
    Column(name="job", title="job", text=True),
    Column(name="exit_code", title="exit", otherwise=""),
    Column(name="scheduler_state", title="scheduler", text=True, otherwise="", wide=True),
    Column(name="waits_for", title="waits for", text=True, otherwise="", wide=True),
    Column(name="nodes", title="nodes", text=True, otherwise="", wide=True),
    Column(name="name", title="folder", text=True, wide=True),
)
_GAP_COLUMNS = (
    Column(name="about", title="missing", text=True, key=True),
    Column(name="state", title="state", text=True),
    Column(name="exit_code", title="exit", otherwise=""),
    Column(name="captured", title="captured nevertheless", text=True),
)
#: What to do about points of a status, by how they got there.
_NEXT = {
    PointStatus.FAILED: "see the lines above or the log, mend it, then submit again",
    PointStatus.OUT_OF_TIME: "give a longer time in the campaign file, or fewer steps, then submit again",
    PointStatus.TERMINATED: "submit again to run them",
    PointStatus.LOST: "their jobs ended without a word (killed, or a node died); submit again to run them",
    PointStatus.MISSING: "submit again to run them",
    PointStatus.DAMAGED: "their results are not complete; submit again to run them",
    PointStatus.STARTED: "whether they still run is not known: {silence}",
    PointStatus.UNKNOWN: "whether they are in the queue is not known: {silence}",
}

#: What lists the jobs of schedulers that are not asked.
_LISTS = {"pbs": "qstat", "lsf": "bjobs"}


def jobs_table(document: dict[str, Any]) -> Table:
    """One row for each point."""
    return Table(name="points", columns=_JOB_COLUMNS, rows=document["points"])


def jobs_sentences(document: dict[str, Any]) -> list[str]:
    """Counts, the last lines of what failed, and what to do next."""
    counts = document["counts"]
    total = len(document["points"])
    listed = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    lines = [f"{total} points: {listed}." if total else "The campaign has no points."]
    silence = _silence(document)
    for each in document["points"]:
        if each["state"] in (*_NEXT,) and each["last_lines"]:
            lines += ["", f"{each['about']} ({each['log']}):", *(f"  {line}" for line in each["last_lines"])]
    for status, advice in _NEXT.items():
        if counts.get(status.value):
            lines += ["", f"{counts[status.value]} {status.value}: {advice.format(silence=silence)}."]
    links = [job["monitor"] for job in document["jobs"] if job["active"] and job["monitor"]]
    lines += [f"Monitor: {link}" for link in links]
    if document["no_longer_part"]:
        lines.append(f"{document['no_longer_part']} points of earlier submissions are kept in the directory.")
    if counts.get(PointStatus.DONE.value):
        lines += ["", f"Next: observatory collect {document['directory']} --report report.html"]
    return lines


def _silence(document: dict[str, Any]) -> str:
    """Why no scheduler states what waits and runs."""
    other = _LISTS.get(document["scheduler"])
    if other is not None:
        return f"{document['scheduler']} is not asked, {other} lists them"
    return str(document["problem"])


def gap_sentence(gap: dict[str, Any]) -> str:
    """Why a point is not in the report, and where what it captured is."""
    code = "" if gap["exit_code"] is None else f", exit code {gap['exit_code']}"
    kept = f"; what it captured is in {listing(gap['captured'])}" if gap["captured"] else ""
    return f"{gap['state']}{code}{kept}"


def collection_table(document: dict[str, Any]) -> Table:
    """One row for each gap."""
    return Table(name="gaps", columns=_GAP_COLUMNS, rows=document["gaps"])


def collection_sentences(document: dict[str, Any]) -> list[str]:
    """What was joined, and what is missing."""
    counts = document["counts"]
    total, done = sum(counts.values()), counts.get(PointStatus.DONE.value, 0)
    active = sum(counts.get(status.value, 0) for status in ACTIVE)
    lines = [f"{done} of {total} points are done" + (f", {active} wait or run." if active else ".")]
    lines += [f"Note: {note.rstrip('.')}." for note in document["notes"]]
    return lines

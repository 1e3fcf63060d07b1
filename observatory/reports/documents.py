"""What a report is made of, as documents that programs read back: in the page, or as a file of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from observatory.reports.frames.report import ReportFrames, RunFacts
from observatory.reports.sections import Number, Verdict, findings
from observatory.run.documents.printed import printed_document
from observatory.run.documents.writing import frame_records

#: Digits that numbers of a page's documents keep: far below any interval, and a third of the size.
_DIGITS = 7


def report_documents(
    frames: ReportFrames, *, title: str, answer: str, numbers: Sequence[Number], verdicts: Sequence[Verdict]
) -> list[dict[str, Any]]:
    """A document of the whole, then those of each run (docs/json.md)."""
    whole = {
        "title": title,
        "answer": answer,
        "numbers": [{"value": each.value, "meaning": each.meaning} for each in numbers],
        "verdicts": [
            {
                "part": each.part,
                "whose": each.whose,
                "stake": each.stake,
                "sentences": list(each.sentences),
                "next_step": each.next_step,
            }
            for each in verdicts
        ],
        "findings": [
            {"section": each.section, "stake": each.stake, "text": each.text} for each in findings(frames)
        ],
        "run_ids": [fact.manifest.run_id for fact in frames.facts],
    }
    documents = [printed_document("report", whole)]
    documents += [document for fact in frames.facts for document in _of_run(frames, fact)]
    return [_shortened(document) for document in documents]


def _of_run(frames: ReportFrames, fact: RunFacts) -> Iterator[dict[str, Any]]:
    """Documents of one run, of what it holds."""
    layers = _rows(frames.layers, fact)
    if layers:
        yield _document("routing", fact, layers=layers)
    if fact.run in frames.times:
        yield _document("times", fact, **frames.times[fact.run])
    exchanges = frames.exchanges
    if exchanges is not None:
        parts = {
            name: _rows(getattr(exchanges, name), fact) for name in ("layers", "ranks", "phases", "unknown")
        }
        if any(parts.values()):
            yield _document("exchanges", fact, **parts)
    power = frames.power
    if power is not None and fact.run in power.runs:
        parts = {
            name: _rows(getattr(power, name), fact) for name in ("devices", "phases", "tokens", "totals")
        }
        yield _document("energy", fact, **parts)


def _document(kind: str, fact: RunFacts, **tables: Any) -> dict[str, Any]:
    data = fact.manifest.data
    about = {
        "run_id": fact.manifest.run_id,
        "model": fact.manifest.model.name,
        "data": data.condition if data else None,
    }
    return printed_document(kind, {**about, "problems": list(fact.problems), **tables})


def _rows(frame: pd.DataFrame, fact: RunFacts) -> list[dict[str, Any]]:
    if "run" not in frame:
        return []
    return frame_records(frame[frame["run"] == fact.run].drop(columns="run"))


def _shortened(value: Any) -> Any:
    """The same with shorter numbers."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, Mapping):
        return {name: _shortened(each) for name, each in value.items()}
    return [_shortened(each) for each in value] if isinstance(value, list | tuple) else value

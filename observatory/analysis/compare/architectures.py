"""Models next to each other: what their mixers go with, on the same data conditions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from observatory.analysis.columns import Column, Table
from observatory.analysis.compare.metrics import Key
from observatory.analysis.compare.subject import Subject
from observatory.analysis.routing.bands import ConditionGini, band_words, classify
from observatory.analysis.routing.summary import run_summary
from observatory.run import Run
from observatory.run.documents.writing import frame_records

#: Means over conditions, besides those of routing.
_MEANS = ("activated_experts", "ms", "tokens_per_s", "exchange_ms", "wait_ms", "mj_per_token", "power_w")

ARCHITECTURE_COLUMNS = (
    Column(name="model", title="model", text=True, key=True),
    Column(name="mixer", title="mixer", text=True, otherwise="not recognised"),
    Column(
        name="gini",
        title="Gini",
        digits=3,
        interval=("gini_least", "gini_most"),
        legend="mean over conditions, least and most",
    ),
    Column(name="band", title="band", text=True, otherwise="no band"),
    Column(name="rank_max_over_mean", title="busiest rank / mean", digits=2),
    Column(name="activated_experts", title="activated", digits=1, of="experts", legend="experts of a step"),
    Column(name="ms", title="step", unit="ms"),
    Column(name="tokens_per_s", title="tokens/s", wide=True),
    Column(name="exchange_ms", title="exchange", unit="ms"),
    Column(name="mj_per_token", title="energy", unit="mJ/token"),
    Column(name="conditions", title="conditions", wide=True),
)


def architecture_rows(measured: Iterable[tuple[Run, Subject]]) -> list[dict[str, Any]]:
    """A row per model and phase, from its runs on real text; from all where none is real.

    Returns:
        ``model``, ``mixer``, ``phase``, ``conditions`` (names), ``experts``, ``ep``; means over conditions:
        ``gini`` with ``gini_least`` and ``gini_most``, ``rank_max_over_mean``, ``activated_experts``, ``ms``,
        ``tokens_per_s``, ``exchange_ms``, ``wait_ms``, ``mj_per_token``, ``power_w`` (None: not known);
        ``ginis`` (``condition`` and ``gini`` of each), ``band`` and ``band_reason`` (docs/metrics.md).
    """
    by_model: dict[str, list[tuple[Run, Subject]]] = {}
    for run, subject in measured:
        by_model.setdefault(subject.model or "?", []).append((run, subject))
    rows = []
    for model, runs in by_model.items():
        real = [(run, subject) for run, subject in runs if run.manifest.data and run.manifest.data.real]
        chosen = real or runs
        summaries = [{row["phase"]: row for row in frame_records(run_summary(run))} for run, _ in chosen]
        phases = dict.fromkeys(phase for summary in summaries for phase in summary)
        subjects = [subject for _, subject in chosen]
        rows += [_row(model, phase, subjects, summaries) for phase in phases]
    return sorted(rows, key=lambda row: row["phase"])


def _row(
    model: str, phase: str, subjects: Sequence[Subject], summaries: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    texts = {}
    ginis: list[dict[str, Any]] = []
    for number, (subject, summary) in enumerate(zip(subjects, summaries, strict=True)):
        if phase in summary:
            gini, floor, limit = (summary[phase][f"gini{end}"] for end in ("", "_floor", "_uniform_limit"))
            condition = subject.condition or str(number)
            ginis.append({"condition": condition, "gini": gini})
            texts[condition] = ConditionGini(gini=gini, floor=floor, uniform_limit=limit)
    band = classify(texts)
    defined = [item["gini"] for item in ginis if item["gini"] is not None]
    degrees = sorted({key.ep for subject in subjects for key in subject.series if key.ep is not None})
    ep = degrees[0] if degrees else None
    first = subjects[0]
    return {
        "model": model,
        "mixer": first.mixer,
        "phase": phase,
        "conditions": sorted(texts),
        "experts": max(first.experts_L, default=None),
        "ep": ep,
        "gini": fmean(defined) if defined else None,
        "gini_least": min(defined, default=None),
        "gini_most": max(defined, default=None),
        "ginis": ginis,
        "band": band.name,
        "band_reason": band_words(band.reason),
        "rank_max_over_mean": _mean(subjects, Key("rank_max_over_mean", phase, None, ep)),
        **{name: _mean(subjects, Key(name, phase)) for name in _MEANS},
    }


def _mean(subjects: Sequence[Subject], key: Key) -> float | None:
    values = [subject.series[key].value for subject in subjects if key in subject.series]
    return fmean(values) if values else None


def architecture_tables(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """One table per phase, without the columns that no model has."""
    tables = []
    for phase in dict.fromkeys(row["phase"] for row in rows):
        of_phase = [row for row in rows if row["phase"] == phase]
        columns = tuple(
            column
            for column in ARCHITECTURE_COLUMNS
            if column.key or any(row[column.name] is not None for row in of_phase)
        )
        ep = of_phase[0]["ep"]
        title = f"{phase}: models next to each other{'' if ep is None else f', busiest rank at EP {ep}'}"
        tables.append(Table(name="models", columns=columns, rows=of_phase, title=title))
    return tables


def missing_sentences(rows: Sequence[Mapping[str, Any]], premises: Sequence[object]) -> list[str]:
    """What is not known of any model of a grid, and how it becomes known."""
    if not rows:
        return []
    lacking = [text for name, text in _MISSING.items() if all(row[name] is None for row in rows)]
    return lacking if premises else [*lacking, _NO_PREMISES]


_MISSING = {
    "exchange_ms": "No times of exchanges: every run has one rank; profile each model with --ep 4.",
    "mj_per_token": "No energy: no run has power samples; profile with --power on.",
}


_NO_PREMISES = (
    "Premises of changes are not judged: write them with observatory advise RUN... --out advice.json, and "
    "give --advice advice.json."
)


def premise_tables(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """A table per phase of whether the premises of changes hold, a column for each model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    columns = (
        Column(name="change", title="change", text=True, key=True),
        *(Column(name=f"of_{number}", title=model, text=True) for number, model in enumerate(models)),
    )
    words = {True: "holds", False: "does not", None: "not known"}
    tables = []
    for phase in dict.fromkeys(row["phase"] for row in rows):
        held = {(row["change"], row["model"]): row["holds"] for row in rows if row["phase"] == phase}
        shown = [
            {"change": change}
            | {f"of_{number}": words[held.get((change, model))] for number, model in enumerate(models)}
            for change in dict.fromkeys(change for change, _ in held)
        ]
        title = f"{phase}: whether the premises of changes hold"
        tables.append(Table(name="premises", columns=columns, rows=shown, title=title))
    return tables

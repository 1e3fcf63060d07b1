"""What was run, and what is missing from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime

from observatory.analysis.provenance.notices import provenance_notices
from observatory.analysis.provenance.words import notice_sentence
from observatory.reports.frames.report import NOT_STATED, ReportFrames, condition_order, phases_of
from observatory.reports.sections.common import model_on, spread
from observatory.reports.text import count, plain, shorten
from observatory.run.manifest import CoreSpec
from observatory.run.usable_cores import core_sentence, short_of_cores
from observatory.text import listing


def when(unix_s: float | None) -> str:
    """A wall-clock label in UTC, or ``n/a`` when it is not a date."""
    try:
        return "n/a" if unix_s is None else datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, ValueError, OSError):
        return "n/a"


def overview(frames: ReportFrames) -> list[tuple[str, str]]:
    """(name, value) pairs for the head of the page."""
    runs, cells = frames.runs, frames.cells
    models = list(dict.fromkeys(shorten(fact.manifest.model.name) for fact in frames.facts))
    stamps = sorted(fact.manifest.created_unix_s for fact in frames.facts)
    pairs = [
        (_plural("Model", len(models)), listing(models, most=6)),
        (
            _plural("Data condition", runs["condition"].nunique()),
            listing([shorten(condition) for condition in condition_order(runs)], most=8),
        ),
        ("Phases", listing(phases_of(cells)) if len(cells) else "none captured"),
        (
            "Runs",
            f"{len(frames.facts)}, {spread(runs['ranks'])} {_plural('rank', int(runs['ranks'].max()))} each",
        ),
    ]
    if len(cells):
        top_k = frames.layers["top_k"]
        tokens = [
            f"{spread(cells.loc[cells['phase'] == phase, 'tokens'])} in {phase}" for phase in phases_of(cells)
        ]
        pairs += [
            ("Window", f"{spread(cells['steps'])} steps; tokens per layer: {listing(tokens)}"),
            (
                "MoE layers",
                f"{spread(cells['layers'])} per model, {spread(frames.layers['experts'])} experts, "
                f"top-{spread(top_k) if top_k.notna().any() else 'k not stated'}",
            ),
            ("Assignments", count(float(frames.layers["assignments"].sum()))),
        ]
    imported = all("import" in fact.manifest.config for fact in frames.facts)
    pairs.append(("Imported" if imported else "Captured", _period(stamps[0], stamps[-1])))
    return pairs


def setting(frames: ReportFrames) -> list[str]:
    """What was run and on what, a sentence each; last, where ranks had no core of their own."""
    facts, cells = frames.facts, frames.cells
    models = list(dict.fromkeys(shorten(fact.manifest.model.name) for fact in facts))
    ranks = frames.runs["ranks"]
    steps = f", {spread(cells['steps'])} steps of {listing(phases_of(cells))}" if len(cells) else ""
    stated = [shorten(name, 24) for name in condition_order(frames.runs) if name != NOT_STATED]
    conditions = f" on {listing(stated, most=6)}" if stated else ""
    hosts = list(
        dict.fromkeys(
            f"{shorten(host.name, 32)}{f' ({shorten(host.cpu)})' if host.cpu else ''}"
            for fact in facts
            for host in fact.manifest.hosts
        )
    )
    devices = dict.fromkeys(
        (shorten(device.name or device.kind), device.uuid)
        for fact in facts
        for device in fact.manifest.devices
    )
    each = [f"{number} × {name}" for name, number in Counter(name for name, _ in devices).items()]
    lines = [
        f"{listing(models)}{conditions}: {len(facts)} {_plural('run', len(facts))} of "
        f"{spread(ranks)} {_plural('rank', int(ranks.max()))}{steps}",
        f"On {listing(hosts) if hosts else 'a machine that is not recorded'}"
        f"{f', {listing(each)}' if each else ', no GPU recorded'}",
        _cores(frames),
    ]
    return [f"{line}." for line in lines if line]


def _cores(frames: ReportFrames) -> str:
    """Where ranks had no core of their own, and in what; empty where all had one, or nothing is recorded."""
    recorded: list[tuple[str, Iterable[CoreSpec | None]]] = [
        (model_on(label, fact.condition), [rank.cores for rank in fact.manifest.ranks])
        for fact, label in zip(frames.facts, frames.runs["label"], strict=True)
    ]
    if frames.benchmarks is not None:
        files = frames.benchmarks.files
        recorded += [
            (shorten(file.name), file.document.cores_P or ()) for file in (*files.bench, *files.replays)
        ]
    short = [(name, share) for name, cores_P in recorded for share in short_of_cores(cores_P)]
    if frames.benchmarks is not None:
        models = frames.benchmarks.files.networks
        short += [(shorten(file.name), share) for file in models for share in file.document.short_of_cores]
    where: dict[str, list[str]] = {}
    for name, share in short:
        where.setdefault(plain(core_sentence(share)), []).append(name)
    return ". ".join(
        f"{sentence} ({listing(list(dict.fromkeys(names)), most=4)})" for sentence, names in where.items()
    )


def _period(first_unix_s: float, last_unix_s: float) -> str:
    """Both ends, a common day or time once."""
    first, last = when(first_unix_s), when(last_unix_s)
    if first == last:
        return first
    same_day = first[:10] == last[:10]
    return f"{first.removesuffix(' UTC')} to {last[11:] if same_day else last}"


def problems(frames: ReportFrames) -> list[tuple[str, list[str]]]:
    """(runs, what is wrong with them), runs of equal gaps together, missing ones first, then files.

    Of a run the reader's words come first.
    """
    stated: dict[tuple[str, ...], list[str]] = {}
    for fact, label in zip(frames.facts, frames.runs["label"], strict=True):
        notices = map(notice_sentence, provenance_notices(fact.manifest))
        lines = [plain(line) for line in (*fact.problems, *notices, *fact.manifest.notes, *fact.gaps)]
        lines += _unfinished(fact.manifest.state, fact.problems)
        if lines:
            name = model_on(label, fact.condition)
            stated.setdefault(tuple(dict.fromkeys(lines)), []).append(name)
    for run, line in frames.power.gaps if frames.power else ():
        whose = f"Power of {model_on(frames.runs.loc[run, 'label'], frames.facts[run].condition)}"
        stated.setdefault((plain(line),), []).append(whose)
    absent: dict[str, list[str]] = {}
    for what, why in frames.missing:
        absent.setdefault(plain(why), []).append(shorten(what))
    of_files: dict[str, list[str]] = {}
    of_benchmarks = frames.benchmarks.gaps if frames.benchmarks else ()
    for name, line in (*of_benchmarks, *(frames.clocks.gaps if frames.clocks else ())):
        of_files.setdefault(shorten(name), []).append(plain(line))
    gaps = [(f"Missing: {listing(names, most=12)}", [why]) for why, names in absent.items()]
    gaps += [(listing(names), list(lines)) for lines, names in stated.items()]
    return gaps + list(of_files.items())


def _unfinished(state: str, notes: tuple[str, ...]) -> list[str]:
    """The run's own state, where the reader has not already said something."""
    if state == "complete" or notes:
        return []
    return ["the run failed before its end" if state == "failed" else "the run was never closed"]


def _plural(word: str, number: int) -> str:
    return word if number == 1 else f"{word}s"

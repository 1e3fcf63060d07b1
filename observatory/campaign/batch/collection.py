"""Collecting a campaign: finished points joined, gaps stated, one report; also while jobs still run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from observatory.campaign.batch.folder import CampaignFolder, PointStatus
from observatory.campaign.batch.state import CampaignState, PointState, active_jobs, campaign_state
from observatory.campaign.batch.summary import condition_rows
from observatory.campaign.batch.words import gap_sentence
from observatory.campaign.reduction import reduce_runs
from observatory.errors import BatchError, ObservatoryError
from observatory.run import Run, open_run
from observatory.run.documents.printed import printed_document
from observatory.run.documents.writing import write_json, write_text

#: Points whose runs a report shows: each takes some 50 kB of it, and a second or two.
_MOST_REPORTED = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What was collected.

    Attributes:
        state: where the campaign stands.
        network: network model that was fitted to the fabric's benchmark; None without one.
        report: the report; None where none was asked for, or there is nothing to report on.
        notes: what could not be done, a sentence each.
        conditions: rows of `summary.condition_rows`.
    """

    state: CampaignState
    network: Path | None
    report: Path | None
    notes: tuple[str, ...]
    conditions: tuple[dict[str, Any], ...]


def collect(folder: CampaignFolder, *, report: Path | None) -> Collected:
    """Join what is finished.

    Args:
        folder: the campaign's directory.
        report: report to write, in the place of an earlier one; None for none.

    Raises:
        BatchError: the directory holds no campaign.
        RunError: the report cannot be written; the summary is.
    """
    state = campaign_state(folder)
    notes: list[str] = []
    network = None
    benches = [
        each.attempts[-1].out / "bench.json"
        for each in state.of(PointStatus.DONE)
        if each.point.kind == "fabric"
    ]
    for bench in benches:
        try:
            network = _fit(folder, bench)
        except ObservatoryError as error:
            notes.append(f"the network cannot be fitted: {error.what}")
    runs = state.runs
    about = {each.point.name: each.point.about for each in state.points}
    rows_of = {name: reduce_runs(paths) for name, paths in runs.items()}
    for name, rows in rows_of.items():
        problems = dict.fromkeys(problem for row in rows for problem in row.problems)
        notes += [f"{about[name]}: {problem}" for problem in problems]
    conditions = condition_rows([each.point for each in state.points], rows_of)
    collected = Collected(
        state=state, network=network, report=None, notes=tuple(notes), conditions=tuple(conditions)
    )
    _write_summary(collected)  # whatever becomes of the report
    if report is None:
        return collected
    try:
        collected = _with_report(collected, report, benches)
    except ObservatoryError as error:
        notes.append(f"the report could not be written: {error.what}")
        _write_summary(replace(collected, notes=tuple(notes)))
        raise
    _write_summary(collected)
    return collected


def _write_summary(collected: Collected) -> None:
    write_json(collected.state.folder.path / "summary.json", collection_document(collected))


def _with_report(collected: Collected, report: Path, benches: Sequence[Path]) -> Collected:
    """Write the report, of the first repeats where there are more runs than it takes."""
    from observatory.reports import write_report

    state = collected.state
    about = {each.point.name: each.point.about for each in state.points}
    repeat = {each.point.name: each.point.repeat or 0 for each in state.points}
    runs = state.runs
    shown = set(sorted(runs, key=lambda name: repeat[name])[:_MOST_REPORTED])
    opened, unreadable = _opened({name: paths for name, paths in runs.items() if name in shown})
    if not opened:
        no_run = "no run is finished, so there is no report yet"
        return replace(collected, notes=(*collected.notes, no_run))
    missing = [(about[name], f"it cannot be read: {why}") for name, why in unreadable]
    missing += [(each["about"], gap_sentence(each)) for each in _gaps(state)]
    left_out = len(runs) - len(shown)
    if left_out:
        missing.append(
            (f"{left_out} of {len(runs)} points", "are in summary.json alone: a report takes no more")
        )
    written = write_report(
        opened,
        report,
        title=f"Campaign {state.saved.name}",
        gpus_per_node=state.saved.site.node.tasks,
        bench=benches,
        networks=[] if collected.network is None else [collected.network],
        missing=missing,
        overwrite=True,
    )
    return replace(collected, report=written)


def _opened(runs: Mapping[str, Sequence[Path]]) -> tuple[list[Run], list[tuple[str, str]]]:
    """The runs that can be opened; of each other one its point, and why not."""
    opened, unreadable = [], []
    for name, path in ((name, path) for name, paths in runs.items() for path in paths):
        try:
            opened.append(open_run(path))
        except ObservatoryError as error:
            unreadable.append((name, error.what))
    return opened, unreadable


def collection_document(collected: Collected) -> dict[str, Any]:
    """The summary for ``--json`` and for the campaign's directory."""
    state = collected.state
    return printed_document(
        "collection",
        {
            "campaign": state.saved.name,
            "directory": str(state.folder.path),
            "counts": {status.value: count for status, count in state.counts.items()},
            "runs": [
                str(run.relative_to(state.folder.path)) for paths in state.runs.values() for run in paths
            ],
            "network": None if collected.network is None else collected.network.name,
            "report": None if collected.report is None else str(collected.report),
            "conditions": list(collected.conditions),
            "gaps": _gaps(state),
            "notes": list(collected.notes),
        },
    )


def _gaps(state: CampaignState) -> list[dict[str, Any]]:
    """What is missing, in the order of the points."""
    return [_gap(each, state.folder.path) for each in state.points if each.status is not PointStatus.DONE]


def _gap(each: PointState, folder: Path) -> dict[str, Any]:
    """A point that is missing, and what of it was captured nevertheless."""
    kept = [attempt.out / "run" for attempt in each.attempts if (attempt.out / "run" / "run.json").is_file()]
    return {
        "name": each.point.name,
        "about": each.point.about,
        "state": each.status.value,
        "exit_code": each.exit_code,
        "captured": [str(path.relative_to(folder)) for path in kept],
    }


def _fit(folder: CampaignFolder, bench: Path) -> Path:
    from observatory.analysis.network.fitting import fit_network
    from observatory.host.provenance import command_line
    from observatory.run.documents.bench import load_bench

    model = fit_network([load_bench(bench)], sources=[bench.name], argv=command_line(), bootstrap=100, seed=0)
    out = folder.path / "network.json"
    write_text(out, model.model_dump_json(indent=1))
    return out


def cancel_campaign(folder: CampaignFolder) -> tuple[list[str], CampaignState]:
    """Cancel what waits or runs; what was captured stays.

    Returns:
        Ids of the jobs that were cancelled, and the state before.

    Raises:
        BatchError: the directory holds no campaign, or the scheduler does not answer.
    """
    from observatory.hpc import slurm

    state = campaign_state(folder)
    if state.saved.site.scheduler != "slurm":
        raise BatchError(
            f"jobs of {state.saved.site.scheduler} were submitted by hand",
            remedy="cancel them with the scheduler's own command",
        )
    if state.is_unanswered:
        raise BatchError(
            f"what runs is not known: {state.queue.problem}", remedy="run it again when the scheduler answers"
        )
    active = active_jobs(state.queue)
    if active:
        slurm.cancel(active)
    return active, state

"""What runs and benchmark files say about exchanges, one computed sentence each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pandas as pd

from observatory.analysis.exchange import EXCHANGE_SPANS
from observatory.analysis.exchange.words import cause_words
from observatory.analysis.network.checking import errors_of
from observatory.analysis.network.words import verdict_sentence
from observatory.reports.frames.exchanges import ExchangeFrames
from observatory.reports.frames.report import ReportFrames, each_group, each_row
from observatory.reports.sections.common import Finding, phases_in, run_keys
from observatory.reports.sections.realism import pooled, realism_verdict
from observatory.reports.text import interval, microseconds, percent, plain, shorten, times
from observatory.run.manifest import CoreSpec
from observatory.run.usable_cores import short_of_cores

#: Sentences of one kind; the tables hold the rest.
_MOST = 4


def exchange_findings(frames: ReportFrames) -> list[Finding]:
    """Where the time of the widest run goes, what realism costs, how well the model predicts."""
    stated: list[Finding] = []
    if frames.exchanges is not None:
        stated += list(_time(frames, frames.exchanges))[:_MOST]
    if frames.benchmarks is not None:
        for make in (_verdicts, _realism, _prediction):
            stated += list(make(frames))[:_MOST]
    return stated


def _name(frames: ReportFrames, run: int) -> str:
    return shorten(frames.runs.loc[run, "label"], 48)


def _time(frames: ReportFrames, exchanges: ExchangeFrames) -> Iterator[Finding]:
    """Per phase: the run with most ranks, its time in exchanges, and whom its ranks wait for."""
    for phase in phases_in(exchanges.phases):
        of_phase = exchanges.phases[(exchanges.phases["phase"] == phase)].merge(
            frames.runs[["run", "ranks"]], on="run"
        )
        if of_phase.empty or int(of_phase["ranks"].max()) < 2:
            continue
        run = int(of_phase.sort_values("ranks", ascending=False, kind="stable")["run"].iloc[0])
        of_phase = of_phase[of_phase["run"] == run]
        whole = float(of_phase["mean_s"].sum())
        meeting = float(of_phase.loc[of_phase["name"].isin(EXCHANGE_SPANS), "mean_s"].sum())
        if not meeting > 0:
            continue
        sentence = (
            f"In {phase}, {_name(frames, run)} spends {percent(meeting / whole)} of its MoE layers' time in "
            "exchanges"
        )
        waiting = float(of_phase["wait_s"].sum()) / whole if of_phase["wait_s"].notna().all() else None
        if waiting is not None:
            sentence += f", {percent(waiting)} waiting for each other"
        crowded = _crowded(rank.cores for rank in frames.facts[run].manifest.ranks)
        text = f"{sentence}.{_slowest(exchanges.ranks, run, phase)}{crowded}"
        yield Finding(
            section="anatomy",
            text=text,
            stake=None if crowded else waiting,
            keys=_keys(frames, run, phase),
        )


def _keys(frames: ReportFrames, run: int, phase: str = "") -> dict[str, str]:
    return run_keys(str(frames.runs.loc[run, "label"]), frames.facts[run].condition, phase)


def _crowded(cores_P: Iterable[CoreSpec | None]) -> str:
    """A warning where ranks shared processor cores; empty where each had one."""
    if not short_of_cores(cores_P):
        return ""
    return (
        " Its ranks shared processor cores, so these times are not those of a machine with a core for each."
    )


def _slowest(ranks: pd.DataFrame, run: int, phase: str) -> str:
    if ranks.empty:
        return ""
    of_run = ranks[(ranks["run"] == run) & (ranks["phase"] == phase)]
    whole = float(of_run["caused_wait_s"].sum()) if len(of_run) else 0.0
    if not whole > 0:
        return ""
    row = next(each_row(of_run.sort_values("caused_wait_s", ascending=False)))
    return (
        f" They wait longest for rank {row.source_rank}: {percent(row.caused_wait_s / whole)} of all waiting "
        f"({cause_words(row.cause)})."
    )


def _realism(frames: ReportFrames) -> Iterator[Finding]:
    benchmarks = frames.benchmarks
    assert benchmarks is not None
    for (replay, run, algorithm), rows in each_group(benchmarks.realism, ["replay", "run", "algorithm"]):
        result = benchmarks.files.replays[int(replay)].document
        crowded = _crowded(result.cores_P or ())
        for phase in phases_in(rows):
            row = pooled(rows, phase)
            text = (
                f"Replayed over {result.ranks} ranks ({shorten(result.backend, 16)}, "
                f"{shorten(algorithm, 24)}), the {shorten(phase, 24)} traffic of {_name(frames, int(run))} "
                f"takes {times(row.ratio)} ({interval(row.ratio_low, row.ratio_high, 2)}) the time of "
                f"uniform traffic of equal volume, {microseconds(row.extra_us, signed=True)} "
                f"per exchange: {realism_verdict(row)}.{crowded}"
            )
            beyond = row.ratio_low is not None and row.ratio_low > 1 and not crowded
            yield Finding(
                section="realism",
                text=text,
                stake=1 - 1 / row.ratio if beyond else None,
                keys=_keys(frames, int(run), phase),
            )


def _verdicts(frames: ReportFrames) -> Iterator[Finding]:
    """Models that are not to be relied on."""
    benchmarks = frames.benchmarks
    assert benchmarks is not None
    for network in benchmarks.files.networks:
        for fit in network.document.fits:
            if fit.verdict is not None and fit.verdict.code != "valid":
                sentence = plain(verdict_sentence(fit, shorten(network.document.backend, 16)))
                text = f"Network model {shorten(network.name, 32)}, {sentence}."
                yield Finding(section="prediction", text=text)


def _prediction(frames: ReportFrames) -> Iterator[Finding]:
    benchmarks = frames.benchmarks
    assert benchmarks is not None
    shown = benchmarks.checked[benchmarks.checked["pattern"].isin(["captured", "own"])]
    keys = ["network", "replay", "run", "algorithm", "pattern"]
    for (network, _, run, algorithm, pattern), rows in each_group(shown, keys):
        parts = []
        for phase in phases_in(rows):
            errors = errors_of(rows[rows["phase"] == phase])
            parts.append(
                f"{shorten(phase, 24)} {percent(errors['median_error'])} (90th percentile "
                f"{percent(errors['p90_error'])})"
            )
        what = "replayed exchanges" if pattern == "captured" else "own exchanges"
        text = (
            f"Median error of the network model {shorten(benchmarks.files.networks[int(network)].name, 32)} "
            f"on the {what} of {_name(frames, int(run))}, {shorten(algorithm, 24)}: {', '.join(parts)}."
        )
        yield Finding(section="prediction", text=text, keys=_keys(frames, int(run)))

"""What runs and benchmark files say about exchanges, one computed sentence each."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from observatory.analysis.exchange import EXCHANGE_SPANS
from observatory.analysis.network.checking import errors_of
from observatory.analysis.network.words import verdict_sentence
from observatory.reports.frames.exchanges import ExchangeFrames
from observatory.reports.frames.report import ReportFrames, each_group, each_row
from observatory.reports.sections.common import phases_in
from observatory.reports.sections.realism import pooled, realism_verdict
from observatory.reports.text import interval, microseconds, percent, plain, shorten, times

#: Sentences of one kind; the tables hold the rest.
_MOST = 4


def exchange_findings(frames: ReportFrames) -> list[str]:
    """Where the time of the widest run goes, what realism costs, how well the model predicts."""
    sentences: list[str] = []
    if frames.exchanges is not None:
        sentences += list(_time(frames, frames.exchanges))[:_MOST]
    if frames.benchmarks is not None:
        sentences += list(_verdicts(frames))[:_MOST]
        sentences += list(_realism(frames))[:_MOST] + list(_prediction(frames))[:_MOST]
    return sentences


def _name(frames: ReportFrames, run: int) -> str:
    return shorten(frames.runs.loc[run, "label"], 48)


def _time(frames: ReportFrames, found: ExchangeFrames) -> Iterator[str]:
    """Per phase: the run with most ranks, its time in exchanges, and whom its ranks wait for."""
    for phase in phases_in(found.phases):
        own = found.phases[(found.phases["phase"] == phase)].merge(frames.runs[["run", "ranks"]], on="run")
        if own.empty or int(own["ranks"].max()) < 2:
            continue
        run = int(own.sort_values("ranks", ascending=False, kind="stable")["run"].iloc[0])
        own = own[own["run"] == run]
        whole = float(own["mean_s"].sum())
        meeting = float(own.loc[own["name"].isin(EXCHANGE_SPANS), "mean_s"].sum())
        if not meeting > 0:
            continue
        sentence = (
            f"In {phase}, {_name(frames, run)} spends {percent(meeting / whole)} of its MoE layers' time in "
            "phases in which ranks meet"
        )
        if own["wait_s"].notna().all():
            sentence += f", {percent(float(own['wait_s'].sum()) / whole)} waiting for each other"
        yield f"{sentence}.{_slowest(found.ranks, run, phase)}"


def _slowest(ranks: pd.DataFrame, run: int, phase: str) -> str:
    if ranks.empty:
        return ""
    own = ranks[(ranks["run"] == run) & (ranks["phase"] == phase)]
    whole = float(own["caused_wait_s"].sum()) if len(own) else 0.0
    if not whole > 0:
        return ""
    row = next(each_row(own.sort_values("caused_wait_s", ascending=False)))
    return (
        f" They wait longest for rank {row.source_rank}: {percent(row.caused_wait_s / whole)} of all waiting "
        f"(cause: {plain(row.cause or 'unknown')})."
    )


def _realism(frames: ReportFrames) -> Iterator[str]:
    found = frames.benchmarks
    assert found is not None
    for (replay, run, algorithm), own in each_group(found.realism, ["replay", "run", "algorithm"]):
        result = found.files.replays[int(replay)].document
        for phase in phases_in(own):
            row = pooled(own, phase)
            yield (
                f"Replayed over {result.ranks} ranks ({shorten(result.backend, 16)}, "
                f"{shorten(algorithm, 24)}), the {shorten(phase, 24)} traffic of {_name(frames, int(run))} "
                f"takes {times(row.ratio)} ({interval(row.ratio_low, row.ratio_high, 2)}) the time of "
                f"uniform traffic of equal volume, {microseconds(row.extra_us, signed=True)} "
                f"per exchange: {realism_verdict(row)}."
            )


def _verdicts(frames: ReportFrames) -> Iterator[str]:
    """Models that are not to be relied on."""
    found = frames.benchmarks
    assert found is not None
    for network in found.files.networks:
        for fit in network.document.fits:
            if fit.verdict is not None and fit.verdict.code != "valid":
                sentence = plain(verdict_sentence(fit, shorten(network.document.backend, 16)))
                yield f"Network model {shorten(network.name, 32)}, {sentence}."


def _prediction(frames: ReportFrames) -> Iterator[str]:
    found = frames.benchmarks
    assert found is not None
    shown = found.checked[found.checked["pattern"].isin(["captured", "own"])]
    keys = ["network", "replay", "run", "algorithm", "pattern"]
    for (network, _, run, algorithm, pattern), own in each_group(shown, keys):
        parts = []
        for phase in phases_in(own):
            errors = errors_of(own[own["phase"] == phase])
            parts.append(
                f"{shorten(phase, 24)} {percent(errors['median_error'])} (90th percentile "
                f"{percent(errors['p90_error'])})"
            )
        what = "replayed exchanges" if pattern == "captured" else "own exchanges"
        yield (
            f"Median error of the network model {shorten(found.files.networks[int(network)].name, 32)} on "
            f"the {what} of {_name(frames, int(run))}, {shorten(algorithm, 24)}: {', '.join(parts)}."
        )

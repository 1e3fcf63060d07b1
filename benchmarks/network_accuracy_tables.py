"""Tables of predicted against measured exchanges, in markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from observatory.analysis.exchange import run_waits
from observatory.analysis.network import NetworkModel, predict_us
from observatory.analysis.network.checking import check_predictions
from observatory.run import Run
from observatory.run.documents.bench import BenchResult


def fit_lines(model: NetworkModel) -> list[str]:
    """The chosen form, its coefficients, and what it got wrong on numbers of ranks left out of its fit."""
    fit = model.of("flat")
    known = ", ".join(
        f"{item.term} {item.us_per_unit:.4g}" for item in fit.coefficients if item.us_per_unit is not None
    )
    held_out = ", ".join(
        f"EP {item.ranks} {item.median_error:.1%} (predicted / measured {item.median_ratio:.2f})"
        for item in fit.held_out_ranks
    )
    return [
        f"Form {fit.form}, {fit.cases} matrices; microseconds per unit: {known}.",
        f"Held out in the fit, median error: {held_out}.",
    ]


def replay_lines(
    model: NetworkModel,
    replays: Mapping[tuple[int, str], Sequence[BenchResult]],
    *,
    fitted_to: str,
    only_all: bool = False,
) -> list[str]:
    """One row per EP degree and phase, and one of all: errors against the first replay, and the noise.

    Args:
        model: the fit.
        replays: first and second replay by EP degree and phase.
        fitted_to: for the table.
        only_all: only the rows of a whole EP degree.
    """
    lines = [
        "| fitted to | EP | phase | matrices | measured | median error | p90 | bias | in interval "
        "| noise, median | noise, p90 |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    frames: list[pd.DataFrame] = []
    for (ranks, phase), (first, second) in replays.items():
        repeated_us = np.array([case.median_us for case in second.cases])
        checked = check_predictions(model, first).assign(ep=ranks, phase=phase)
        checked["noise"] = (repeated_us / checked["measured_us"] - 1.0).abs()
        frames.append(checked)
    everything = pd.concat(frames)
    for ranks, of_degree in everything.groupby("ep"):
        groups = [] if only_all else list(of_degree.groupby("phase", sort=False))
        for phase, group in [*groups, ("all", of_degree)]:
            lines.append(_row(fitted_to, f"{ranks}", str(phase), group))
    lines.append(_row(fitted_to, "all", "all", everything))
    return lines


def _row(fitted_to: str, ranks: str, phase: str, group: pd.DataFrame) -> str:
    inside = (group["measured_us"] >= group["low_us"]) & (group["measured_us"] <= group["high_us"])
    ratio = group["predicted_us"] / group["measured_us"]
    return (
        f"| {fitted_to} | {ranks} | {phase} | {len(group)} | {_time(group['measured_us'].median())} "
        f"| {group['error'].median():.1%} | {group['error'].quantile(0.9):.1%} | {ratio.median():.2f} "
        f"| {inside.mean():.0%} | {group['noise'].median():.1%} | {group['noise'].quantile(0.9):.1%} |"
    )


def live_lines(model: NetworkModel, run: Run) -> list[str]:
    """A run's own exchanges, each measured once while the model ran, against their predictions.

    The time of an exchange is the longest transfer of its ranks: from the last arrival to the last end, the
    same as in a benchmark. The matrix is what the probe recorded.
    """
    waits = run_waits(run)
    keys = ["phase", "role", "step", "layer", "sequence"]
    waits = waits[waits["role"].isin(["dispatch", "combine"])]
    live_us = waits.groupby(keys)["transfer_s"].max() * 1e6
    ranks = run.manifest.topology.ranks
    rows = []
    for key, own in run.exchanges().groupby(keys):
        if key not in live_us.index or len(own) != ranks:
            continue
        bytes_PP = np.stack(own.sort_values("source_rank")["send_bytes"].to_list())
        found = predict_us(model, bytes_PP, (0,) * ranks)
        rows.append((key[0], key[1], live_us[key], found.us, found.low_us, found.high_us))
    frame = pd.DataFrame(rows, columns=["phase", "role", "live_us", "us", "low_us", "high_us"])
    lines = [
        f"{run.manifest.model.name} on {ranks} ranks, exchanges as the program ran:",
        "",
        "| phase | role | exchanges | measured live | predicted | predicted / live | in interval |",
        "|---|---|---|---|---|---|---|",
    ]
    for (phase, role), group in frame.groupby(["phase", "role"]):
        inside = (group["live_us"] >= group["low_us"]) & (group["live_us"] <= group["high_us"])
        lines.append(
            f"| {phase} | {role} | {len(group)} | {_time(group['live_us'].median())} "
            f"| {_time(group['us'].median())} | {(group['us'] / group['live_us']).median():.2f} "
            f"| {inside.mean():.0%} |"
        )
    return lines


def _time(us: float) -> str:
    return f"{us / 1e3:.1f} ms" if us >= 1e3 else f"{us:.0f} us"

"""Frames about exchanges: the only part of reports that reads them from runs.

``phases``   run, and the columns of ``observatory.analysis.exchange.critical_path``
``layers``   run, and the columns of ``observatory.analysis.exchange.layer_waits``
``ranks``    run, phase, and the columns of ``observatory.analysis.exchange.rank_waits``
``traffic``  run, and the columns of ``observatory.analysis.exchange.exchange_traffic``
``unknown``  run, phase, reason, rows: exchanges whose split into waiting and transfer is not known
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from observatory.analysis.exchange import (
    SPAN_ORDER,
    critical_path,
    exchange_traffic,
    layer_waits,
    problems_of,
    rank_waits,
    run_waits,
)
from observatory.errors import ObservatoryError
from observatory.run import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeFrames:
    """Frames of all runs that hold exchanges (columns in the module's docstring).

    Attributes:
        gaps: run and one line for each run whose exchanges could not be read.
    """

    phases: pd.DataFrame
    layers: pd.DataFrame
    ranks: pd.DataFrame
    traffic: pd.DataFrame
    unknown: pd.DataFrame
    gaps: tuple[tuple[int, str], ...] = ()


def collect_exchanges(runs: Sequence[Run]) -> ExchangeFrames | None:
    """Read the exchanges and spans of every run, one run at a time; None when no run holds any."""
    parts_of: dict[str, list[pd.DataFrame]] = {
        name: [] for name in ("phases", "layers", "ranks", "traffic", "unknown")
    }
    gaps: list[tuple[int, str]] = []
    for index, run in enumerate(runs):
        if not run.row_count("exchange") and not run.row_count("spans"):
            continue
        try:
            for name, frame in _frames_of(run).items():
                parts_of[name].append(frame.assign(run=index))
        except ObservatoryError as error:
            gaps.append((index, str(error)))
    if not gaps and not any(len(frame) for frames in parts_of.values() for frame in frames):
        return None
    joined = {
        name: pd.concat(frames, ignore_index=True) if frames else pd.DataFrame({"run": [], "phase": []})
        for name, frames in parts_of.items()
    }
    return ExchangeFrames(**joined, gaps=tuple(gaps))


def _frames_of(run: Run) -> dict[str, pd.DataFrame]:
    spans = run.spans()
    if not run.row_count("exchange"):
        return {"phases": critical_path(spans[spans["name"].isin(SPAN_ORDER)])}
    exchanges = run.exchanges(arrow_lists=True)
    waits = run_waits(run, exchanges)
    phases = dict(iter(waits.groupby("phase", sort=False)))
    topology = run.manifest.topology
    return {
        "phases": critical_path(spans, waits),
        "layers": layer_waits(waits),
        "ranks": pd.concat(
            [rank_waits(phase_waits).assign(phase=phase) for phase, phase_waits in phases.items()]
        ),
        "traffic": exchange_traffic(exchanges, ranks=topology.ranks, node_of_rank=topology.node_of_rank),
        "unknown": pd.DataFrame(
            [
                {"phase": phase, **row}
                for phase, phase_waits in phases.items()
                for row in problems_of(phase_waits).to_dict("records")
            ],
            columns=["phase", "code", "reason", "rows"],
        ),
    }

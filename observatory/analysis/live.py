"""What a run that is being captured did in its last steps.

Shapes: S steps, E experts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from observatory.analysis.compare.collect import own_degrees
from observatory.analysis.exchange.alignment import rank_clocks
from observatory.analysis.exchange.waiting import wait_and_transfer
from observatory.analysis.parallel.scan import place, placement_rule
from observatory.analysis.parallel.traffic import load_by_rank
from observatory.analysis.routing.floor import max_over_mean_floor
from observatory.analysis.routing.imbalance import max_over_mean
from observatory.analysis.step_times import step_times
from observatory.errors import PlacementError
from observatory.run import Run
from observatory.run.documents.writing import frame_records
from observatory.run.manifest import PHASES

#: Newest parts of each rank and table that are read: two, since the newest may just have been begun.
PARTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LivePhase:
    """The last steps of a phase.

    Attributes:
        phase: its name.
        steps: steps that the values are of.
        last_step: the last of them.
        steps_per_s: over the time from the start of the first to the end of the last, other phases and pauses
            included; None where no times were captured.
        ms: median time of a step on the rank that takes longest; None likewise.
        tokens_per_s: tokens of all ranks over the time of these steps alone; None likewise, and where rows
            fold several steps.
    """

    phase: str
    steps: int
    last_step: int
    steps_per_s: float | None = None
    ms: float | None = None
    tokens_per_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveLayer:
    """A layer in the last steps of a phase.

    Attributes:
        phase, layer: where.
        tokens: of these steps.
        busiest_expert: the one with most assignments.
        busiest_share: its share of the assignments.
        expert_max_over_mean, floor: of these steps' added loads; floor: of uniform routing of as many tokens,
            None where K is not known.
        rank_max_over_mean: of the ranks that hold the experts; None where no usual degree fits.
    """

    phase: str
    layer: int
    tokens: int
    busiest_expert: int
    busiest_share: float
    expert_max_over_mean: float
    floor: float | None
    rank_max_over_mean: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveDevice:
    """The newest sample of a device; None where it reports no such value."""

    rank: int
    uuid: str
    power_w: float | None
    sm_clock_mhz: int | None
    temperature_c: int | None
    event_reasons: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveRank:
    """One rank.

    Attributes:
        rank: the rank.
        state: of its status; ``unknown`` where it left none.
        host: its host.
        silent_s: since its newest part was written; None where it has written none.
        exchange_share, waiting_share: time in exchanges, and waiting in them, over the time of the last
            steps; None without exchanges or times.
        caused_share: what the others waited for it, over their waiting; None where nothing is known of it.
        watching_share: cost of watching over the captured time; None where the rank does not state it yet.
        devices: newest samples of the devices that it sampled.
    """

    rank: int
    state: str
    host: str | None
    silent_s: float | None
    exchange_share: float | None = None
    waiting_share: float | None = None
    caused_share: float | None = None
    watching_share: float | None = None
    devices: tuple[LiveDevice, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveView:
    """A run as it is now.

    Attributes:
        path: the directory.
        model: its name.
        state: of the manifest.
        ended_unix_s: when it ended, by the wall clock; None while it runs, or where it was killed.
        ranks_expected: ranks of the run.
        degree: EP degree that `rank_max_over_mean` is about; None where none fits.
        phases, layers, ranks: in order; layers by excess over the floor, largest first.
        error: first error that a rank stated; None.
    """

    path: str
    model: str
    state: str
    ranks_expected: int
    degree: int | None = None
    phases: tuple[LivePhase, ...] = ()
    layers: tuple[LiveLayer, ...] = ()
    ranks: tuple[LiveRank, ...] = ()
    error: str | None = None
    ended_unix_s: float | None = None


@dataclass(slots=True)
class _Loads:
    """Rows of one phase and layer in step order."""

    experts: int
    step: list[NDArray[np.int64]] = field(default_factory=list)
    tokens: list[NDArray[np.int64]] = field(default_factory=list)
    load: list[NDArray[np.int64]] = field(default_factory=list)

    def since(self, first: int) -> tuple[int, NDArray[np.int64]]:
        """Tokens, and loads (E,), of the steps from this one on."""
        chosen_S = np.concatenate(self.step) >= first
        return int(np.concatenate(self.tokens)[chosen_S].sum()), np.concatenate(self.load)[chosen_S].sum(0)


def live_view(path: Path, *, steps: int) -> LiveView:
    """Read the newest parts of a run.

    Args:
        path: the run directory.
        steps: last steps of each phase to look at, fewer where the newest parts hold fewer.

    Raises:
        RunError, RunFormatError: it is no run, or damaged.
        LoadError: loads are negative or inconsistent.
    """
    run = Run.open_tail(path, parts=PARTS)
    loads, timed = _gathered(run), step_times(run)
    captured = {phase: _steps_of(loads, phase)[-steps:] for phase in {phase for phase, _ in loads}}
    mixed_S = np.sort(timed.loc[timed["phase"] == "mixed", "step"].to_numpy(np.int64))[-steps:]
    captured |= {"mixed": mixed_S} if mixed_S.size else {}
    first_steps = {phase: int(step_S[0]) for phase, step_S in captured.items()}
    manifest = run.manifest
    spans = _spans(run, first_steps)
    degree = next(iter(own_degrees(manifest)), None)
    return LiveView(
        path=str(path),
        model=manifest.model.name,
        state=manifest.state,
        ranks_expected=manifest.topology.ranks,
        degree=degree,
        phases=tuple(_phases(captured, spans, timed)),
        layers=tuple(_layers(run, loads, first_steps, degree)),
        ranks=tuple(_ranks(run, first_steps, spans)),
        error=next((status.error for status in manifest.ranks if status.error), None),
        ended_unix_s=manifest.ended_unix_s,
    )


def _gathered(run: Run) -> dict[tuple[str, int], _Loads]:
    loads: dict[tuple[str, int], _Loads] = {}
    for block in run.iter_loads():
        if len(block.step_S):
            found = loads.setdefault((block.phase, block.layer), _Loads(block.experts))
            found.step.append(block.step_S)
            found.tokens.append(block.tokens_S)
            found.load.append(block.load_SE)
    return loads


def _steps_of(loads: Mapping[tuple[str, int], _Loads], phase: str) -> NDArray[np.int64]:
    """Captured steps of a phase, ascending."""
    return np.unique(
        np.concatenate([rows for key, of in loads.items() if key[0] == phase for rows in of.step])
    )


def _spans(run: Run, first_steps: Mapping[str, int]) -> pd.DataFrame:
    """Spans of the last steps of each phase, with ``seconds``."""
    spans = run.spans()
    spans = spans[(spans["name"] == "phase") & spans["end_ns"].notna()]
    first = spans["phase"].map(first_steps).astype("float64")
    spans = spans[first.notna() & (spans["step"] >= first)]
    return spans.assign(seconds=(spans["end_ns"].astype("int64") - spans["start_ns"].astype("int64")) * 1e-9)


def _phases(
    captured: Mapping[str, NDArray[np.int64]], spans: pd.DataFrame, timed: pd.DataFrame
) -> list[LivePhase]:
    found = []
    for phase in sorted(captured, key=PHASES.index):
        step_S = captured[phase]
        rows = spans[spans["phase"] == phase]
        own = timed[(timed["phase"] == phase) & (timed["step"] >= step_S[0])]
        times = {}
        if len(own):
            one_rank = rows[rows["source_rank"] == rows["source_rank"].min()]
            elapsed = float(one_rank["end_ns"].max() - one_rank["start_ns"].min()) * 1e-9
            tokens = own["tokens"].sum(skipna=False)
            times = {
                "steps_per_s": one_rank["step"].nunique() / elapsed,
                "ms": float(own["ms"].median()),
                "tokens_per_s": None if np.isnan(tokens) else float(tokens / own["ms"].sum() * 1e3),
            }
        found.append(LivePhase(phase=phase, steps=len(step_S), last_step=int(step_S[-1]), **times))
    return found


def _layers(
    run: Run, loads: Mapping[tuple[str, int], _Loads], first_steps: Mapping[str, int], degree: int | None
) -> list[LiveLayer]:
    top_k = {spec.layer: spec.top_k for spec in run.manifest.model.moe_layers}
    rule = placement_rule("auto", run.manifest.topology)
    found = []
    for (phase, layer), of in loads.items():
        tokens, load_E = of.since(first_steps[phase])
        ratio = max_over_mean(load_E)
        if ratio is None:
            continue
        busiest = int(load_E.argmax())
        k = top_k.get(layer)
        of_ranks = None
        if degree is not None:
            try:
                placement = place(rule, layer=layer, experts=of.experts, ep=degree)
                of_ranks = max_over_mean(load_by_rank(load_E, placement))
            except PlacementError:
                pass
        found.append(
            LiveLayer(
                phase=phase, layer=layer, tokens=tokens, busiest_expert=busiest,
                busiest_share=float(load_E[busiest] / load_E.sum()), expert_max_over_mean=ratio,
                floor=None if k is None or k > of.experts or tokens == 0
                else max_over_mean_floor(tokens=tokens, top_k=k, experts=of.experts),
                rank_max_over_mean=of_ranks,
            )
        )  # fmt: skip
    return sorted(found, key=lambda row: (row.floor or 1.0) - row.expert_max_over_mean)


def _ranks(run: Run, first_steps: Mapping[str, int], spans: pd.DataFrame) -> list[LiveRank]:
    manifest = run.manifest
    statuses = {status.rank: status for status in manifest.ranks}
    shares = _exchange_shares(run, first_steps, spans)
    power = run.power().sort_values("time_ns") if run.row_count("power") else pd.DataFrame()
    newest = power.groupby(["source_rank", "device_uuid"]).tail(1) if len(power) else power
    now = time.time()
    ranks = []
    for rank in sorted({*statuses, *spans["source_rank"].unique().tolist()}):
        status = statuses.get(rank)
        measured = None if status is None else status.self_measured
        written = run.written_unix_s(rank)
        rows = newest[newest["source_rank"] == rank] if len(newest) else newest
        ranks.append(
            LiveRank(
                rank=rank,
                state="unknown" if status is None else status.state,
                host=None if status is None else status.host,
                silent_s=None if written is None else max(0.0, now - written),
                watching_share=None if measured is None else measured.share,
                devices=tuple(_device(rank, row) for row in frame_records(rows)),
                **shares.get(rank, {}),
            )
        )
    return ranks


def _exchange_shares(
    run: Run, first_steps: Mapping[str, int], spans: pd.DataFrame
) -> dict[int, dict[str, float]]:
    if not run.row_count("exchange") or spans.empty:
        return {}
    exchanges = run.exchanges(arrow_lists=True)
    first = exchanges["phase"].map(first_steps).astype("float64")
    exchanges = exchanges[first.notna() & (exchanges["step"] >= first)]
    topology = run.manifest.topology
    waits = wait_and_transfer(
        exchanges, ranks=topology.ranks, clocks=rank_clocks(run.manifest), node_of_rank=topology.node_of_rank
    )
    seconds = spans.groupby("source_rank")["seconds"].sum()
    caused = waits[waits["last_rank"].notna() & (waits["last_rank"] != waits["source_rank"])]
    caused_s = caused.groupby("last_rank")["wait_s"].sum()
    all_caused_s = float(caused_s.sum())
    shares: dict[int, dict[str, float]] = {}
    for name, rows in waits.groupby("source_rank"):
        rank = int(str(name))
        whole = float(seconds.get(rank, 0.0))
        if whole <= 0:
            continue
        shares[rank] = {"exchange_share": float(rows["duration_s"].sum()) / whole}
        if rows["wait_s"].notna().any():
            shares[rank]["waiting_share"] = float(rows["wait_s"].sum()) / whole
        if all_caused_s > 0:
            shares[rank]["caused_share"] = float(caused_s.get(rank, 0.0)) / all_caused_s
    return shares


def _device(rank: int, row: Mapping[str, Any]) -> LiveDevice:
    def whole(name: str) -> int | None:
        return None if row[name] is None else int(row[name])

    milliwatts = whole("power_mw")
    return LiveDevice(
        rank=rank,
        uuid=str(row["device_uuid"]),
        power_w=None if milliwatts is None else milliwatts / 1e3,
        sm_clock_mhz=whole("sm_clock_mhz"),
        temperature_c=whole("temperature_c"),
        event_reasons=whole("event_reasons"),
    )

"""What other expert-parallel degrees and placements would do to captured loads.

Shapes: S steps, P captured source ranks, R expert-parallel ranks, E experts.

Per-expert max/mean is a property of the routing and cannot depend on where experts are; per-rank max/mean
does. Both are given and never mixed (arXiv 2605.20982 scans EP 4 to 32 and reports per-expert values).
The captured tokens are routed again as they were: the same routing, another mapping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from observatory.analysis.parallel.placement import (
    Placement,
    PlacementChoice,
    PlacementFile,
    linear,
    load_placement,
    round_robin,
)
from observatory.analysis.parallel.topology import ParallelTopology
from observatory.analysis.parallel.traffic import Sources, load_by_rank, source_shares, traffic_matrices
from observatory.analysis.routing.floor import max_over_mean_floor
from observatory.analysis.routing.imbalance import checked_loads, max_over_mean, max_over_mean_rows
from observatory.analysis.routing.loads import steps_covered
from observatory.analysis.routing.summary import floor_top_k
from observatory.errors import PlacementError

if TYPE_CHECKING:
    from observatory.run import LoadBlock, Run
    from observatory.run.manifest import Manifest, Topology

_BLOCK_BYTES = 64 * 1024 * 1024

_COLUMNS = (
    "ep", "placement", "layer", "phase", "experts", "gpus_per_node", "nodes",
    "steps", "tokens", "assignments",
    "experts_per_rank_min", "experts_per_rank_max",
    "expert_max_over_mean", "rank_max_over_mean", "rank_max_over_mean_floor",
    "rank_max_over_mean_step_p50", "rank_max_over_mean_step_p90", "rank_max_over_mean_step_max",
    "rank_max_over_mean_step_floor",
    "cross_rank_fraction", "cross_rank_fraction_step_p50", "cross_rank_fraction_step_p90",
    "cross_rank_fraction_step_max",
    "cross_node_fraction", "cross_node_fraction_step_p50", "cross_node_fraction_step_p90",
    "cross_node_fraction_step_max",
    "sources", "notes",
)  # fmt: skip


#: Degrees that are tried when none are given: one to eight nodes of four GPUs.
_USUAL_DEGREES = (4, 8, 16, 32)


def fitting_degrees(manifest: Manifest, placement: PlacementChoice) -> tuple[int, ...]:
    """Degrees to scan when none are given: a placement's own, else the usual ones that fit every layer."""
    if placement == "recorded":
        return (manifest.topology.ranks,)
    if isinstance(placement, Path):
        file = load_placement(placement)
        return (file.ranks or file.highest_rank + 1,)
    experts = {layer.experts for layer in manifest.model.moe_layers}
    fitting = tuple(ep for ep in _USUAL_DEGREES if all(count % ep == 0 for count in experts))
    return fitting or (max(experts, default=1),)


def scan_run(
    run: Run,
    *,
    ep_degrees: Sequence[int],
    gpus_per_node: int,
    placement: PlacementChoice = "auto",
) -> pd.DataFrame:
    """Re-map the captured loads of a run, in one streaming pass.

    Args:
        run: an open run.
        ep_degrees: degrees to try; each must divide the experts unless a file places them.
        gpus_per_node: ranks per node.
        placement: a name of ``PLACEMENT_NAMES``, or a placement file.

    Returns:
        One row per (ep, placement, layer, phase), columns in docs/metrics.md. Whole-run values come from
        sums over all steps, ``_step_`` values from single steps. Unknown values are NaN, ``notes`` says why.

    Raises:
        PlacementError: a degree or the file does not fit the model.
        LoadError: loads are negative or inconsistent.
    """
    topologies = [ParallelTopology(ep=ep, gpus_per_node=gpus_per_node) for ep in dict.fromkeys(ep_degrees)]
    rule = placement_rule(placement, run.manifest.topology)
    captured = run.manifest.topology.ranks
    top_k = {spec.layer: spec.top_k for spec in run.manifest.model.moe_layers}
    layers: dict[tuple[str, int], _LayerScan] = {}
    for block in run.iter_loads(max_block_bytes=_block_bytes(run, topologies)):
        key = (block.phase, block.layer)
        if key not in layers:
            cells = [
                _Cell(place(rule, layer=block.layer, experts=block.experts, ep=topology.ep), topology)
                for topology in topologies
            ]
            layers[key] = _LayerScan(block, cells, captured, top_k.get(block.layer))
        layers[key].add(block)
    rows = [row for key in sorted(layers) for row in layers[key].rows()]
    frame = pd.DataFrame(rows, columns=list(_COLUMNS))
    real = [name for name in _COLUMNS if "fraction" in name or "over_mean" in name]
    frame = frame.astype(dict.fromkeys(real, "float64"))
    return frame.sort_values(["ep", "phase", "layer"], kind="stable", ignore_index=True)


def _block_bytes(run: Run, topologies: Sequence[ParallelTopology]) -> int:
    """Size of blocks that keeps loads by rank bounded as well, where there are more ranks than experts."""
    ranks = max((topology.ep for topology in topologies), default=1)
    fewest = min((spec.experts for spec in run.manifest.model.moe_layers), default=1)
    return max(1, _BLOCK_BYTES * min(fewest, ranks) // ranks)


def traffic_matrix(
    run: Run,
    *,
    ep: int,
    layer: int,
    phase: str,
    placement: PlacementChoice = "auto",
    bytes_per_assignment: int | None = None,
) -> pd.DataFrame:
    """Traffic of one layer summed over the run, one row per pair of ranks.

    Args:
        run: an open run.
        ep: R.
        layer: MoE layer.
        phase: phase of the run.
        placement: a name of ``PLACEMENT_NAMES``, or a placement file.
        bytes_per_assignment: bytes of one dispatched row, hidden size times bytes per element.

    Returns:
        source_rank, expert_rank, assignments, bytes (NaN without ``bytes_per_assignment``), sources.

    Raises:
        PlacementError: the degree or the file does not fit, or there are no such loads.
    """
    rule = placement_rule(placement, run.manifest.topology)
    traffic_RR: NDArray[np.int64] | NDArray[np.float64] = np.zeros((ep, ep), dtype=np.int64)
    sources: Sources | None = None
    source_shares(run.manifest.topology.ranks, ep)  # refuses impossible numbers of ranks
    for block in run.iter_loads(phase=phase, layers=[layer]):
        layout = place(rule, layer=layer, experts=block.experts, ep=ep)
        load_SPE = all_ranks(block, run.manifest.topology.ranks)
        step_SRR, sources = traffic_matrices(load_SPE, layout)
        traffic_RR = traffic_RR + step_SRR.sum(axis=0)
    if sources is None:
        raise PlacementError(f"the run has no loads of layer {layer} in {phase}; see `observatory routing`")
    source, expert = np.divmod(np.arange(ep * ep), ep)
    assignments = traffic_RR.ravel()
    return pd.DataFrame(
        {
            "source_rank": source,
            "expert_rank": expert,
            "assignments": assignments,
            "bytes": np.nan if bytes_per_assignment is None else assignments * bytes_per_assignment,
            "sources": sources,
        }
    )


@dataclass(frozen=True, slots=True)
class OwnElseLinear:
    """Where the run had its experts, at the degree that it had; linear at others."""

    own: PlacementFile


#: A checked `PlacementChoice`.
PlacementRule = str | PlacementFile | OwnElseLinear


def place(rule: PlacementRule, *, layer: int, experts: int, ep: int) -> Placement:
    """Placement of one layer by rule (``linear``, ``round-robin``) or file.

    Raises:
        PlacementError: it does not fit; the message names the degrees that do.
    """
    if isinstance(rule, OwnElseLinear):
        rule = rule.own if rule.own.ranks == ep else "linear"
    if isinstance(rule, PlacementFile):
        return rule.for_layer(layer, experts=experts, ep=ep)
    rules = {"linear": linear, "round-robin": round_robin}
    if rule not in rules:
        raise PlacementError(f"placement {rule!r} is unknown; expected linear, round-robin or a file")
    return rules[rule](experts, ep)


def placement_rule(placement: PlacementChoice, topology: Topology) -> PlacementRule:
    """The rule of a placement, its file read, or made of what the run's topology says.

    An expert that had replicas is taken to be at its home.

    Raises:
        PlacementError: the file cannot be used, or the run does not say where its experts were.
    """
    if placement in ("linear", "round-robin"):
        return str(placement)
    if placement not in ("auto", "recorded"):
        return load_placement(placement)
    if topology.placement is None:
        if placement == "auto":
            return "linear"
        raise PlacementError(
            "the run does not say which rank held which expert; give linear, round-robin or a placement file"
        )
    homes: list[int | list[int]] = [ranks[0] for ranks in topology.placement]
    recorded = PlacementFile(name="recorded", expert_to_rank=homes, ranks=topology.ranks)
    if placement == "recorded":
        return recorded
    even = len(homes) % topology.ranks == 0
    is_linear = even and homes == linear(len(homes), topology.ranks).rank_of_E.tolist()
    return "linear" if is_linear else OwnElseLinear(recorded)


def all_ranks(block: LoadBlock, captured: int) -> NDArray[np.int64]:
    """Loads with one row per captured rank, zeros for ranks that the block lacks."""
    rank_P = np.asarray(block.source_rank_P)
    if rank_P.size == captured:
        return block.load_SPE
    load_SPE = np.zeros(
        (len(block.step_S), max(captured, int(rank_P.max()) + 1), block.experts), dtype=np.int64
    )
    load_SPE[:, rank_P] = block.load_SPE
    return load_SPE


class _Cell:
    """Running numbers of one layer under one degree and placement."""

    def __init__(self, placement: Placement, topology: ParallelTopology) -> None:
        self.placement, self.topology = placement, topology
        self.rank_load_R = np.zeros(placement.ep, dtype=np.int64)
        self.local_S: list[NDArray[np.float64]] = []
        self.node_local_S: list[NDArray[np.float64]] = []
        self.ratio_S: list[NDArray[np.float64]] = []
        self.sources: Sources = "captured"

    def add(self, load_SPE: NDArray[np.int64], rank_P: NDArray[np.int64], captured: int) -> None:
        """Add the steps of a block."""
        share_RP, self.sources = source_shares(captured, self.placement.ep)
        node_R = self.topology.node_of_rank_R
        node_share_NP = np.zeros((self.topology.nodes, share_RP.shape[1]))
        np.add.at(node_share_NP, node_R, share_RP)
        local_RPX = np.stack([share_RP[:, rank_P], node_share_NP[node_R][:, rank_P]], axis=-1)
        load_SPR = load_by_rank(load_SPE, self.placement)
        load_SR = load_SPR.sum(axis=1)
        kept_SX = load_SPR.reshape(len(load_SPR), -1) @ local_RPX.transpose(1, 0, 2).reshape(-1, 2)
        self.local_S.append(kept_SX[:, 0])
        self.node_local_S.append(kept_SX[:, 1])
        self.ratio_S.append(max_over_mean_rows(load_SR))
        self.rank_load_R += load_SR.sum(axis=0)


class _LayerScan:
    """One layer in one phase under all degrees."""

    def __init__(self, block: LoadBlock, cells: list[_Cell], captured: int, top_k: int | None) -> None:
        self.phase, self.layer, self.experts = block.phase, block.layer, block.experts
        self.cells, self.captured, self.top_k = cells, captured, top_k
        self.load_E = np.zeros(block.experts, dtype=np.int64)
        self.tokens_S: list[NDArray[np.int64]] = []
        self.assigned_S: list[NDArray[np.int64]] = []
        self.step_S: list[NDArray[np.int64]] = []
        self.window_steps_S: list[NDArray[np.int64]] = []

    def add(self, block: LoadBlock) -> None:
        """Add the steps of a block."""
        load_SPE = checked_loads(block.load_SPE, dimensions=3)
        rank_P = np.asarray(block.source_rank_P, dtype=np.int64)
        captured = max(self.captured, int(rank_P.max()) + 1)
        for cell in self.cells:
            cell.add(load_SPE, rank_P, captured)
        load_SE = load_SPE.sum(axis=1)
        self.load_E += load_SE.sum(axis=0)
        self.assigned_S.append(load_SE.sum(axis=1))
        self.tokens_S.append(np.asarray(block.tokens_S, dtype=np.int64))
        self.step_S.append(np.asarray(block.step_S, dtype=np.int64))
        self.window_steps_S.append(np.asarray(block.window_steps_S, dtype=np.int64))

    def rows(self) -> list[dict[str, object]]:
        """One row per cell."""
        return [self._row(cell) for cell in self.cells]

    def _row(self, cell: _Cell) -> dict[str, object]:
        tokens_S, assigned_S = np.concatenate(self.tokens_S), np.concatenate(self.assigned_S)
        window_steps_S = np.concatenate(self.window_steps_S)
        keeps_steps = bool(np.all(window_steps_S == 1))
        tokens, assignments = int(tokens_S.sum()), int(assigned_S.sum())
        held_R = cell.placement.experts_per_rank_R
        row: dict[str, object] = {
            "ep": cell.placement.ep,
            "placement": cell.placement.name,
            "layer": self.layer,
            "phase": self.phase,
            "experts": self.experts,
            "gpus_per_node": cell.topology.gpus_per_node,
            "nodes": cell.topology.nodes,
            "steps": steps_covered(np.concatenate(self.step_S), window_steps_S),
            "tokens": tokens,
            "assignments": assignments,
            "experts_per_rank_min": int(held_R.min()),
            "experts_per_rank_max": int(held_R.max()),
            "expert_max_over_mean": max_over_mean(self.load_E),
            "rank_max_over_mean": max_over_mean(cell.rank_load_R),
            "rank_max_over_mean_floor": self._floor(cell, tokens, assignments, tokens),
            "sources": cell.sources,
            "notes": "; ".join(self._notes(cell, assignments, keeps_steps)),
        }
        ratio_S = np.concatenate(cell.ratio_S)
        if keeps_steps:
            typical = int(np.median(tokens_S[tokens_S > 0])) if tokens else 0
            row["rank_max_over_mean_step_floor"] = self._floor(cell, tokens, assignments, typical)
            row |= _step_values("rank_max_over_mean", ratio_S)
        for name, kept in (("cross_rank_fraction", cell.local_S), ("cross_node_fraction", cell.node_local_S)):
            kept_S = np.concatenate(kept)
            if assignments:
                row[name] = _share_leaving(kept_S.sum(), assignments)
            if keeps_steps:
                some = assigned_S > 0
                row |= _step_values(name, _share_leaving(kept_S[some], assigned_S[some]))
        return row

    def _floor(self, cell: _Cell, tokens: int, assignments: int, sample: int) -> float | None:
        """Floor of rank max/mean for ``sample`` tokens; only equal ranks without replicas have one."""
        top_k, _ = floor_top_k(self.top_k, tokens=tokens, assignments=assignments, experts=self.experts)
        if top_k is None or not cell.placement.even:
            return None
        return max_over_mean_floor(tokens=sample, top_k=top_k, experts=self.experts, groups=cell.placement.ep)

    def _notes(self, cell: _Cell, assignments: int, keeps_steps: bool) -> list[str]:
        notes = []
        if assignments == 0:
            notes.append("nothing was assigned")
        if not keeps_steps:
            notes.append("rows fold several steps: no per-step values")
        if cell.placement.holders_E is not None:
            shared = "equal shares" if cell.placement.shares_E is None else "the shares of the placement"
            notes.append(f"replicas take {shared} of their expert's load: no floor")
        elif not cell.placement.even:
            notes.append("ranks hold different numbers of experts: no floor")
        if cell.sources == "spread evenly (estimate)" and self.captured == 1 and cell.placement.ep > 1:
            notes.append("one captured rank: the share that crosses ranks is 1 - 1/EP by construction")
        return notes


def _share_leaving(kept: NDArray[np.float64], all_of_them: NDArray[np.int64] | int) -> NDArray[np.float64]:
    """Share that does not stay, freed of rounding below zero."""
    return np.clip(1.0 - kept / all_of_them, 0.0, 1.0)


def _step_values(name: str, value_S: NDArray[np.float64]) -> dict[str, float]:
    some = value_S[~np.isnan(value_S)]
    if not some.size:
        return {}
    p50, p90, largest = np.quantile(some, [0.5, 0.9, 1.0])
    return {
        f"{name}_step_p50": float(p50),
        f"{name}_step_p90": float(p90),
        f"{name}_step_max": float(largest),
    }

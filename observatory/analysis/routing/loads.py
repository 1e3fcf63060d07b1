"""The loads of a run, gathered in one streaming pass.

Shapes: S stored rows in time order (one step each, or one window of steps), G groups of consecutive rows,
E experts. Everything is summed over source ranks.

Memory: whole-run sums, 48 bytes per row and layer (100,000 steps of 61 layers: 300 MB), and loads in at most
1024 groups per layer (fewer for layers of more than 1024 experts, at least 16). A longer run has its
neighbouring rows added up two by two, so that a group covers ``rows_per_group`` rows; 1024 steps of 61
layers of 256 experts take 130 MB. Per-step Gini and max/mean are taken before that, on every single row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from observatory.analysis.routing.imbalance import checked_loads, gini_rows, max_over_mean_rows
from observatory.errors import LoadError

if TYPE_CHECKING:
    from observatory.run import LoadBlock, Run

_MOST_GROUPS = 1024
_GROUP_BYTES_PER_LAYER = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLoads:
    """Loads of one layer in one phase.

    Attributes:
        phase, layer, experts: what it is.
        top_k: K as configured; None when it varies or the manifest does not state it.
        steps: steps covered.
        tokens, assignments: sums over the run and the ranks.
        load_E: assignments per expert over the whole run.
        step_S: first step of each stored row.
        window_steps_S: steps folded into each row, 1 unless the run was recorded in windows.
        tokens_S: tokens of each row.
        gini_S: Gini of each row; NaN where nothing was assigned.
        max_over_mean_S: expert max/mean of each row's own loads; NaN where nothing was assigned.
        step_max_over_mean_S: largest per-step max/mean inside each row; NaN where it is not known (rows
            that fold several steps of several ranks).
        load_GE: loads per group of ``rows_per_group`` consecutive rows (the last group may be shorter).
        rows_per_group: 1 unless the run was too long to keep every row.
        incomplete_rows: rows in which some rank of the run is missing.
        partial_rows: rows in which calls of some rank are missing, or ended in the middle.
    """

    phase: str
    layer: int
    experts: int
    top_k: int | None
    steps: int
    tokens: int
    assignments: int
    load_E: NDArray[np.int64]
    step_S: NDArray[np.int64]
    window_steps_S: NDArray[np.int64]
    tokens_S: NDArray[np.int64]
    gini_S: NDArray[np.float64]
    max_over_mean_S: NDArray[np.float64]
    step_max_over_mean_S: NDArray[np.float64]
    load_GE: NDArray[np.int64]
    rows_per_group: int
    incomplete_rows: int
    partial_rows: int = 0

    @property
    def keeps_steps(self) -> bool:
        """Whether every row is one step, so that per-step numbers can be read off."""
        return bool(np.all(self.window_steps_S == 1))


#: (phase, layer) -> loads, phases and layers in order.
RunLoads = Mapping[tuple[str, int], LayerLoads]


def collect_layer_loads(
    run: Run, *, each: Callable[[LoadBlock], None] | None = None
) -> dict[tuple[str, int], LayerLoads]:
    """Gather the loads of every layer and phase in one pass over the run.

    Args:
        run: an open run.
        each: called with every block, once it has been checked.

    Raises:
        LoadError: negative loads, a layer whose number of experts changes, steps out of order.
    """
    top_k = {spec.layer: spec.top_k for spec in run.manifest.model.moe_layers}
    gathered: dict[tuple[str, int], _Gatherer] = {}
    for block in run.iter_loads():
        key = (block.phase, block.layer)
        if key not in gathered:
            holds_P = np.array([run.holds_layer(int(rank), block.layer) for rank in block.source_rank_P])
            gathered[key] = _Gatherer(block, top_k.get(block.layer), holds_P)
        gathered[key].add(block)
        if each is not None:
            each(block)
    return {key: gathered.pop(key).finish() for key in sorted(gathered)}


def steps_covered(step_S: NDArray[np.int64], window_steps_S: NDArray[np.int64]) -> int:
    """Steps that rows in step order cover.

    Rows that start at the same step (ranks whose last windows differ in length) cover the longest of them.
    """
    if step_S.size == 0:
        return 0
    first = np.flatnonzero(np.diff(step_S, prepend=-1))
    return int(np.maximum.reduceat(window_steps_S, first).sum())


class _Gatherer:
    """Running sums of one (phase, layer)."""

    def __init__(self, block: LoadBlock, top_k: int | None, holds_P: NDArray[np.bool_]) -> None:
        self.phase, self.layer, self.experts, self.top_k = block.phase, block.layer, block.experts, top_k
        self.holds_P = holds_P
        self.most_groups = max(16, min(_MOST_GROUPS, _GROUP_BYTES_PER_LAYER // (8 * block.experts)))
        self.total_E = np.zeros(block.experts, dtype=np.int64)
        self.rows: dict[str, list[NDArray[np.float64] | NDArray[np.int64]]] = {
            name: []
            for name in ("step", "window_steps", "tokens", "gini", "max_over_mean", "step_max_over_mean")
        }
        self.loads: list[NDArray[np.int64]] = []
        self.pending_RE = np.zeros((0, block.experts), dtype=np.int64)
        self.groups = 0
        self.rows_per_group = 1
        self.last_step = -1
        self.incomplete = 0
        self.partial = 0

    def add(self, block: LoadBlock) -> None:
        """Add a block of rows."""
        load_SE = checked_loads(block.load_SE, dimensions=2)
        if load_SE.shape[1] != self.experts:
            raise LoadError(
                f"layer {self.layer} has {load_SE.shape[1]} experts at step {int(block.step_S[0])} and "
                f"{self.experts} before; expected one number of experts per layer: profile models separately"
            )
        step_S = np.asarray(block.step_S, dtype=np.int64)
        if step_S.size == 0:
            return
        if step_S[0] < self.last_step or np.any(np.diff(step_S) < 0):
            raise LoadError(
                f"steps of layer {self.layer} ({self.phase}) are out of order near step {int(step_S[0])}; "
                "expected ascending steps"
            )
        self.last_step = int(step_S[-1])
        if int(load_SE.max()) * step_S.size + int(self.total_E.max()) > np.iinfo(np.int64).max:
            raise LoadError(
                f"loads of layer {self.layer} add up to more than 2**63 - 1; the counts are damaged"
            )
        self.total_E += load_SE.sum(axis=0)
        ratio_S = max_over_mean_rows(load_SE)
        single_S = np.asarray(block.window_steps_S) == 1
        self.rows["step"].append(step_S)
        self.rows["window_steps"].append(np.asarray(block.window_steps_S, dtype=np.int64))
        self.rows["tokens"].append(np.asarray(block.tokens_S, dtype=np.int64))
        self.rows["gini"].append(gini_rows(load_SE))
        self.rows["max_over_mean"].append(ratio_S)
        self.rows["step_max_over_mean"].append(np.where(single_S, ratio_S, _stored_extremes(block)))
        self.incomplete += int(np.count_nonzero(~np.asarray(block.present_SP)[:, self.holds_P].all(axis=1)))
        if block.partial_SP is not None:
            self.partial += int(np.count_nonzero(block.partial_SP.any(axis=1)))
        self._keep(load_SE)

    def _keep(self, load_SE: NDArray[np.int64]) -> None:
        """Keep loads as groups of consecutive rows; when there are too many, halve their number."""
        load = np.concatenate([self.pending_RE, load_SE]) if self.pending_RE.size else load_SE
        whole = load.shape[0] // self.rows_per_group * self.rows_per_group
        self.pending_RE = load[whole:].copy()
        self.loads.append(_added(load[:whole], self.rows_per_group))
        self.groups += self.loads[-1].shape[0]
        while self.groups > self.most_groups:
            everything = np.concatenate(self.loads)
            even = everything.shape[0] // 2 * 2
            if even < everything.shape[0]:  # an odd group waits, as rows that add up to it
                filler = np.zeros((self.rows_per_group - 1, self.experts), dtype=np.int64)
                self.pending_RE = np.concatenate([everything[even:], filler, self.pending_RE])
            self.loads = [_added(everything[:even], 2)]
            self.groups = even // 2
            self.rows_per_group *= 2

    def finish(self) -> LayerLoads:
        """Everything that was added."""
        rest = [self.pending_RE.sum(axis=0, keepdims=True)] if self.pending_RE.shape[0] else []
        integer = {
            name: np.concatenate(self.rows[name]).astype(np.int64)
            for name in ("step", "window_steps", "tokens")
        }
        real = {
            name: np.concatenate(self.rows[name]).astype(np.float64)
            for name in ("gini", "max_over_mean", "step_max_over_mean")
        }
        return LayerLoads(
            phase=self.phase,
            layer=self.layer,
            experts=self.experts,
            top_k=self.top_k,
            steps=steps_covered(integer["step"], integer["window_steps"]),
            tokens=int(integer["tokens"].sum()),
            assignments=sum(self.total_E.tolist()),
            load_E=self.total_E,
            step_S=integer["step"],
            window_steps_S=integer["window_steps"],
            tokens_S=integer["tokens"],
            gini_S=real["gini"],
            max_over_mean_S=real["max_over_mean"],
            step_max_over_mean_S=real["step_max_over_mean"],
            load_GE=np.concatenate([*self.loads, *rest]),
            rows_per_group=self.rows_per_group,
            incomplete_rows=self.incomplete,
            partial_rows=self.partial,
        )


def _stored_extremes(block: LoadBlock) -> NDArray[np.float64]:
    """Stored largest per-step max/mean; with several ranks each row's extreme is its own, not their sum's."""
    extremes_S = block.step_max_over_mean_S
    if extremes_S is None or len(block.source_rank_P) > 1:
        return np.full(len(block.step_S), np.nan)
    return np.asarray(extremes_S, dtype=np.float64)


def _added(load: NDArray[np.int64], rows: int) -> NDArray[np.int64]:
    """Sums of each ``rows`` consecutive rows; their number must be a multiple of it."""
    if rows == 1:
        return load
    added_GE: NDArray[np.int64] = load.reshape(-1, rows, load.shape[1]).sum(axis=1)
    return added_GE

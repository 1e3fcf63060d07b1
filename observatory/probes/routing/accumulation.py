"""From snapshots of the counters to rows of the routing and token tables.

Shapes: E experts, N sites of one E, S steps. Runs in the background thread; nothing here touches a device.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from observatory.probes.routing.counters import NO_SAMPLE, SLOTS, HostCopy, Layout
from observatory.probes.routing.integrity import Loss
from observatory.probes.routing.losses import GapLog
from observatory.run.manifest import CaptureGap, MoeLayerSpec
from observatory.run.rows import routing_rows
from observatory.run.tables import TOKENS_SCHEMA

Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]
Bools = NDArray[np.bool_]

#: Losses after which a layer's row of the step, if there is one, lacks calls.
_PARTIAL = frozenset(("hooks_removed", "replaced", "hooks_refused", "replaced_by_unknown", "removed"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What was counted between two boundaries.

    Attributes:
        step: the step it belongs to.
        stated_phase: phase that the caller stated for it; None leaves what is known.
        ends_step: no more snapshots of this step follow.
        copies: one copy per device.
        calls: (slots, sites) calls.
        widths: (sites,) ids per token.
        losses: what was missing at the second boundary.
        bypassed: (sites,) the block was called more often than the site.
        was_interrupted: a call ended in the middle.
        is_split: a call of some thread went over a boundary.
        is_last: the second boundary is the end of the watch.
    """

    step: int
    stated_phase: str | None
    ends_step: bool
    copies: Sequence[HostCopy]
    calls: Int64
    widths: Int64
    losses: tuple[Loss, ...]
    bypassed: Bools
    was_interrupted: bool
    is_split: bool = False
    is_last: bool = False


@dataclass(slots=True)
class _Counts:
    """Counts of one phase over the sites of one E."""

    load: Int64
    tokens: Int64
    present: Bools
    partial: Bools
    mass: Float64 | None

    def include(self, other: _Counts) -> None:
        """Add counts of the same sites and phase."""
        self.load += other.load
        self.tokens += other.tokens
        self.present = self.present | other.present
        self.partial = self.partial | other.partial
        if self.mass is not None and other.mass is not None:
            self.mass += other.mass


@dataclass(slots=True)
class _Window:
    """Steps of one phase, folded; the extremes are over the steps in which a site was called."""

    total: _Counts
    steps: Int64
    load_min: Int64
    load_max: Int64
    max_over_mean: Float64

    @classmethod
    def of_step(cls, counts: _Counts) -> _Window:
        """A window of one step."""
        return cls(
            total=counts,
            steps=counts.present.astype(np.int64),
            load_min=np.where(counts.present[:, None], counts.load, np.iinfo(np.int64).max),
            load_max=counts.load.copy(),
            max_over_mean=_max_over_mean(counts.load),
        )

    def include(self, counts: _Counts) -> None:
        """Fold another step in."""
        smaller = np.minimum(self.load_min, counts.load)
        self.load_min = np.where(counts.present[:, None], smaller, self.load_min)
        self.load_max = np.maximum(self.load_max, counts.load)
        self.max_over_mean = np.fmax(self.max_over_mean, _max_over_mean(counts.load))
        self.steps += counts.present
        self.total.include(counts)


def _max_over_mean(load_NE: Int64) -> Float64:
    """Per site; NaN where nothing was assigned."""
    mean_N = load_NE.mean(axis=1)
    ratio_N: Float64 = np.full(len(load_NE), np.nan)
    np.divide(load_NE.max(axis=1), mean_N, out=ratio_N, where=mean_N > 0)
    return ratio_N


@dataclass(slots=True, kw_only=True)
class _Rows:
    """Finished rows of one step or window and phase."""

    step: int
    phase: str
    layers: Int64
    counts: _Counts
    window: _Window | None


@dataclass(slots=True, kw_only=True)
class _Group:
    """Sites with the same number of experts, and what is known of them so far."""

    experts: int
    sites: Int64
    starts: Int64
    layers: Int64
    step: dict[str, _Counts] = field(default_factory=dict)
    windows: dict[str, _Window] = field(default_factory=dict)
    finished: list[_Rows] = field(default_factory=list)


class SnapshotAccumulator:
    """Adds snapshots up to steps, steps to windows, and keeps finished rows until they are taken.

    Attributes:
        finished_rows: rows that ``drain`` would give.
        all_rows: rows so far, given or not.
        last_counted_step: the last step that anything was counted in; -1 when nothing was.
        counted_sites: sites that have rows.
    """

    def __init__(
        self, layout: Layout, specs: Sequence[MoeLayerSpec], *, rank: int, window_steps: int
    ) -> None:
        self.finished_rows = 0
        self.all_rows = 0
        self.last_counted_step = -1
        self.counted_sites: set[int] = set()
        self._layout = layout
        self._rank = rank
        self._window_steps = window_steps
        self._layers = np.asarray([spec.layer for spec in specs], dtype=np.int64)
        stacks = [re.sub(r"[0-9]+", "*", spec.module) for spec in specs]
        self._stacks = np.unique(stacks, return_inverse=True)[1]
        self._log = GapLog(specs)
        #: sites that were called, by phase: so far, and in this step
        self._called: dict[str, Bools] = {}
        self._called_now: dict[str, Bools] = {}
        #: calls of each site in this step, by phase
        self._calls_now: dict[str, Int64] = {}
        #: by phase and stack: whether all layers are called equally often, in steps that show it
        self._is_even: dict[tuple[str, int], bool] = {}
        #: the first step and its sites that were called less, until that is known
        self._uneven: dict[tuple[str, int], tuple[int, Int64]] = {}
        #: sites whose calls of this step are known to be missing; all, where a call was interrupted
        self._explained: Bools = np.zeros(len(specs), dtype=bool)
        self._groups: list[_Group] = []
        self._samples: list[pa.RecordBatch] = []
        self._sampled: set[tuple[str, int]] = set()
        experts, starts = np.asarray(layout.experts), np.asarray(layout.starts)
        for size in np.unique(experts).tolist():
            sites = np.flatnonzero(experts == size)
            self._groups.append(
                _Group(experts=size, sites=sites, starts=starts[sites], layers=self._layers[sites])
            )

    def gaps(self) -> tuple[CaptureGap, ...]:
        """What is missing so far."""
        return self._log.records()

    def add(self, snapshot: Snapshot) -> None:
        """Take a snapshot in."""
        partial = self._partial_sites(snapshot)
        counts: Int64 = np.sum([copy.counts.numpy() for copy in snapshot.copies], axis=0)
        masses = [copy.mass.numpy() for copy in snapshot.copies if copy.mass is not None]
        mass: Float64 | None = np.sum(masses, axis=0) if masses else None
        size = self._layout.slot_size
        for slot, shown_phase in enumerate(SLOTS):
            phase, part = snapshot.stated_phase or shown_phase, slice(slot * size, (slot + 1) * size)
            for group in self._groups:
                self._add_slot(
                    group, phase, snapshot, slot, counts[part], None if mass is None else mass[part], partial
                )
            self._add_samples(snapshot, slot, phase)
        self._add_bypassed(snapshot, counts)
        if snapshot.ends_step:
            self._sampled.clear()
            self._end_calls(snapshot)
            for group in self._groups:
                self._end_step(group, snapshot.step)

    def finish(self, step: int) -> None:
        """Close the window that was not complete when the run ended; ``step`` is the last one folded."""
        for group in self._groups:
            self._end_window(group, step)

    def drain(self) -> Iterator[tuple[str, pa.RecordBatch]]:
        """The finished rows as (table, rows), which are then forgotten."""
        self.finished_rows = 0
        for group in self._groups:
            finished, group.finished = group.finished, []
            if finished:
                yield "routing", self._batch(finished)
        samples, self._samples = self._samples, []
        for batch in samples:
            yield "tokens", batch

    def _partial_sites(self, snapshot: Snapshot) -> Bools:
        """Sites whose rows lack calls, or hold a call that ended in the middle; (sites,)."""
        partial: Bools = np.full(len(self._layers), snapshot.was_interrupted)
        if snapshot.was_interrupted:
            self._log.add("interrupted", snapshot.step)
        for loss in snapshot.losses:
            code = loss.code
            if code == "model_hooks_removed" and snapshot.stated_phase is None:
                code = "phase_hooks_removed"
            self._log.add(code, snapshot.step, site=loss.site, module=loss.module)
            if loss.site is not None and loss.code in _PARTIAL:
                partial[loss.site] = True
        self._explained |= partial | snapshot.is_split
        return partial

    def _add_bypassed(self, snapshot: Snapshot, counts: Int64) -> None:
        """State blocks that ran without the call that is read."""
        for site in np.flatnonzero(snapshot.bypassed & ~self._explained).tolist():
            start, experts = self._layout.starts[site], self._layout.experts[site]
            bins = counts.reshape(len(SLOTS), -1)[:, start : start + experts + 2]
            if bins.any() and not snapshot.calls[:, site].any():  # a CUDA graph was replayed
                continue
            self._log.add("bypassed", snapshot.step, site=site)
            self._explained[site] = True

    def _end_calls(self, snapshot: Snapshot) -> None:
        """State layers that were not called in a step, though they were before and their stack is."""
        called_now, self._called_now = self._called_now, {}
        explained, self._explained = self._explained, np.zeros_like(self._explained)
        has_losses = bool(snapshot.losses) or bool(explained.any())
        if not called_now and not (has_losses or snapshot.is_last):
            self._log.add("idle", snapshot.step)
        for phase, now in called_now.items():
            before = self._called.setdefault(phase, np.zeros_like(now))
            has_stack = np.isin(self._stacks, self._stacks[now])
            for site in np.flatnonzero(before & ~now & has_stack & ~explained).tolist():
                self._log.add("not_called", snapshot.step, site=site)
            before |= now
        calls_now, self._calls_now = self._calls_now, {}
        for phase, calls in calls_now.items():
            for stack in np.unique(self._stacks[called_now[phase]]).tolist():
                sites = np.flatnonzero((self._stacks == stack) & called_now[phase])
                if calls[sites].all() and not explained[sites].any():  # no replay of a CUDA graph
                    self._compare_calls(phase, stack, snapshot.step, sites, calls[sites])

    def _compare_calls(self, phase: str, stack: int, step: int, sites: Int64, calls: Int64) -> None:
        """State layers that were called less often in a step than others of their stack.

        Stacks whose layers are never called equally often are left alone: layers that share a module, say.
        """
        key, fewer = (phase, stack), sites[calls < calls.max()]
        if not fewer.size:
            self._is_even[key] = True
            first, fewer = self._uneven.pop(key, (step, fewer))
            step = first
        elif not self._is_even.get(key):
            self._uneven.setdefault(key, (step, fewer))
            return
        for site in fewer.tolist():
            self._log.add("called_less", step, site=site)

    def _add_slot(
        self,
        group: _Group,
        phase: str,
        snapshot: Snapshot,
        slot: int,
        counts: Int64,
        mass: Float64 | None,
        partial: Bools,
    ) -> None:
        bins = counts[group.starts[:, None] + np.arange(group.experts + 3)]
        entries = bins[:, :-1].sum(axis=1)
        tokens = (entries + bins[:, -1]) // np.maximum(snapshot.widths[group.sites], 1)
        present = (snapshot.calls[slot, group.sites] > 0) | (entries > 0) | (tokens > 0)
        if not present.any():
            return
        self.last_counted_step = max(self.last_counted_step, snapshot.step)
        self.counted_sites.update(group.sites[present].tolist())
        called = self._called_now.setdefault(phase, np.zeros(len(self._layers), dtype=bool))
        called[group.sites] |= present
        calls = self._calls_now.setdefault(phase, np.zeros(len(self._layers), dtype=np.int64))
        calls[group.sites] += snapshot.calls[slot, group.sites]
        gates = None if mass is None else mass[group.starts[:, None] + np.arange(1, group.experts + 1)]
        if gates is not None:
            unknown = ~np.isfinite(gates).all(axis=1)
            gates[unknown] = np.nan
            for site in group.sites[unknown].tolist():
                self._log.add("gate_mass", snapshot.step, site=site)
        new = _Counts(bins[:, 1:-2].copy(), tokens, present, present & partial[group.sites], gates)
        if phase in group.step:
            group.step[phase].include(new)
        else:
            group.step[phase] = new

    def _end_step(self, group: _Group, step: int) -> None:
        finished, group.step = group.step, {}
        if self._window_steps == 1:
            for phase, counts in finished.items():
                self._finish_rows(group, phase, step, counts, None)
            return
        for phase, counts in finished.items():
            if phase in group.windows:
                group.windows[phase].include(counts)
            else:
                group.windows[phase] = _Window.of_step(counts)
        if (step + 1) % self._window_steps == 0:
            self._end_window(group, step)

    def _end_window(self, group: _Group, step: int) -> None:
        first = step - step % self._window_steps
        for phase, window in group.windows.items():
            self._finish_rows(group, phase, first, window.total, window)
        group.windows = {}

    def _finish_rows(
        self, group: _Group, phase: str, step: int, counts: _Counts, window: _Window | None
    ) -> None:
        rows = int(counts.present.sum())
        self.finished_rows += rows
        self.all_rows += rows
        group.finished.append(
            _Rows(step=step, phase=phase, layers=group.layers, counts=counts, window=window)
        )

    def _batch(self, finished: Sequence[_Rows]) -> pa.RecordBatch:
        def stacked(values: Sequence[Any]) -> Any:
            return np.concatenate(
                [value[rows.counts.present] for value, rows in zip(values, finished, strict=True)]
            )

        sizes = [int(rows.counts.present.sum()) for rows in finished]
        windows = [rows.window for rows in finished if rows.window is not None]
        masses = [rows.counts.mass for rows in finished if rows.counts.mass is not None]
        return routing_rows(
            step_N=np.repeat([rows.step for rows in finished], sizes),
            phase_N=[rows.phase for rows, size in zip(finished, sizes, strict=True) for _ in range(size)],
            layer_N=stacked([rows.layers for rows in finished]),
            source_rank=self._rank,
            tokens_N=stacked([rows.counts.tokens for rows in finished]),
            load_NE=stacked([rows.counts.load for rows in finished]),
            gate_mass_NE=stacked(masses) if masses else None,
            partial_N=stacked([rows.counts.partial for rows in finished]),
            window_steps=stacked([window.steps for window in windows]) if windows else 1,
            step_load_min_NE=stacked([window.load_min for window in windows]) if windows else None,
            step_load_max_NE=stacked([window.load_max for window in windows]) if windows else None,
            step_max_over_mean_N=stacked([window.max_over_mean for window in windows]) if windows else None,
        )

    def _add_samples(self, snapshot: Snapshot, slot: int, phase: str) -> None:
        layout, size = self._layout, self._layout.sample_size
        for copy in snapshot.copies:
            if copy.sample is None:
                continue
            flat = copy.sample.numpy()[slot * size : (slot + 1) * size]
            if (flat == NO_SAMPLE).all():
                continue
            for site, (start, columns) in enumerate(
                zip(layout.sample_starts, layout.sample_columns, strict=True)
            ):
                ids_NK = flat[start : start + layout.sample_tokens * columns].reshape(-1, columns)
                ids_NK = ids_NK[(ids_NK != NO_SAMPLE).any(axis=1)]
                if ids_NK.size and (phase, site) not in self._sampled:
                    self._sampled.add((phase, site))
                    self._samples.append(self._sample_batch(snapshot.step, phase, site, ids_NK))
                    self.finished_rows += len(ids_NK)

    def _sample_batch(self, step: int, phase: str, site: int, ids_NK: NDArray[np.int32]) -> pa.RecordBatch:
        rows, real_NK = len(ids_NK), (ids_NK >= 0) & (ids_NK < self._layout.experts[site])
        ends = np.concatenate([[0], real_NK.sum(axis=1).cumsum()]).astype(np.int32)
        columns = [
            pa.array(np.full(rows, step)),
            pa.array([phase] * rows, pa.string()),
            pa.array(np.full(rows, self._layers[site], dtype=np.int32)),
            pa.array(np.full(rows, self._rank, dtype=np.int32)),
            pa.array(np.arange(rows)),
            pa.ListArray.from_arrays(pa.array(ends), pa.array(ids_NK[real_NK].astype(np.int32))),
        ]
        return pa.record_batch(columns, schema=TOKENS_SCHEMA)

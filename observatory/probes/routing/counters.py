"""Counters that live where the model runs.

Shapes: T tokens, K assignments per token, E experts, N sampled positions. One flat int64 buffer per device
holds every site's bins once per *slot*, a slot being a phase that the probe itself can know (``SLOTS``).
The address of a buffer never changes, so a replayed CUDA graph goes on counting into it.

A site's stretch of the buffer is ``[ids below 0 | E experts | ids of E and above | token correction]``.
Tokens cost no kernel of their own: a site whose calls carry W ids per token has (sum of bins) / W tokens;
calls that differ (masks, maps, another K) put the difference, times W, into the correction.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from observatory.probes.routing.kernels import Scales
from observatory.probes.routing.sites import RoutingSite

#: Phases that calls of a model show by themselves, in the order of the buffer.
SLOTS = ("unknown", "prefill", "decode", "train_forward")
#: Where tokens are counted that do not count (padding), in calls that state a slot for each token.
NO_SLOT = len(SLOTS)
#: Value of a sample entry that no token has filled.
NO_SAMPLE = int(np.iinfo(np.int32).min)
#: Ids that a sample keeps of a token where K varies; bounds the memory of a sample.
_MAX_SAMPLE_COLUMNS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where each site's numbers lie in the buffers of a device.

    Attributes:
        experts: E of each site.
        starts: first element of each site in a slot of the count buffer; E + 3 elements follow.
        slot_size: elements of one slot of the count buffer.
        sample_columns: ids kept per sampled token of each site.
        sample_starts: first element of each site in a slot of the sample buffer.
        sample_size: elements of one slot of the sample buffer.
        sample_tokens: N; 0 when nothing is sampled.
        gate_mass: whether gate weights are summed as well.
    """

    experts: tuple[int, ...]
    starts: tuple[int, ...]
    slot_size: int
    sample_columns: tuple[int, ...]
    sample_starts: tuple[int, ...]
    sample_size: int
    sample_tokens: int
    gate_mass: bool

    @classmethod
    def of_sites(cls, sites: Sequence[RoutingSite], *, sample_tokens: int, gate_mass: bool) -> Layout:
        """The layout of these sites."""
        experts = tuple(site.spec.experts for site in sites)
        columns = tuple(site.spec.top_k or min(site.spec.experts, _MAX_SAMPLE_COLUMNS) for site in sites)
        starts = np.cumsum([0, *(e + 3 for e in experts)])
        samples = np.cumsum([0, *(c * sample_tokens for c in columns)])
        return cls(
            experts=experts,
            starts=tuple(starts[:-1].tolist()),
            slot_size=int(starts[-1]),
            sample_columns=columns,
            sample_starts=tuple(samples[:-1].tolist()),
            sample_size=int(samples[-1]),
            sample_tokens=sample_tokens,
            gate_mass=gate_mass,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffers:
    """The tensors counted into: those of a whole device, or one site's part of them for one slot.

    Attributes:
        counts: int64; of a part: the E + 2 bins.
        correction: of a part: the token correction, one element; None for a whole device.
        mass: float64, gate mass in the places of ``counts``; None when not asked for.
        sample: int32; of a part: (N, columns). None when nothing is sampled.
    """

    counts: torch.Tensor
    mass: torch.Tensor | None
    sample: torch.Tensor | None
    correction: torch.Tensor | None = None


def part_of(whole: Buffers, layout: Layout, site: int, slot: int) -> Buffers:
    """Views of what belongs to one site and slot."""
    start, experts = slot * layout.slot_size + layout.starts[site], layout.experts[site]
    rows, columns = layout.sample_tokens, layout.sample_columns[site]
    first = slot * layout.sample_size + layout.sample_starts[site]
    return Buffers(
        counts=whole.counts.narrow(0, start, experts + 2),
        correction=whole.counts.narrow(0, start + experts + 2, 1),
        mass=None if whole.mass is None else whole.mass.narrow(0, start, experts + 2),
        sample=None
        if whole.sample is None
        else whole.sample.narrow(0, first, rows * columns).view(rows, columns),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCopy:
    """A device's counters as they stood at a boundary, on their way to the host.

    Attributes:
        counts: (slots, slot_size) int64 on the host.
        mass: the same for gate mass, float64; None when not asked for.
        sample: (slots, sample_size) int32; None when nothing is sampled.
        ready: event after which the tensors may be read; None when they may be read at once.
    """

    counts: torch.Tensor
    mass: torch.Tensor | None
    sample: torch.Tensor | None
    ready: torch.cuda.Event | None

    def has_arrived(self) -> bool:
        """Whether the tensors may be read; does not block."""
        return self.ready is None or bool(self.ready.query())  # type: ignore[no-untyped-call]  # likewise

    def wait(self) -> None:
        """Block until the tensors may be read."""
        if self.ready is not None:
            self.ready.synchronize()


class DeviceCounters:
    """The buffers of one device.

    A lock serialises additions on the CPU, where two threads adding in place would lose counts; on a GPU
    the additions are atomic.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.device = device
        self.layout = layout
        self.lock = threading.Lock()
        self._streams: set[torch.cuda.Stream] = set()
        slots = len(SLOTS)
        with torch.inference_mode(False), torch.no_grad():
            self.scales = Scales(device)
            for experts in set(layout.experts):
                self.scales.prepare(experts)
            self.counts = torch.zeros((slots + 1) * layout.slot_size, dtype=torch.int64, device=device)
            self.mass = (
                torch.zeros(slots * layout.slot_size, dtype=torch.float64, device=device)
                if layout.gate_mass
                else None
            )
            self.sample = (
                torch.full((slots * layout.sample_size,), NO_SAMPLE, dtype=torch.int32, device=device)
                if layout.sample_tokens
                else None
            )
            whole = Buffers(counts=self.counts, mass=self.mass, sample=self.sample)
            self.parts = [
                [part_of(whole, layout, site, slot) for site in range(len(layout.experts))]
                for slot in range(slots)
            ]
            self.slots = [self.counts.narrow(0, s * layout.slot_size, layout.slot_size) for s in range(slots)]

    def note_stream(self) -> None:
        """Remember the stream the model runs on, so that ``snapshot`` is ordered after it."""
        if self.device.type == "cuda":
            self._streams.add(torch.cuda.current_stream(self.device))

    def snapshot(self) -> HostCopy:
        """Copy the counters to the host and zero them, in stream order and without waiting for the device."""
        counted = self.counts.narrow(0, 0, len(SLOTS) * self.layout.slot_size)
        buffers = (counted, self.mass, self.sample)
        if self.device.type == "cuda":
            return self._snapshot_cuda(buffers)
        with self.lock, torch.no_grad():
            copies = [None if b is None else b.to("cpu", copy=True) for b in buffers]
            self._clear()
        counts, mass, sample = copies
        assert counts is not None
        return HostCopy(counts=counts, mass=mass, sample=sample, ready=None)

    def _snapshot_cuda(self, buffers: tuple[torch.Tensor | None, ...]) -> HostCopy:
        with torch.cuda.device(self.device), torch.no_grad():
            current = torch.cuda.current_stream(self.device)
            others = [stream for stream in self._streams if stream != current]
            for stream in others:
                current.wait_stream(stream)
            copies: list[torch.Tensor | None] = []
            for buffer in buffers:
                if buffer is None:
                    copies.append(None)
                    continue
                host = torch.empty(buffer.shape, dtype=buffer.dtype, pin_memory=True)
                copies.append(host.copy_(buffer, non_blocking=True))
            self._clear()
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch does not annotate it
            ready.record(current)
            for stream in others:
                stream.wait_stream(current)
        counts, mass, sample = copies
        assert counts is not None
        return HostCopy(counts=counts, mass=mass, sample=sample, ready=ready)

    def _clear(self) -> None:
        self.counts.zero_()
        if self.mass is not None:
            self.mass.zero_()
        if self.sample is not None:
            self.sample.fill_(NO_SAMPLE)

"""The exchange probe: from the first to the last exchange of a watch.

It issues no collective and waits for none that the program does not wait for anyhow; what it cannot
understand it leaves alone and says so at the next step.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import JsonValue
from torch import nn

from observatory.probes.exchange.attribution import Attribution, LayerCall, Place, in_backward
from observatory.probes.exchange.labels import ExchangeRecord, ExchangeSink, Label, current_label
from observatory.probes.exchange.tap import listen, pause_listening, unlisten
from observatory.probes.part import Boundary, Part
from observatory.probes.routing.integrity import Loss
from observatory.probes.routing.sites import RoutingSite
from observatory.probes.timeline.flight import FlightRecorder
from observatory.probes.timeline.groups import GroupFacts, Groups
from observatory.probes.timeline.issue import Issue, Mark, Side
from observatory.probes.timeline.log import ExchangeEntry, ExchangeLog, Seen, SpanEntry
from observatory.probes.timeline.streams import Anchors, is_capturing, mark_now

#: Name of the span around one call of an MoE block.
BLOCK_SPAN = "moe_layer"
#: Backends whose exchanges pass the tap, where their end is known better: they must not be counted twice.
_TAPPED = frozenset({"gloo", "nccl", "ucc", "mpi-torch"})
_CPU = torch.device("cpu")

#: The phase that the program states, the call of compiled code, the phase of the model's call in progress,
#: and whether autograd runs a graph. What the phase is shows when all before it has been looked at.
_Situation = tuple[str | None, LayerCall | None, str, bool]


class ExchangeProbe(Part):
    """Runs from ``attach`` to ``detach``.

    Args:
        model: the model.
        sites: its MoE layers.
        log: takes what is seen; its owner closes it.
        anchors: of the host's clock, of the same owner.
        situation: step and stated phase (None when none was stated) of what happens now.
        phase_now: phase of the model's call in progress as far as it is known.
        flight_recorder: the second source that the log reads, for what it costs; None without.

    Attributes:
        sink: takes the exchanges of transports that do not use ``torch.distributed``, and spans.
        calls: exchanges seen.
        captured_calls: exchanges recorded into CUDA graphs, whose replays cannot be seen.
        host_ns: host time that these cost beyond their own, nanoseconds.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[RoutingSite],
        log: ExchangeLog,
        anchors: Anchors,
        *,
        situation: Callable[[], tuple[int, str | None]],
        phase_now: Callable[[], str],
        flight_recorder: FlightRecorder | None = None,
    ) -> None:
        self.calls = 0
        self.captured_calls = 0
        self.host_ns = 0
        self._model, self._sites = model, tuple(sites)
        self._stated = situation
        self._phase_now = phase_now
        self._groups = Groups()
        self._anchors = anchors
        self._error: Exception | None = None
        self._flight_recorder = flight_recorder
        self._log = log
        self._attribution = Attribution(mark=self._mark, note_span=self._note_span)
        self.sink: ExchangeSink = RunSink(self._log.add, self._situation)

    def attach(self) -> None:
        """Start.

        Raises:
            CaptureError: this build of torch cannot be listened to.
        """
        self._attribution.attach(self._model, self._sites)
        listen(self)

    def pause(self) -> None:
        """Hear of no exchange until ``resume``."""
        pause_listening(self)
        self._attribution.pause()

    def resume(self) -> None:
        """Hear of them again."""
        self._attribution.resume()
        listen(self)

    def detach(self, *, failed: bool = False) -> None:
        """End: everything is as before; doing it twice does nothing."""
        del failed
        unlisten(self)
        self._attribution.detach()

    def abandon(self) -> None:
        """End, which concerns this process only."""
        self.detach()

    def boundary(self, boundary: Boundary) -> None:
        """Put hooks on again that another library has taken off, and state it; layers end here."""
        if self._attribution.restore_hooks():
            boundary.losses.append(Loss(code="exchange_hooks_removed"))
        self._attribution.boundary()

    def routed(self, layer: int, phase: str) -> None:
        """A layer has routed in this phase, on this thread."""
        self._attribution.routed(layer, phase)

    def problem(self) -> str | None:
        """One line about the first thing that went wrong; None when nothing did."""
        if self._error is not None:
            return f"an exchange could not be understood: {type(self._error).__name__}: {self._error}"
        return None

    def notes(self, *, steps: int) -> tuple[str, ...]:
        """Exchanges that could not be timed."""
        del steps
        if not self.captured_calls:
            return ()
        return (
            f"{self.captured_calls} exchanges were recorded into CUDA graphs, whose replays are not timed",
        )

    def cost(self) -> dict[str, JsonValue]:
        """What watching cost on the host, measured while it ran."""
        mean_us = round(self.host_ns / self.calls / 1000, 3) if self.calls else None
        cost: dict[str, JsonValue] = {"exchanges": self.calls, "host_us_per_exchange": mean_us}
        if self._flight_recorder is not None:
            reads = self._flight_recorder.reads
            cost["recorder_reads"] = reads
            cost["recorder_ms_per_read"] = (
                round(self._flight_recorder.read_ns / reads / 1e6, 3) if reads else None
            )
        return cost

    def issued(self, issue: Issue, group: Any) -> None:
        """Called for every exchange."""
        facts = self._groups.facts(group)
        backend = self._groups.backend(group, facts, issue.device)
        number = None if backend.number is None else backend.number(group)
        step, stated = self._stated()
        place = self._attribution.here()
        seen = _SeenExchange(
            self,
            issue,
            step,
            stated,
            self._phase_now(),
            current_label(),
            place,
            facts,
            next(facts.numbers),
            backend.name,
            number,
        )
        if not self._log.add(seen) and place[0] is not None:
            place[0].is_torn = True
        if type(issue.start) is not int and not self._anchors.has_anchor(issue.device):
            self._anchors.drop_anchor(issue.device)

    def placed(self, seen: _SeenExchange) -> ExchangeEntry | None:
        """Where in the run it belongs; called in the exchanges' order, on the thread that writes rows."""
        label, place, issue = seen.label, seen.place, seen.issue
        _call, _layer, _routed, loose, in_graph, _number = place
        try:
            algorithm = issue.algorithm
            phase = _phase(
                seen.stated, loose, seen.phase_now, in_graph or (label is not None and label.backward)
            )
            if label is None:
                role, layer = self._attribution.find(issue, seen.group.label, place)
            else:
                role, layer, algorithm = label.role, label.layer, label.algorithm or algorithm
        except Exception as error:  # as in the kernel: the others must not suffer from one
            self.broken(error)
            return None
        return ExchangeEntry(
            issue=issue,
            step=seen.step,
            phase=phase,
            layer=layer,
            role=role,
            algorithm=algorithm,
            group=seen.group,
            sequence=seen.sequence,
            backend=seen.backend,
            backend_sequence=seen.backend_sequence,
        )

    def untimed(self) -> None:
        """Called for every exchange that is recorded into a CUDA graph."""
        self.captured_calls += 1

    def broken(self, error: Exception) -> None:
        """Called when an exchange could not be read."""
        self._error = self._error or error

    def spent(self, ns: int) -> None:
        """Called after every exchange."""
        self.calls += 1
        self.host_ns += ns

    def _situation(self) -> tuple[int, _Situation]:
        """Step of what happens now on this thread, and what its phase follows from."""
        step, stated = self._stated()
        return step, (stated, self._attribution.loose(), self._phase_now(), in_backward())

    def _mark(self, device: torch.device) -> Mark | None:
        if device.type != "cuda":
            return time.monotonic_ns()
        if is_capturing(device):
            return None
        if not self._anchors.has_anchor(device):
            self._anchors.drop_anchor(device)
        return mark_now(device)

    def _note_span(self, layer: int, device: torch.device, start: Mark) -> None:
        end = self._mark(device)
        if end is not None:
            step, situation = self._situation()
            self._log.add(_SeenEntry(SpanEntry(BLOCK_SPAN, step, "", layer, device, start, end), situation))


@dataclass(slots=True)
class _SeenExchange:
    """What is seen of an exchange on the program's thread.

    Attributes:
        probe: that saw it.
        issue: the exchange.
        step, stated, phase_now: what it happened in; the phase that the program stated, and the one it seems.
        label: that the program put on it.
        place: where in the model.
        group, sequence: the group, and its number there.
        backend, backend_sequence: the backend, and the number there.
    """

    probe: ExchangeProbe
    issue: Issue
    step: int
    stated: str | None
    phase_now: str
    label: Label | None
    place: Place
    group: GroupFacts
    sequence: int
    backend: str
    backend_sequence: int | None

    def placed(self) -> ExchangeEntry | None:
        """As an entry of the log."""
        return self.probe.placed(self)


@dataclass(slots=True)
class _SeenEntry:
    """An entry of which only the phase is not known yet."""

    entry: ExchangeEntry | SpanEntry
    situation: _Situation

    def placed(self) -> ExchangeEntry | SpanEntry:
        """As an entry of the log."""
        self.entry.phase = _phase(*self.situation)
        return self.entry


def _phase(stated: str | None, loose: LayerCall | None, phase_now: str, in_backward: bool) -> str:
    """Phase of what happens in this situation (``_Situation``)."""
    if in_backward and stated in (None, "train_forward"):
        return "train_backward"
    compiled = None if loose is None or loose.is_over else loose.phase
    return stated or compiled or phase_now


class RunSink:
    """Takes what dispatchers report (``labels.ExchangeSink``): spans, and exchanges that no tap sees."""

    def __init__(
        self, add: Callable[[Seen], object], situation: Callable[[], tuple[int, _Situation]]
    ) -> None:
        self._add = add
        self._situation = situation

    @contextlib.contextmanager
    def span(self, name: str, layer: int | None) -> Iterator[None]:
        """Around one phase of one layer."""
        start_ns = time.monotonic_ns()
        try:
            yield
        finally:
            step, situation = self._situation()
            entry = SpanEntry(name, step, "", layer, _CPU, start_ns, time.monotonic_ns())
            self._add(_SeenEntry(entry, situation))

    def record(self, record: ExchangeRecord) -> None:
        """After one exchange."""
        if record.backend in _TAPPED:
            return
        step, situation = self._situation()
        sends, receives = tuple(record.send_bytes), tuple(record.receive_bytes)
        issue = Issue(
            algorithm=record.algorithm or "all_to_all",
            device=_CPU,
            dtype=torch.uint8,
            send=Side((len(sends),), 1, sends, True),
            receive=Side((len(receives),), 1, receives, True),
            start=record.start_ns,
        )
        issue.finish(record.end_ns)
        entry = ExchangeEntry(
            issue=issue,
            step=step,
            phase="",
            layer=record.layer,
            role=record.role,
            algorithm=issue.algorithm,
            group=GroupFacts(record.group, None, len(sends)),
            sequence=record.sequence,
            backend=record.backend,
        )
        self._add(_SeenEntry(entry, situation))

"""One capture: its parts, attached one after the other, and asked together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import JsonValue
from torch import nn

from observatory.errors import CaptureError, ModelError
from observatory.probes.exchange.labels import ExchangeSink, NullSink
from observatory.probes.exchange.probe import ExchangeProbe
from observatory.probes.options import WatchOptions
from observatory.probes.part import Boundary, Part
from observatory.probes.power.watched import WatchedPower
from observatory.probes.routing.auxiliary_loss import AuxiliaryLoss
from observatory.probes.routing.bias import RouterBias
from observatory.probes.routing.part import RoutingPart
from observatory.probes.routing.sites import RoutingSite
from observatory.probes.self_measurement import SelfMeasurement
from observatory.probes.store_alignment import WatchedTimeBase
from observatory.probes.timeline.flight import FlightRecorder
from observatory.probes.timeline.log import ExchangeLog
from observatory.probes.timeline.phase_spans import PhaseSpans
from observatory.probes.timeline.streams import Anchors
from observatory.run import RunWriter
from observatory.run.manifest import SelfMeasured

#: How long the guard of a rank waits for each part; it has 2 s for all its writing.
_HURRY_S = 0.5
#: Between two words on what watching costs.
_COST_S = 30.0

AnyPart = TypeVar("AnyPart", bound=Part)


class CaptureSession:
    """Runs from construction, when all parts are attached, until ``stop``.

    Args:
        model: the model.
        sites: its MoE layers.
        writer: of the run.
        options: what the watch was asked for.
        exchanges: time exchanges.
        store: through which ranks align their time bases; None where they do not.
        situation: step and stated phase of what happens now.

    Attributes:
        routing: the part that counts.
        sink: where dispatchers report what they do; takes nothing when exchanges are not watched.

    Raises:
        CaptureError: a part cannot be attached; none is left behind.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[RoutingSite],
        writer: RunWriter,
        options: WatchOptions,
        *,
        exchanges: bool,
        store: Any | None,
        situation: Callable[[], tuple[int, str | None]],
    ) -> None:
        self._parts: list[Part] = []
        self._writer = writer
        self._cost = SelfMeasurement(self._parts, writer)
        self._cost_due_s = 0.0
        self._is_interrupted = False
        self._has_raised = False
        self._time_base: WatchedTimeBase | None = None
        self.sink: ExchangeSink = NullSink()
        try:
            # Power first: its calibration wants a device that is still idle.
            self._attach(WatchedPower(model, writer, options.where, options.power, flush_s=options.flush_s))
            if store is not None:
                timeout_s = options.exchange.clock_timeout_s
                self._time_base = self._attach(
                    WatchedTimeBase(writer, store, options.where, timeout_s=timeout_s)
                )
            self.routing = self._attach(RoutingPart(model, sites, writer, options.routing))
            self._attach(RouterBias(model, self.routing, writer, options))
            self._attach(AuxiliaryLoss(model, self.routing, writer))
            anchors = Anchors()
            second = FlightRecorder() if exchanges and options.exchange.flight_recorder else None
            log = self._attach(ExchangeLog(writer, anchors, flush_s=options.flush_s, recorder=second))
            self.phase_spans = self._attach(PhaseSpans(log.add, anchors, self.routing.device))
            if exchanges:
                probe = ExchangeProbe(
                    model,
                    self.routing.sites,
                    log,
                    anchors,
                    situation=situation,
                    phase_now=self.routing.phase_now,
                    flight_recorder=second,
                )
                self.routing.on_routed(probe.routed)
                self.sink = self._attach(probe).sink
            flusher = self._attach(self.routing.row_writer(writer, flush_s=options.flush_s))
            flusher.on_flush = self._state_cost
        except BaseException:
            self._detach(failed=True)
            self._close()
            raise
        self._cost.resume()

    def boundary(self, step: int, *, phase: str | None, ends_step: bool, is_last: bool = False) -> None:
        """Hand over what was captured since the last boundary; ``phase`` is None if the caller stated none.

        The last one is at the end of the watch: nothing need have been called before it.

        Raises:
            CaptureError: inside the capture of a CUDA graph, or the device has failed.
        """
        boundary = Boundary(
            step=step,
            phase=phase,
            ends_step=ends_step,
            is_last=is_last,
            was_interrupted=self._is_interrupted,
        )
        try:
            with self._cost.step_end(ends_step=ends_step):
                for part in self._parts:
                    part.boundary(boundary)
        except CaptureError:
            raise
        except Exception as error:  # after a device-side assertion every call of the device fails
            reason = f"{type(error).__name__}: {error}"
            raise CaptureError(f"what was counted since the last boundary is lost: {reason}") from error
        self._is_interrupted = False

    def note_interruption(self) -> None:
        """The part of the step that is taken next ended in the middle."""
        self._is_interrupted = True

    def note_time_base(self) -> None:
        """The program has stated the alignment of its ranks itself."""
        if self._time_base is not None:
            self._time_base.is_stated = True

    def check(self) -> None:
        """Raise what has gone wrong, once; the watched model's own run is not affected by it.

        Raises:
            CaptureError: a call could not be read, or rows could not be kept.
            ModelError: what was read is not what the model dispatches.
        """
        problem = self.problem()
        if problem is not None and not self._has_raised:
            self._has_raised = True
            raise (CaptureError if self.routing.refusal() is None else ModelError)(problem)

    def problem(self) -> str | None:
        """One line about the first thing that went wrong; None when nothing did."""
        return next((problem for part in self._parts if (problem := part.problem()) is not None), None)

    def pause(self) -> None:
        """Capture nothing from the end of a step on."""
        with self._cost.step_end(ends_step=False):
            for part in reversed(self._parts):
                part.pause()
        self._cost.pause()

    def resume(self, step: int) -> None:
        """Capture again, from the start of this step on.

        Raises:
            CaptureError: as of `boundary`.
        """
        self._cost.resume()
        with self._cost.step_end(ends_step=False):
            for part in self._parts:
                part.resume()
        self.boundary(step, phase=None, ends_step=False)  # the time without capture belongs to no phase

    def stop(self, step: int, *, phase: str | None, failed: bool) -> None:
        """Take the hooks off, write everything, end the threads and processes.

        Args:
            step: the step that was not ended.
            phase: the phase that the caller stated for it.
            failed: the program ended by an exception.

        Raises:
            CaptureError: what was counted since the last boundary could not be taken.
        """
        self._cost.pause()
        self._detach(failed=failed)
        try:
            self.boundary(step, phase=phase, ends_step=True, is_last=True)
        finally:
            self._close()

    def measured(self) -> SelfMeasured:
        """What watching has cost so far, from any thread; final after ``stop``."""
        return self._cost.now()

    def hurry(self) -> None:
        """Write what has arrived, from any thread while the program may hang."""
        for part in self._parts:
            part.hurry(_HURRY_S)

    def abandon(self) -> None:
        """Take the hooks off and write nothing: what a forked child does with its parent's capture."""
        for part in reversed(self._parts):
            part.abandon()

    def notes(self, *, steps: int) -> tuple[str, ...]:
        """Stated limits of what was captured; final after ``stop``."""
        return tuple(note for part in self._parts for note in part.notes(steps=steps))

    def quiet_notes(self) -> tuple[str, ...]:
        """What a reader of the run should know and no user needs to be warned of; final after ``stop``."""
        return tuple(note for part in self._parts for note in part.quiet_notes())

    def config(self) -> dict[str, JsonValue]:
        """What the manifest's configuration gains: what the parts did, and what they cost."""
        cost = {name: value for part in self._parts for name, value in part.cost().items()}
        config = {name: value for part in self._parts for name, value in part.config().items()}
        return {"probe_cost": cost, **config}

    def _state_cost(self) -> None:
        """On the thread that has flushed: each word is a file, so not after every flush."""
        now_s = time.monotonic()
        if now_s >= self._cost_due_s and (measured := self.measured()).steps:
            self._cost_due_s = now_s + _COST_S
            self._writer.set_self_measured(measured)

    def _attach(self, part: AnyPart) -> AnyPart:
        self._parts.append(part)
        part.attach()
        return part

    def _detach(self, *, failed: bool) -> None:
        for part in reversed(self._parts):
            part.detach(failed=failed)

    def _close(self) -> None:
        with ExitStack() as stack:  # each is closed, whatever happens to another
            for part in self._parts:
                stack.callback(part.close)


@dataclass(eq=False, frozen=True, slots=True, kw_only=True)
class WatchedShard:
    """The shard of a watch, as :class:`observatory.hpc.rank_guard.Shard`: its main thread may hang.

    Attributes:
        writer: writes it.
        session: captures into it; None before it has begun.
        steps: steps that the watch has ended.
    """

    writer: RunWriter
    session: Callable[[], CaptureSession | None]
    steps: Callable[[], int]

    def mark(self, reason: str) -> None:
        """State first that the rank is about to end: it may be killed meanwhile."""
        self.writer.mark_ending(reason, steps=self.steps())
        self._hurry()
        self.writer.mark_ending(reason, steps=self.steps())

    def close(self, reason: str) -> None:
        """Close as failed, with what has arrived."""
        self._hurry()
        self.writer.close(state="failed", error=reason, steps=self.steps())

    def _hurry(self) -> None:
        session = self.session()
        if session is not None:
            session.hurry()

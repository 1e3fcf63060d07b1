"""One capture: a probe, the thread that empties it, and the writer it ends up in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate

from pydantic import JsonValue
from torch import nn

from observatory.errors import CaptureError, ModelError
from observatory.probes.exchange.labels import NoRecorder, Recorder
from observatory.probes.exchange.probe import ExchangeProbe
from observatory.probes.routing.accumulation import Folder, Snapshot
from observatory.probes.routing.adapters import Adapter
from observatory.probes.routing.counters import SLOTS
from observatory.probes.routing.flushing import Flusher
from observatory.probes.routing.integrity import Loss
from observatory.probes.routing.judgement import Verify
from observatory.probes.routing.probe import RoutingProbe
from observatory.probes.routing.sites import RoutingSite, may_drop_inside
from observatory.probes.timeline.flight import FlightRecorder
from observatory.probes.timeline.log import ExchangeLog
from observatory.probes.timeline.phase_spans import PhaseSpans
from observatory.probes.timeline.streams import Anchors
from observatory.run import RunWriter
from observatory.run.manifest import CaptureGap, Verified

_MAX_NAMED = 6


class CaptureSession:
    """Runs from construction, when the hooks are on, until ``stop``."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[RoutingSite],
        writer: RunWriter,
        *,
        gate_mass: bool = False,
        sample_tokens: int = 0,
        verify: Verify = "first",
        window_steps: int = 1,
        flush_seconds: float = 10.0,
        exchanges: bool = False,
        phase_spans: bool = False,
        flight_recorder: bool = False,
        situation: Callable[[], tuple[int, str | None]] = lambda: (0, None),
        adapters: Sequence[Adapter] = (),
    ) -> None:
        self._writer = writer
        self._probe = RoutingProbe(
            model,
            sites,
            gate_mass=gate_mass,
            sample_tokens=sample_tokens,
            verify=verify,
            adapters=adapters,
        )
        self._repeated = _repeated(model, sites)
        specs = [site.spec for site in sites]
        self._folder = Folder(self._probe.layout, specs, rank=writer.rank, window_steps=window_steps)
        self._flusher = Flusher(writer, self._folder, flush_seconds=flush_seconds)
        self._told_problem = False
        self._is_interrupted = False
        self._exchange: ExchangeProbe | None = None
        self._phases: PhaseSpans | None = None
        self._ended: str | None = None  # the phase told at the last end of a step, until another boundary
        self._log: ExchangeLog | None = None
        self._anchors = Anchors()
        try:
            self._probe.attach()
            recorder = FlightRecorder() if exchanges and flight_recorder else None
            if exchanges or phase_spans:
                self._log = ExchangeLog(writer, self._anchors, flush_seconds=flush_seconds, recorder=recorder)
            if phase_spans and self._log is not None:
                self._phases = PhaseSpans(self._log.add, self._anchors, self._probe.main_device)
            if exchanges and self._log is not None:
                self._exchange = self._watch_exchanges(model, self._log, recorder, situation)
        except BaseException:
            self._probe.detach()
            self._probe.release()
            self._flusher.close()
            if self._log is not None:
                self._log.close()
            raise

    @property
    def last_step(self) -> int:
        """The last step that anything was counted in; -1 when nothing was. Final after ``stop``."""
        return self._folder.last_counted_step

    @property
    def sites(self) -> Sequence[RoutingSite]:
        """The MoE layers as they are watched now: modules may have been replaced."""
        return self._probe.sites

    def gaps(self) -> tuple[CaptureGap, ...]:
        """What was not captured, or not as a whole; final after ``stop``.

        An idle step has lost calls where there are copies, which may have run instead.
        """
        found, has_copies = self._folder.gaps(), self._probe.was_copied()
        return tuple(
            gap.model_copy(update={"loses_rows": True}) if has_copies and gap.code == "idle" else gap
            for gap in found
        )

    def note_interruption(self) -> None:
        """The part of the step that is taken next ended in the middle."""
        self._is_interrupted = True

    @property
    def recorder(self) -> Recorder:
        """Where dispatchers tell what they do; takes nothing when exchanges are not watched."""
        return NoRecorder() if self._exchange is None else self._exchange.recorder

    def boundary(self, step: int, *, told: str | None, ends_step: bool, is_last: bool = False) -> None:
        """Hand over what was counted since the last boundary; ``told`` is its phase if the caller said so.

        The last one is at the end of the watch: nothing need have been called before it.

        Raises:
            CaptureError: inside the capture of a CUDA graph, or the device has failed.
        """
        try:
            counted = self._probe.take(step=step, told=told, ends_step=ends_step)
            was_interrupted = counted.was_interrupted or self._is_interrupted
            losses = counted.losses
            if self._exchange is not None and self._exchange.restore_hooks():
                losses = (*losses, Loss(code="exchange_hooks_removed"))
            counted = replace(counted, losses=losses, was_interrupted=was_interrupted, is_last=is_last)
            self._is_interrupted = False
            if self._phases is not None:
                # `with watch.phase(p): ...; watch.step()` leaves the end of the block after its last step.
                tail = not ends_step and told == self._ended and not any(c.any() for c in counted.calls)
                self._phases.boundary(step, None if tail else told or _only_phase(counted))
                self._ended = told if ends_step else None
            self._anchors.renew()
            if self._probe.refusal() is None:
                self._flusher.submit(counted)
        except CaptureError:
            raise
        except Exception as error:  # after a device-side assertion every call of the device fails
            reason = f"{type(error).__name__}: {error}"
            raise CaptureError(f"what was counted since the last boundary is lost: {reason}") from error
        if self._exchange is not None:
            self._exchange.boundary()

    def check(self) -> None:
        """Raise what has gone wrong, once; the watched model's own run is not affected by it.

        Raises:
            CaptureError: a call could not be read, or rows could not be kept.
            ModelError: what was read is not what the model dispatches.
        """
        problem = self.problem()
        if problem is not None and not self._told_problem:
            self._told_problem = True
            raise (CaptureError if self._probe.refusal() is None else ModelError)(problem)

    def problem(self) -> str | None:
        """One line about the first thing that went wrong; None when nothing did."""
        parts = (self._probe, self._flusher, self._exchange, self._log)
        return next((problem for part in parts if part is not None and (problem := part.problem())), None)

    def stop(self, step: int, *, told: str | None) -> None:
        """Take the hooks off, write everything, end the thread.

        Raises:
            CaptureError: what was counted since the last boundary could not be taken.
        """
        if self._exchange is not None:
            self._exchange.stop()
        self._probe.look()
        self._probe.detach()
        try:
            self.boundary(step, told=told, ends_step=True, is_last=True)
        finally:
            self._probe.release()
            self._flusher.close()
            if self._log is not None:
                self._log.close()

    def hurry(self, timeout_s: float) -> None:
        """Write what has arrived, from any thread while the program may hang, waiting no longer than that."""
        self._flusher.hurry(timeout_s)
        if self._log is not None:
            self._log.hurry(timeout_s)

    def abandon(self) -> None:
        """Take the hooks off and write nothing: what a forked child does with its parent's capture."""
        if self._exchange is not None:
            self._exchange.stop()
        self._probe.detach()
        self._probe.release()

    def notes(self, *, steps: int) -> tuple[str, ...]:
        """Stated limits of what was captured; final after ``stop``.

        Args:
            steps: steps that the caller ended.
        """
        probe, notes = self._probe, list[str]()
        seen = self._folder.counted_sites
        states = [(site.spec.module, c) for site, c in zip(probe.sites, probe.counters, strict=True)]
        silent = [name for name, c in states if not c.ever_called and c.index not in seen]
        silent = silent if probe.refusal() is None else []
        if len(silent) == len(probe.sites) and (probe.phases.model_called or steps or probe.was_copied()):
            notes.append(
                "nothing was counted: no watched module was called; a CUDA graph captured or a model "
                "exported before the watch began does not show its routing"
            )
        elif silent and (probe.phases.model_called or steps):
            notes.append(f"never called, so without rows: {_named(silent)}")
        if self._repeated:
            notes.append(
                "part of the model in several places, whose calls add up in one layer: "
                f"{_named(self._repeated)}"
            )
        dropping = [
            site.spec.module
            for site, verdict in zip(probe.sites, probe.verified(), strict=True)
            if may_drop_inside(site) and verdict.by != "rows"
        ]
        if dropping:
            notes.append(
                "experts that state a capacity may drop assignments after they are given them, which is not "
                f"seen: {_named(dropping)}"
            )
        if contradicted := probe.contradicted():
            notes.append(
                "the gates are counted, but the experts compute other tokens than they say: "
                f"{_named(contradicted)}"
            )
        vague = [name for name, c in states if c.tokens_unknown]
        if vague:
            notes.append(f"tokens is 0 where calls do not tell how many there were: {_named(vague)}")
        notes += probe.phases.notes(given_a_cache=True)
        if self.last_step >= 0 and steps == 0:
            notes.append("watch.step() was never called: the whole run is one step")
        for part in (self._exchange, self._log):
            notes += () if part is None else part.notes()
        return tuple(notes)

    def verified(self) -> tuple[Verified, ...]:
        """What confirmed the counts of each site."""
        return self._probe.verified()

    def quiet_notes(self) -> tuple[str, ...]:
        """What a reader of the run should know and no user needs to be warned of; final after ``stop``."""
        notes = [*self._probe.phases.notes(given_a_cache=False)]
        if repeated := self._probe.repeated():
            notes.append(
                "called more than once in one call of the model, so that tokens are calls times tokens: "
                f"{_named(repeated)}"
            )
        if self._probe.was_copied():
            notes.append("watched modules were copied or pickled; calls of copies are not counted")
        return tuple(notes)

    def cost(self) -> dict[str, JsonValue]:
        """What the hooks cost on the host, measured while they ran; compiled calls are not timed."""
        calls = self._probe.layer_calls
        return {
            "eager_layer_calls": calls,
            "host_us_per_layer_call": round(self._probe.host_ns / calls / 1000, 3) if calls else None,
            **({} if self._exchange is None else self._exchange.cost()),
        }

    def _watch_exchanges(
        self,
        model: nn.Module,
        log: ExchangeLog,
        recorder: FlightRecorder | None,
        situation: Callable[[], tuple[int, str | None]],
    ) -> ExchangeProbe:
        probe = self._probe
        exchange = ExchangeProbe(
            log,
            self._anchors,
            situation=situation,
            known_phase=lambda: SLOTS[probe.phases.slot],
            flight_recorder=recorder,
        )
        for site, counter in zip(probe.sites, probe.counters, strict=True):
            counter.on_call = partial(_routed, exchange, site.spec.layer)
        exchange.attach(model, probe.sites)
        return exchange


def _only_phase(counted: Snapshot) -> str | None:
    """The phase of everything that was called, if it is one and known."""
    slots = [slot for slot, calls in enumerate(counted.calls) if calls.any()]
    return SLOTS[slots[0]] if len(slots) == 1 else None


def _routed(exchange: ExchangeProbe, layer: int, slot: int) -> None:
    exchange.routed(layer, SLOTS[slot])


def _repeated(model: nn.Module, sites: Sequence[RoutingSite]) -> list[str]:
    """Names of the watched modules that are, or are inside of, a module with more than one parent."""
    parents = Counter(id(child) for module in model.modules() for child in module._modules.values())
    modules = dict(model.named_modules())
    return [
        site.spec.module
        for site in sites
        if any(
            parents[id(modules[path])] > 1 for path in accumulate(site.spec.module.split("."), "{}.{}".format)
        )
    ]


def _named(modules: Sequence[str]) -> str:
    shown = ", ".join(modules[:_MAX_NAMED])
    return shown if len(modules) <= _MAX_NAMED else f"{shown} and {len(modules) - _MAX_NAMED} more"

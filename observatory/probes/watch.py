"""Count the routing of a running model into a run directory; ``observatory.watch`` makes a :class:`Watch`.

    with observatory.watch(model, "runs/a") as watch:
        with watch.phase("prefill"):
            model(**batch)
        watch.step()

Leaving the block writes what is left and takes every hook off, also after an exception or Ctrl-C; the run is
then marked failed and keeps what was captured. No signal handlers are installed: SIGTERM ends the process as
it does without us. A process that is killed loses at most the last ``flush_s`` (and, on a GPU, the step
whose copy had not arrived). A forked child captures nothing and leaves the run alone.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from observatory.errors import CaptureError, ModelError, ObservatoryError, RunError
from observatory.host.provenance import find_rank_provenance, new_manifest
from observatory.hpc.rank_guard import SHARDS, ending
from observatory.probes.control import CaptureControl, OverBudget
from observatory.probes.exchange.tap import unsupported
from observatory.probes.options import StepOptions, WatchOptions, check_phase
from observatory.probes.routing.describe import describe_model, layers_now
from observatory.probes.routing.discover import find_sites
from observatory.probes.routing.moe_block import bare_model
from observatory.probes.run_news import news_of
from observatory.probes.session import CaptureSession, WatchedShard
from observatory.probes.store_alignment import default_store
from observatory.probes.timeline.flight import recorder_unsupported
from observatory.probes.timeline.streams import is_capturing
from observatory.probes.words import OVER_BUDGET
from observatory.run import RunWriter
from observatory.run.gaps import from_capture, sentence
from observatory.run.manifest import ClockSpec, MoeLayerSpec, Phase, RankLayer, Topology, Verified

if TYPE_CHECKING:
    from torch import nn

    from observatory.probes.exchange.labels import ExchangeSink
    from observatory.probes.routing.sites import RoutingSite

_Layer = TypeVar("_Layer", bound=MoeLayerSpec)


class Watch:
    """A running watch; made by :func:`observatory.watch`.

    ``phase`` and ``step`` are called from one thread, between calls of the model.

    Attributes:
        run_path: the run directory.
        sites: the MoE layers that are watched, and how; empty before entering.
        steps: steps that have ended.
    """

    def __init__(self, model: nn.Module, run_path: Path, options: WatchOptions) -> None:
        self.run_path = run_path
        self.sites: tuple[RoutingSite, ...] = ()
        self.steps = options.steps.at
        self._model = model
        self._options = options
        self._phase = options.phase
        self._session: CaptureSession | None = None
        self._writer: RunWriter | None = None
        self._shard: WatchedShard | None = None
        self._layers: tuple[RankLayer, ...] = ()
        self._notes: list[str] = []
        self._control: CaptureControl | None = None
        self._is_paused = False
        self._captured_steps = 0
        self._ended = False
        self._is_in_step = False
        self._process = 0

    def __enter__(self) -> Self:
        if self._writer is not None:
            raise CaptureError(f"the watch on {self.run_path} was entered before; make a new one")
        exchanges = self._has_exchanges()
        if self._options.exchange.flight_recorder:
            _check_recorder(exchanges)
        self._process = os.getpid()
        self.sites = tuple(find_sites(self._model, adapters=self._options.routing.adapters))
        self._writer = self._open_run()
        self._shard = WatchedShard(
            writer=self._writer, session=lambda: self._session, steps=lambda: self.steps
        )
        SHARDS.append(self._shard)
        try:
            with self._writer.status_once():
                self._layers = layers_now(self._model, self.sites)
                self._writer.set_moe_layers(self._layers)
                aligns = exchanges and self._options.exchange.align_clocks and self._options.where.world > 1
                self._session = CaptureSession(
                    self._model,
                    self.sites,
                    self._writer,
                    self._options,
                    exchanges=exchanges,
                    store=default_store() if aligns else None,
                    situation=lambda: (self.steps, self._phase),
                )
            if self._options.steps.generates:
                self._session.routing.before_pass(self._before_pass)
            self._begin_control(self._session)
        except BaseException as error:
            self._writer.close(state="failed", error=_failure(error))
            SHARDS.remove(self._shard)
            raise
        return self

    @property
    def exchange_sink(self) -> ExchangeSink:
        """Takes the exchanges of transports that do not use ``torch.distributed``, and the spans of any.

        Takes nothing when exchanges are not watched.
        """
        return self._running().sink

    def set_clock(self, clock: ClockSpec) -> None:
        """State how this rank's time base relates to those of other hosts (``probes.alignment.align``).

        "Clock" means the monotonic clock that times are read from, not a frequency of the GPU. Ranks that
        share a process group of ``torch.distributed`` need not call it: their time bases are aligned at enter
        and exit. Nor need ranks of one host: their common clock is recognised.
        """
        self._running().note_time_base()
        assert self._writer is not None
        self._writer.set_clock(clock)

    @contextlib.contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Everything counted inside belongs to this phase, whatever is known from the cache.

        Raises:
            CaptureError: no such phase, the watch is not running, or it is called in a CUDA graph capture.
        """
        check_phase(name)
        outer = self._phase
        self._switch(name)
        try:
            yield
        except BaseException:
            if self._session is not None:
                self._session.note_interruption()
            # The body's own error goes first; ours is stated when the watch ends.
            with contextlib.suppress(CaptureError):
                self._switch(outer)
            raise
        self._switch(outer)

    def state_phase(self, name: Phase | None) -> None:
        """Everything counted from now on belongs to this phase; None: to the one that is derived.

        Raises:
            CaptureError: no such phase, the watch is not running, or it is called in a CUDA graph capture.
        """
        if name is not None:
            check_phase(name)
        self._switch(name)

    def step(self, *, next_step: int | None = None) -> None:
        """End a step: one forward pass, one training step, or one decode step.

        Each forward pass of the model that a ``generate()`` makes is a step by itself.

        Args:
            next_step: number of the step that comes next; None: the number after that of the last.

        Raises:
            CaptureError: the watch is not running, or the capture failed. The model's own run is unharmed,
                and the error is raised once: a caller may catch it and go on without the capture.
        """
        session = self._running()
        if not self._is_paused:
            session.boundary(self.steps, phase=self._phase, ends_step=True)
        self._step_ended(next_step)
        session.check()
        self._after_step(session)

    def begin_step(self) -> None:
        """The time of the step starts now, not where the last one ended: an engine waits in between."""
        self._running().phase_spans.begin()

    def state_step_phase(self, phase: Phase) -> None:
        """The time of the step belongs to this phase; ``mixed`` where its tokens are of several.

        In which phase tokens count, calls state themselves.
        """
        self._running().phase_spans.phase = phase

    @property
    def is_capturing(self) -> bool:
        """Whether the step that comes next, or runs, is captured."""
        return not (self._is_paused or self._ended)

    @property
    def is_over(self) -> bool:
        """Whether no step is captured any more: the end that was asked for has passed."""
        return self._control is not None and self._control.is_over(self.steps)

    @property
    def over_budget(self) -> OverBudget | None:
        """Why the capture ended, where it took too much of the program's time."""
        return None if self._control is None else self._control.over_budget

    @property
    def has_captured(self) -> bool:
        """Whether a step was captured, or begun."""
        return self._control is None or self._control.has_begun

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._session is not None and os.getpid() != self._process:  # a forked child: not its run
            self._session.abandon()
            return
        session, writer = self._running(), self._writer
        assert writer is not None
        self._ended = True
        problems: list[ObservatoryError] = []
        if error is not None:
            session.note_interruption()
        phase = None if self._is_paused else self._phase
        with _collected(problems):
            session.stop(self.steps, phase=phase, failed=error is not None)
        with _collected(problems):
            session.check()
        with writer.status_once():  # closing writes it
            verdicts = session.routing.verified()
            with contextlib.suppress(RuntimeError):  # a device that failed: what was read at the start stays
                layers = layers_now(self._model, session.routing.sites, self._layers)
                writer.set_moe_layers(_with_verdicts(layers, verdicts))
            notes = (*self._notes, *session.notes(steps=self._captured_steps))
            writer.set_notes((*notes, *session.quiet_notes(), *self._budget_note()))
            gaps = session.routing.gaps()
            writer.set_gaps(gaps)
            writer.set_self_measured(session.measured())
            steps = max(self.steps, session.routing.last_step + 1)
            if self._control is not None:
                self._control.close(steps)
            with _collected(problems):
                if writer.rank == 0:
                    stated = _with_verdicts(writer.manifest.model.moe_layers, verdicts)
                    model = writer.manifest.model.model_copy(update={"moe_layers": stated})
                    writer.update_manifest(config={**writer.manifest.config, **session.config()}, model=model)
            failure = (
                _failure(error) if error is not None else session.problem() or next(map(str, problems), None)
            )
            if any(gap.loses_rows for gap in gaps):
                failure = failure or "not all calls of its MoE layers were captured"
            with _collected(problems):
                writer.close(
                    state="complete" if failure is None else "failed",
                    error=failure,
                    steps=steps,
                )
        if self._shard in SHARDS:
            SHARDS.remove(self._shard)
        if error is not None:
            for problem in problems:
                error.add_note(f"observatory: {problem}")
            return
        if problems:
            raise problems[0] if isinstance(problems[0], ModelError) else CaptureError(str(problems[0]))
        expected = ("interrupted", "idle")  # its error was raised; a program may call step() before its model
        lines = [
            *notes,
            *(sentence(from_capture(gap)) for gap in gaps if gap.loses_rows or gap.code not in expected),
        ]
        if lines:
            warnings.warn(f"run {self.run_path}: {'; '.join(lines)}", stacklevel=2)

    def _before_pass(self, is_generated: Callable[[], bool]) -> None:
        """In ``generate()`` a program cannot call ``step``: each forward pass there starts a step."""
        session = self._session
        if session is None or self._ended or os.getpid() != self._process:
            return
        if self._is_in_step and is_generated() and not is_capturing(session.routing.device):
            # An error of the capture never goes through the program's call; the next step() raises it.
            with contextlib.suppress(CaptureError):
                session.boundary(self.steps, phase=self._phase, ends_step=True)
                self._step_ended()
                self._after_step(session)
        self._is_in_step = True

    def _step_ended(self, next_step: int | None = None) -> None:
        self.steps = max(self.steps + 1, next_step or 0)
        self._captured_steps += not self._is_paused
        self._is_in_step = False

    def _after_step(self, session: CaptureSession) -> None:
        if self._control is not None:
            self._turn(self._control, session)

    def _budget_note(self) -> tuple[str, ...]:
        over = self.over_budget
        return () if over is None else (OVER_BUDGET.format(**asdict(over)),)

    def _begin_control(self, session: CaptureSession) -> None:
        """Capture the steps that were asked for, where these are not all."""
        options = self._options.steps
        if options == StepOptions(at=options.at):
            return
        assert self._writer is not None
        control = CaptureControl(
            options,
            self._options.where,
            self._writer,
            steps=lambda: self.steps,
            rows=lambda: session.routing.rows,
            flush=session.hurry,
            cost=session.measured,
        )
        self._turn(control, session)
        control.open()
        self._control = control

    def _turn(self, control: CaptureControl, session: CaptureSession) -> None:
        """Before a step begins: whether it is captured."""
        is_wanted = control.wants(self.steps)
        if is_wanted and self._is_paused:
            self._is_paused = False
            session.resume(self.steps)
        elif not is_wanted and not self._is_paused:
            self._is_paused = True
            session.pause()

    def _switch(self, phase: Phase | None) -> None:
        if phase != self._phase:
            session = self._running()
            if not self._is_paused:
                session.boundary(self.steps, phase=self._phase, ends_step=False)
            self._phase = phase

    def _running(self) -> CaptureSession:
        if self._session is None or self._ended:
            raise CaptureError(
                f"the watch on {self.run_path} is not running; use it inside `with observatory.watch(...)`"
            )
        if os.getpid() != self._process:
            raise CaptureError(
                f"the watch on {self.run_path} belongs to process {self._process}, of which this is a forked "
                "child; nothing is captured here, start another watch in the child"
            )
        return self._session

    def _has_exchanges(self) -> bool:
        if self._options.exchange.exchanges is not None:
            return self._options.exchange.exchanges
        from torch import distributed

        several = (
            distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        )
        reason = unsupported() if several else None
        if reason is not None:
            self._notes.append(f"exchanges were not watched: {reason}")
        return several and reason is None

    def _open_run(self) -> RunWriter:
        options = self._options
        news = news_of(self.run_path) if options.made is None and options.where.world > 1 else None
        if options.where.rank > 0:
            problem = None if options.made is None else options.made(None)
            if problem is not None:
                raise CaptureError(problem)
            return RunWriter.join(
                self.run_path,
                rank=options.where.rank,
                run_id=options.run_id,
                ranks=None if options.made is None else options.where.world,
                wait=time.sleep if news is None else news.wait,
                provenance=find_rank_provenance(),
            )
        made = options.made if news is None else news.announce
        labels, routing = options.labels, options.routing
        # What it was loaded from: a hub id, or a directory, of which the last component is the name.
        bare = bare_model(self._model)
        origin = str(getattr(getattr(bare, "config", None), "_name_or_path", None) or "")
        name = labels.model_name or (Path(origin).name if Path(origin).is_absolute() else origin)
        manifest = new_manifest(
            model=describe_model(
                self._model,
                name=name or type(bare).__name__,
                sites=self.sites,
                family=labels.family,
                mixer=labels.mixer,
            ),
            data=labels.data,
            topology=labels.topology or Topology(ranks=options.where.world),
            config={
                **labels.config,
                "watch": {
                    "phase": self._phase,
                    "gate_mass": routing.gate_mass,
                    "sample_tokens": routing.sample_tokens,
                    "flush_s": options.flush_s,
                    "flight_recorder": options.exchange.flight_recorder,
                },
            },
            window_steps=routing.window_steps,
        )
        if options.run_id is not None:
            manifest = manifest.model_copy(update={"run_id": options.run_id})
        try:
            writer = RunWriter.create(
                self.run_path, manifest, overwrite=options.overwrite, provenance=find_rank_provenance()
            )
        except RunError as error:
            if made is not None:
                made(str(error))
            raise
        if made is not None:
            made(None)
        return writer


@contextlib.contextmanager
def _collected(problems: list[ObservatoryError]) -> Iterator[None]:
    """Keep an error for later, so that whatever has to follow is done."""
    try:
        yield
    except ObservatoryError as error:
        if str(error) not in map(str, problems):
            problems.append(error)


def _check_recorder(exchanges: bool) -> None:
    if not exchanges:
        raise CaptureError(
            "flight_recorder is requested, but exchanges are not watched; start several ranks of "
            "torch.distributed, or pass exchanges=True"
        )
    reason = recorder_unsupported()
    if reason is not None:
        raise CaptureError(
            f"the flight recorder cannot be a second source: {reason}; leave flight_recorder out"
        )


def _failure(error: BaseException) -> str:
    """Why a rank failed, on one line: that it was ended goes before what this led to."""
    line = " ".join(f"{type(error).__name__}: {error}".split())
    reason = ending()
    if reason is None:
        return line
    return reason if isinstance(error, KeyboardInterrupt) else f"{reason}; then {line}"


def _with_verdicts(layers: Sequence[_Layer], verdicts: Sequence[Verified]) -> tuple[_Layer, ...]:
    return tuple(
        layer.model_copy(update={"verified": verdict})
        for layer, verdict in zip(layers, verdicts, strict=True)
    )

"""``observatory.watch``: count the routing of a running model into a run directory.

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
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from pydantic import JsonValue

from observatory.errors import CaptureError, ModelError, ObservatoryError
from observatory.host.provenance import new_manifest
from observatory.host.ranks import find_rank
from observatory.hpc.rank_guard import SHARDS, ending
from observatory.probes.exchange.tap import unsupported
from observatory.probes.options import (
    ExchangeOptions,
    PowerOptions,
    RoutingOptions,
    RunLabels,
    Verify,
    WatchOptions,
    check_phase,
)
from observatory.probes.routing.describe import describe_model
from observatory.probes.routing.discover import find_sites
from observatory.probes.routing.identity import layers_now
from observatory.probes.session import CaptureSession, WatchedShard
from observatory.probes.store_alignment import default_store
from observatory.probes.timeline.flight import recorder_unsupported
from observatory.run import RunWriter
from observatory.run.gaps import from_capture, sentence
from observatory.run.manifest import ClockSpec, DataSpec, MoeLayerSpec, Phase, RankLayer, Topology, Verified

if TYPE_CHECKING:
    from torch import nn

    from observatory.probes.exchange.labels import ExchangeSink
    from observatory.probes.routing.adapters import Adapter
    from observatory.probes.routing.sites import RoutingSite

_Layer = TypeVar("_Layer", bound=MoeLayerSpec)


def watch(
    model: nn.Module,
    out: str | os.PathLike[str],
    *,
    phase: Phase | None = None,
    gate_mass: bool = False,
    sample_tokens: int = 0,
    verify: Verify = "first",
    window_steps: int = 1,
    flush_s: float = 10.0,
    exchanges: bool | None = None,
    power: bool | Sequence[str] | None = None,
    own_devices: Sequence[str] | None = None,
    power_period_s: float = 0.05,
    power_shifts: bool | int = False,
    align_clocks: bool = True,
    clock_timeout_s: float = 30.0,
    flight_recorder: bool = False,
    overwrite: bool = False,
    run_id: str | None = None,
    adapters: Sequence[Adapter] = (),
    model_name: str | None = None,
    family: str | None = None,
    mixer: str | None = None,
    data: DataSpec | None = None,
    config: Mapping[str, JsonValue] | None = None,
    topology: Topology | None = None,
    rank: int | None = None,
    world: int | None = None,
) -> Watch:
    """Watch a model: a context manager that counts assignments per expert, layer, step and phase.

    Args:
        model: module with MoE layers; may be compiled, wrapped, on several devices.
        out: run directory to make.
        phase: phase of everything outside ``watch.phase(...)``. None: derived from the cache given to the
            model and from training mode, else ``unknown``.
        gate_mass: also sum the gate weights per expert.
        sample_tokens: per step, phase and layer keep the expert ids of the first that many token positions
            of the first call. Never token ids or text.
        verify: what is counted is held against what the experts compute
            (docs/supported-models.md#verification). ``first``: the rows that experts are used with, in the
            first, second, fourth ... call of each layer. ``rows``: in all calls. ``intervention``: the first
            call is also run again with each expert changed in turn, E + 2 calls of each MoE block with 64
            tokens at most. ``none``: only where what is read cannot show what is dispatched. The verdict of
            each layer stands in the manifest; a contradiction raises ``ModelError``, and nothing of that
            step is counted.
        window_steps: steps folded into one row, with the per-step extremes.
        flush_s: seconds after which captured rows are on disk.
        exchanges: also time every all-to-all of ``torch.distributed`` (docs/exchange.md). None: when it is
            initialised with more than one rank.
        power: also sample power, clocks and temperature, in a process of its own, and note when each phase
            was computed (docs/power.md). Devices by name; True for the GPUs of this process or else its
            processors; None for its GPUs if the model is on one; False for none. Starting takes about 2 s.
        own_devices: power devices by name that this rank computes on, for energy per rank where several share
            a node. None: the GPUs that hold the model, by torch's UUIDs; name them where torch has none (CPU,
            AMD). Naming them requests power, too.
        power_period_s: time between samples, seconds.
        power_shifts: pause for some milliseconds between steps, outside all spans, where steps move in time
            with a power sensor that sees only part of the time, as those of A100 and H100 do (docs/power.md).
            At most a hundredth of the time, and none where it would not help. Waits for the device first.
            An integer N: every N consecutive steps have the same period (all prefills, say); pauses are then
            put between equal parts of them, which helps short runs too.
            Not with several ranks: a pause must start at one step on all of them, and where one wakes late
            the others wait, which is what such a run measures. Energy by the counter needs no pauses.
        flight_recorder: with exchanges, also keep what torch's flight recorder states of each, as a second
            source (docs/exchange.md#the-flight-recorder-as-a-second-source).
        align_clocks: where exchanges are watched, relate the time bases of all hosts to each other at enter
            and at exit (docs/waiting.md#one-clock). False: wait for no other rank there; waiting is then
            known between ranks of one host only, unless the program calls ``set_clock``.
        clock_timeout_s: how long to wait for the other ranks then, seconds; never longer, and never an error.
        overwrite: replace an existing run; with several ranks only where a ``run_id`` is given.
        run_id: id of the run, new and the same on all ranks: a rank then never joins an older run at the
            same place. None: made by rank 0, and the others join the run that is being written.
        adapters: how to read layers that are not understood by themselves.
        model_name: name for the manifest.
        family: architecture name, the configuration's ``model_type`` by default.
        mixer: sequence mixer for the manifest.
        data: what the model is fed, for the manifest.
        config: further options for the manifest.
        topology: how the ranks are arranged, for the manifest; by default all of them hold all experts.
        rank: this process's rank; found from torch.distributed or torchrun by default.
        world: number of ranks, likewise.

    Raises:
        CaptureError: an option that does not fit.
        ModelError: on entering; no MoE layers, or some only partly understood.
        RunError: on entering; the run directory cannot be made.
    """
    return Watch(
        model,
        Path(out),
        WatchOptions(
            where=find_rank(rank, world),
            phase=phase,
            flush_s=flush_s,
            overwrite=overwrite,
            run_id=run_id,
            routing=RoutingOptions(
                gate_mass=gate_mass,
                sample_tokens=sample_tokens,
                window_steps=window_steps,
                verify=verify,
                adapters=tuple(adapters),
            ),
            exchange=ExchangeOptions(
                exchanges=exchanges,
                flight_recorder=flight_recorder,
                align_clocks=align_clocks,
                clock_timeout_s=clock_timeout_s,
            ),
            power=PowerOptions(
                power=power,
                own_devices=own_devices,
                power_period_s=power_period_s,
                power_shifts=power_shifts,
            ),
            labels=RunLabels(
                model_name=model_name,
                family=family,
                mixer=mixer,
                data=data,
                config=dict(config or {}),
                topology=topology,
            ),
        ),
    )


class Watch:
    """A running watch; made by :func:`watch`.

    ``phase`` and ``step`` are called from one thread, between calls of the model.

    Attributes:
        run_path: the run directory.
        sites: the MoE layers that are watched, and how; empty before entering.
        steps: steps that ``step()`` has ended.
    """

    def __init__(self, model: nn.Module, run_path: Path, options: WatchOptions) -> None:
        self.run_path = run_path
        self.sites: tuple[RoutingSite, ...] = ()
        self.steps = 0
        self._model = model
        self._options = options
        self._phase = options.phase
        self._session: CaptureSession | None = None
        self._writer: RunWriter | None = None
        self._shard: WatchedShard | None = None
        self._layers: tuple[RankLayer, ...] = ()
        self._notes: list[str] = []
        self._ended = False
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

    def step(self) -> None:
        """End a step: one forward pass, one training step, or one decode step.

        Raises:
            CaptureError: the watch is not running, or the capture failed. The model's own run is unharmed,
                and the error is raised once: a caller may catch it and go on without the capture.
        """
        session = self._running()
        session.boundary(self.steps, phase=self._phase, ends_step=True)
        self.steps += 1
        session.check()
        if session.after_step():
            # The pause belongs to no phase, also where one is stated for the whole run.
            session.boundary(self.steps, phase=None, ends_step=False)

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
        with _collected(problems):
            session.stop(self.steps, phase=self._phase, failed=error is not None)
        with _collected(problems):
            session.check()
        verdicts = session.routing.verified()
        with contextlib.suppress(RuntimeError):  # a device that failed: what was read at the start stays
            layers = layers_now(self._model, session.routing.sites, self._layers)
            writer.set_moe_layers(_with_verdicts(layers, verdicts))
        notes = (*self._notes, *session.notes(steps=self.steps))
        writer.set_notes((*notes, *session.quiet_notes()))
        gaps = session.routing.gaps()
        writer.set_gaps(gaps)
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
                steps=max(self.steps, session.routing.last_step + 1),
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

    def _switch(self, phase: Phase | None) -> None:
        if phase != self._phase:
            self._running().boundary(self.steps, phase=self._phase, ends_step=False)
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
        if options.where.rank > 0:
            return RunWriter.join(self.run_path, rank=options.where.rank, run_id=options.run_id)
        labels, routing = options.labels, options.routing
        name = labels.model_name or getattr(getattr(self._model, "config", None), "_name_or_path", None)
        manifest = new_manifest(
            model=describe_model(
                self._model,
                name=name or type(self._model).__name__,
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
        return RunWriter.create(self.run_path, manifest, overwrite=options.overwrite)


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

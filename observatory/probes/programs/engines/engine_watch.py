"""The watch on the model of one process of a serving engine: what all engines have in common.

An engine says when its model is there, which rows of the next forward pass are tokens of which phase, and
when a step ends. Nothing here raises into the engine: what fails is logged, noted, and the process goes on as
without us.
"""

from __future__ import annotations

import atexit
import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue
from torch import nn

from observatory.errors import CaptureError
from observatory.host.ranks import RankOf
from observatory.probes.options import ExchangeOptions, PowerOptions, RoutingOptions, RunLabels, WatchOptions
from observatory.probes.programs.engines.token_phases import TokenPhases, phase_of
from observatory.probes.programs.engines.vllm_ending import OpenWatch
from observatory.probes.programs.settings import Note, ProgramSettings
from observatory.probes.programs.watching import begin_watch
from observatory.probes.programs.words import ProgramCode, program_sentence
from observatory.probes.routing.adapters import Adapter
from observatory.probes.watch import Watch
from observatory.run.files import one_line

#: A server may be ended by a signal that leaves no time to write.
_FLUSH_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineProcess:
    """One process of an engine.

    Attributes:
        name: the engine's, as in the manifest.
        version: the engine's.
        tried: the version that the observatory was tried with; None: it was never run.
        model: as the user named it.
        where: rank among those that see other tokens or hold other layers.
        settings: of ``observatory run``, or of the engine's own variable.
        log: of the engine's own loggers, so that its settings hold.
    """

    name: str
    version: str
    tried: str | None
    model: str
    where: RankOf
    settings: ProgramSettings
    log: logging.Logger

    @property
    def is_tried(self) -> bool:
        """Whether this very version was tried."""
        return self.version.partition("+")[0] == self.tried


class EngineWatch:
    """The watch on the model of this process.

    Args:
        process: the process.
        open_watch: set while the run is not closed, for a parent that would kill this process.
    """

    def __init__(self, process: EngineProcess, open_watch: OpenWatch | None = None) -> None:
        self._engine = process
        self._open = open_watch
        self._watch: Watch | None = None
        self._phases: TokenPhases | None = None
        self._is_over = False
        atexit.register(self.guarded, self.end)

    def around(
        self,
        owner: Any,
        name: str,
        *,
        before: Callable[..., None] | None = None,
        after: Callable[[Any], None] | None = None,
    ) -> None:
        """Call ours around a method of one object; ours never raises.

        Args:
            owner: the object.
            name: of the method.
            before: given the arguments.
            after: given the result.
        """
        method = getattr(owner, name)

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                self.guarded(before, *args, **kwargs)
            result = method(*args, **kwargs)
            if after is not None:
                self.guarded(after, result)
            return result

        setattr(owner, name, call)

    def guarded(self, action: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Do something of ours; an error of it ends the watch."""
        if self._is_over:
            return
        try:
            action(*args, **kwargs)
        except Exception as error:
            self._stop(error)

    def begin(
        self,
        model: nn.Module,
        *,
        most_rows: int,
        adapter: Callable[[TokenPhases], Adapter],
        described: Mapping[str, JsonValue],
    ) -> None:
        """The weights are loaded, and no forward pass was made.

        Args:
            model: the model.
            most_rows: of one forward pass.
            adapter: how its layers are counted.
            described: what the manifest says of the engine.
        """
        engine = self._engine
        phases = self._phases = TokenPhases(most_rows, next(model.parameters()).device)
        identity: dict[str, JsonValue] = {
            "name": engine.name, "version": one_line(engine.version), "is_tried_version": engine.is_tried,
        }  # fmt: skip

        def options(number: int) -> WatchOptions:
            return WatchOptions(
                where=engine.where,
                flush_s=_FLUSH_S,
                run_id=f"{engine.settings.run_id}-{number}",
                steps=engine.settings.steps,
                routing=RoutingOptions(verify="none", adapters=(adapter(phases),)),
                exchange=ExchangeOptions(exchanges=bool(engine.settings.exchanges), align_clocks=False),
                power=PowerOptions(power=engine.settings.power),
                labels=RunLabels(
                    model_name=one_line(engine.model.rstrip("/").rpartition("/")[2]),
                    config={"engine": {**identity, **described}},
                ),
            )

        watch = self._watch = begin_watch(model, engine.settings.out, options)
        if self._open is not None:
            self._open.set()
        if not engine.is_tried:
            engine.log.warning(
                "observatory: %s %s was not tried (%s): it is watched by its interface",
                engine.name,
                engine.version,
                "no version was" if engine.tried is None else f"{engine.tried} was",
            )
        engine.log.info("observatory watches %d MoE layers; run %s", len(watch.sites), watch.run_path)

    @property
    def has_begun(self) -> bool:
        """Whether `begin` was called: an engine may load its weights again."""
        return self._phases is not None

    @property
    def is_capturing(self) -> bool:
        """Whether the step that runs, or comes next, is captured."""
        return self._watch is not None and self._watch.is_capturing

    def begin_step(self) -> None:
        """A step of the engine begins."""
        if self._watch is not None:
            self._watch.begin_step()

    def fill(self, slots_T: NDArray[np.int64]) -> None:
        """State the rows of the forward pass that comes next, as `TokenPhases.fill`."""
        watch = self._watch
        if self._phases is not None and watch is not None and watch.is_capturing:
            self._phases.fill(slots_T)
            watch.state_step_phase(phase_of(slots_T))

    def step(self) -> None:
        """A step of the engine has ended."""
        watch, phases = self._watch, self._phases
        if watch is None or phases is None:
            return
        phases.clear()
        watch.step()
        if watch.is_over:
            self.end()

    def end(self) -> None:
        """Close the run; the engine may go on."""
        self._is_over = True
        watch, self._watch = self._watch, None
        if watch is None:
            return
        if self._phases is not None:
            self._phases.clear()
        try:
            watch.__exit__(None, None, None)
        finally:
            self._closed()
        reason: dict[str, JsonValue] | None = None
        if watch.over_budget is not None:
            model = one_line(self._engine.model)
            reason = {"code": ProgramCode.OVER_BUDGET.value, "model": model, **asdict(watch.over_budget)}
        note = Note(run=str(watch.run_path), rank=self._engine.where.rank, reason=reason)
        note.write(self._engine.name)

    def refuse(self, reason: str) -> None:
        """End the watch, as something turned out that cannot be counted."""
        if not self._is_over:
            self._stop(CaptureError(reason))

    def _stop(self, error: Exception) -> None:
        """An error of ours: the engine goes on."""
        self._is_over = True
        engine, watch = self._engine, self._watch
        self._watch = None
        if self._phases is not None:
            self._phases.clear()
        said, model = one_line(str(error) or type(error).__name__), one_line(engine.model)
        reason: dict[str, JsonValue]
        if watch is None:
            reason = {"code": ProgramCode.NOT_WATCHED.value, "model": model, "error": said}
        else:
            reason = {
                "code": ProgramCode.STOPPED.value, "model": model, "step": watch.steps, "error": said,
            }  # fmt: skip
        note = Note(run=None if watch is None else str(watch.run_path), rank=engine.where.rank, reason=reason)
        note.write(engine.name)
        assert note.cause is not None
        engine.log.warning("observatory: %s", program_sentence(note.cause))
        if watch is not None:
            try:
                watch.__exit__(type(error), error, error.__traceback__)
            except Exception:  # stated above
                pass
            finally:
                self._closed()

    def _closed(self) -> None:
        if self._open is not None:
            self._open.clear()

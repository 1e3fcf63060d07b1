"""A watch on a model of a program that does not call it: where steps end, and where the run does.

A step is one optimiser step in training and one forward of the outermost module otherwise. The end of the
process is the end of the run. Nothing here raises into the program: what fails is noted, and the watch ends.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from observatory.errors import PlaceTakenError
from observatory.host.ranks import find_rank
from observatory.probes.options import ExchangeOptions, PowerOptions, RunLabels, WatchOptions
from observatory.probes.programs.settings import Note, ProgramSettings
from observatory.probes.programs.words import ProgramCode
from observatory.probes.watch import Watch
from observatory.run.files import one_line

#: More models of one process than these are not watched.
_MOST_MODELS = 16
_MOST_RUNS = 1000
#: A program may be ended by a signal that leaves no time to write.
_FLUSH_S = 2.0
_models: list[ProgramModel] = []


def watch_program_model(model: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Watch a model from the forward on that is just beginning, with these arguments."""
    if len(_models) < _MOST_MODELS:
        try:
            made = ProgramModel(model, number=len(_models), settings=ProgramSettings.read())
        except Exception as error:
            _note(model, ProgramCode.NOT_WATCHED, f"model-{len(_models)}", error=_said(error))
            return
        _models.append(made)
        made.before_forward(model, arguments, options)


def _call_new_hooks(
    model: nn.Module, before: set[int], arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """Hooks that the watch has put in front of this forward; torch took its list of them before."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if key not in before:
            more = (options,) if key in model._forward_pre_hooks_with_kwargs else ()
            try:
                hook(model, arguments, *more)
            except Exception:  # the next forward calls it again
                continue


def end_all() -> None:
    """Write what is left, at the end of the process."""
    for model in _models:
        model.end()


class ProgramModel:
    """One model with MoE layers of this process."""

    def __init__(self, model: nn.Module, *, number: int, settings: ProgramSettings) -> None:
        self._model = model
        self._number = number
        self._settings = settings
        self._process = os.getpid()
        self._where = find_rank()
        self._watch: Watch | None = None
        self._forwards = 0
        self._trains = False
        self._at_forward = 0
        self._is_over = False
        self._failure: BaseException | None = None
        self._handles = [
            model.register_forward_pre_hook(self.before_forward, with_kwargs=True),
            register_optimizer_step_post_hook(self._after_optimiser),
        ]
        self._outer_hook = sys.excepthook
        sys.excepthook = self._failed

    def before_forward(self, model: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """A forward of the outermost module begins."""
        trains, before = model.training and torch.is_grad_enabled(), set(model._forward_pre_hooks)
        if self._forwards and not (trains and self._trains):
            self._guarded(self._end_step)
        if self._watch is None and not self._is_over:
            self._guarded(self._begin)
        _call_new_hooks(model, before, arguments, options)
        self._forwards += 1
        self._trains = trains

    def _after_optimiser(self, *_: Any) -> None:
        if self._trains and self._forwards:
            self._guarded(self._end_step)

    @property
    def _steps(self) -> int:
        """Steps that have ended, captured or not."""
        return 0 if self._watch is None else self._watch.steps

    def _end_step(self) -> None:
        self._forwards = 0
        watch = self._watch
        if watch is not None:
            if watch.steps == self._at_forward:  # generate() ends each of its own
                watch.step()
            self._at_forward = watch.steps
            if watch.is_over:
                self.end()

    def _begin(self) -> None:
        self._watch = begin_watch(self._model, self._settings.out, self._options, number=self._number)

    def _options(self, number: int) -> WatchOptions:
        asked = self._settings
        return WatchOptions(
            where=self._where,
            flush_s=_FLUSH_S,
            run_id=f"{asked.run_id}-{number}",
            steps=asked.steps,
            exchange=ExchangeOptions(exchanges=asked.exchanges),
            power=PowerOptions(power=asked.power),
            labels=RunLabels(config={"command": [one_line(word) for word in sys.orig_argv[:64]]}),
        )

    def end(self) -> None:
        """Write what is left and take the hooks off; the program may go on."""
        if self._is_over or os.getpid() != self._process:
            return
        self._detach()
        watch, rank = self._watch, self._where.rank
        if watch is None:
            return
        try:
            if self._forwards and watch.steps == self._at_forward:
                watch.step()
            error = self._failure
            watch.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)
        except Exception as error:
            self._note(ProgramCode.STOPPED, run=watch.run_path, step=self._steps, error=_said(error))
        else:
            Note(run=str(watch.run_path), rank=rank, reason=self._left_out()).write(f"model-{self._number}")

    def _left_out(self) -> dict[str, Any] | None:
        """Why the run is empty, or ended before what was asked for, where it is so."""
        watch = self._watch
        if watch is None or self._failure:
            return None
        if watch.over_budget is not None:
            return _reason(self._model, ProgramCode.OVER_BUDGET, **asdict(watch.over_budget))
        return (
            None if watch.has_captured else _reason(self._model, ProgramCode.NONE_CAPTURED, steps=watch.steps)
        )

    def _failed(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """The program ends with an exception, which its run states."""
        self._failure = error
        self._outer_hook(kind, error, trace)

    def _guarded(self, action: Callable[[], None]) -> None:
        if self._is_over or os.getpid() != self._process:
            return
        try:
            action()
        except Exception as error:
            self._stop(error)

    def _stop(self, error: Exception) -> None:
        self._detach()
        watch = self._watch
        if watch is None:
            self._note(ProgramCode.NOT_WATCHED, error=_said(error))
            return
        self._note(ProgramCode.STOPPED, run=watch.run_path, step=self._steps, error=_said(error))
        try:
            watch.__exit__(type(error), error, error.__traceback__)
        except Exception:  # stated above
            return

    def _detach(self) -> None:
        self._is_over = True
        for handle in self._handles:
            handle.remove()
        if sys.excepthook == self._failed:
            sys.excepthook = self._outer_hook

    def _note(self, code: ProgramCode, *, run: Path | None = None, **values: Any) -> None:
        _note(self._model, code, f"model-{self._number}", run=run, rank=self._where.rank, **values)


def begin_watch(
    model: nn.Module, out: Path, options: Callable[[int], WatchOptions], *, number: int = 0
) -> Watch:
    """Enter a watch at the first free place of a program's runs; several ranks take the one of their number.

    Args:
        model: the model.
        out: run directory of the program's first model.
        options: the watch's options, given the number of its run.
        number: of the model.

    Raises:
        CaptureError, ModelError, RunError: as of the watch.
    """
    first = ""
    for place in range(number, _MOST_RUNS):
        path = out if place == 0 else out.with_name(f"{out.name}-{place + 1}")
        wanted = options(place)
        watch = Watch(model, path, wanted)
        try:
            watch.__enter__()
        except PlaceTakenError as error:
            first = first or str(error)
            if wanted.where.world > 1:
                raise
            continue
        return watch
    raise PlaceTakenError(first)


def _note(
    model: nn.Module, code: ProgramCode, name: str, *, run: Path | None = None, rank: int = 0, **values: Any
) -> None:
    reason = _reason(model, code, **values)
    Note(run=None if run is None else str(run), rank=rank, reason=reason).write(name)


def _reason(model: nn.Module, code: ProgramCode, **values: Any) -> dict[str, Any]:
    return {"code": code.value, "model": one_line(type(model).__name__), **values}


def _said(error: BaseException) -> str:
    return one_line(str(error) or type(error).__name__)

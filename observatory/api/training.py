"""What the callbacks of trainers have in common: one watch for each training, from first step to last.

A trainer's own callback calls `TrainingCallback` where a training begins, a step ends, an evaluation ends and
the training ends, and states which forwards train. It never raises into the training.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from observatory.analysis.rules.judging import judge_rules
from observatory.analysis.rules.rules_file import load_rules
from observatory.analysis.rules.words import judged_sentence
from observatory.errors import CaptureError, ObservatoryError, PlaceTakenError
from observatory.host.ranks import find_rank
from observatory.probes.options import (
    ExchangeOptions,
    PowerOptions,
    RoutingOptions,
    RunLabels,
    StepOptions,
    WatchOptions,
)
from observatory.probes.run_news import agreed_by_ranks
from observatory.probes.watch import Watch
from observatory.run import Run
from observatory.run.files import one_line
from observatory.run.manifest import Phase
from observatory.run.replacing import check_free

_MOST_RUNS = 1000
#: Newest parts of each rank and table that rules are judged by: hundreds of steps, and never the whole run.
_CHECKED_PARTS = 2


class TrainingCallback:
    """Watches the model of a training; the base of `TrainerCallback` and `LightningCallback`.

    A step is an optimiser step with all its micro-batches, under the trainer's own number (``global_step``
    before it), also after a training was resumed. Evaluation is kept apart by its phase: ``prefill``, and
    what its cache shows where it generates, never ``train_forward``. Its rows have the number of the step
    that comes next. Correction biases of routers and the auxiliary loss that the model states are kept for
    every step.

    A failure of the capture is a warning, and the training goes on without it. ``observatory ctl`` works on
    the run while it is written.

    With rules (those of ``observatory check``, docs/check.md) the first rank judges the newest rows on disk,
    whenever the trainer logs or evaluates and when the training ends, and warns of each broken rule once. The
    training is never stopped.

    Attributes:
        run_path: run directory of the training in progress, or of the last; None before the first.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        *,
        every: int = 1,
        stopped: bool = False,
        exchanges: bool | None = None,
        power: bool | Sequence[str] | None = None,
        flush_s: float = 10.0,
        rules: str | os.PathLike[str] | None = None,
    ) -> None:
        """Choose what is captured.

        Args:
            out: run directory. A training that finds something there, as when it is resumed from a
                checkpoint, writes to the first free of ``out-2``, ``out-3`` ...
            every: capture one step in so many, those that the number divides.
            stopped: capture nothing before ``observatory ctl OUT start``.
            exchanges: as of :func:`observatory.watch`.
            power: likewise.
            flush_s: likewise.
            rules: a TOML file of rules; None for none.

        Raises:
            CaptureError: ``every`` is not at least 1.
            RulesError: the file of rules is none.
        """
        self._rules = () if rules is None else load_rules(Path(rules))
        self.run_path: Path | None = None
        self._out = Path(out)
        self._every = every
        self._stopped = stopped
        self._exchange = ExchangeOptions(exchanges=exchanges)
        self._power = PowerOptions(power=power)
        self._flush_s = flush_s
        self._watch: Watch | None = None
        self._handle: Any = None
        StepOptions(every=every)  # raises at once what it does not take

    def _trains(self, model: nn.Module) -> bool:
        """Whether a forward with gradients is one of the training."""
        raise NotImplementedError

    def _model_of(self, module: nn.Module) -> nn.Module:
        """What is watched of the module that is trained."""
        return module

    def _begin(self, module: nn.Module, step: int) -> None:
        """Begin with the number of the step that comes first; a training that never ended has failed."""
        self._end(CaptureError("the training ended without saying so"))
        with _warned("is not captured"):
            self._watch_model(self._model_of(module), step)

    def _end_step(self, next_step: int) -> None:
        """An optimiser step has ended; the number of the one that comes next."""
        if self._watch is not None:
            try:
                self._watch.step(next_step=next_step)
            except Exception as error:
                _warn("is captured no further", error)
                self._end(error)

    def _state_phase(self, phase: Phase | None) -> None:
        if self._watch is not None:
            with contextlib.suppress(ObservatoryError):  # stated when the step ends
                self._watch.state_phase(phase)

    def _check(self, *, is_first_rank: bool) -> None:
        """Warn of rules that are broken, each once; what cannot be judged yet may be later."""
        if not self._rules or self.run_path is None or not is_first_rank:
            return
        with _warned("is checked by its rules no further"):
            rules, self._rules = self._rules, ()
            judged = judge_rules(Run.open_tail(self.run_path, parts=_CHECKED_PARTS), rules)
            broken = {item.rule: item for item in reversed(judged) if item.state == "broken"}
            for item in broken.values():
                warnings.warn(f"a rule is broken: {judged_sentence(item)}", stacklevel=2)
            self._rules = tuple(rule for rule in rules if rule not in broken)

    def _end(self, error: BaseException | None) -> bool:
        """Write what is left and take the hooks off; whether there was something to end."""
        watch, self._watch = self._watch, None
        if watch is None:
            return False
        atexit.unregister(self._end)
        self._handle.remove()
        with _warned("may lack its end"):
            watch.__exit__(None if error is None else type(error), error, None)
        return True

    def _watch_model(self, model: nn.Module, step: int) -> None:
        where = find_rank()
        place = agreed_by_ranks(where, lambda: _free_place(self._out))
        watch = Watch(
            model,
            place,
            WatchOptions(
                where=where,
                phase="train_forward",
                flush_s=self._flush_s,
                steps=StepOptions(
                    at=step, first=-(-step // self._every) * self._every, every=self._every,
                    stopped=self._stopped, listens=True, generates=False,
                ),
                routing=RoutingOptions(bias_steps=1),
                exchange=self._exchange,
                power=self._power,
                labels=RunLabels(config={"trainer": {"first_step": step}}),
            ),
        )  # fmt: skip
        # Before those of the watch, so that a phase begins in front of the call that it is of.
        self._handle = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        try:
            watch.__enter__()
        except BaseException:
            self._handle.remove()
            raise
        self._watch, self.run_path = watch, place
        atexit.register(self._end, CaptureError("the program ended in the training"))

    def _before_forward(self, model: nn.Module, args: Any, given: dict[str, Any]) -> None:
        """A call without gradients is one of an evaluation; one that is given a cache shows its own phase."""
        del args
        if torch.is_grad_enabled() and self._trains(model):
            self._state_phase("train_forward")
        else:
            self._state_phase("prefill" if given.get("past_key_values") is None else None)


@contextlib.contextmanager
def _warned(what: str) -> Iterator[None]:
    """The training is worth more than what watches it."""
    try:
        yield
    except Exception as error:
        _warn(what, error)


def _warn(what: str, error: Exception) -> None:
    said = str(error) if isinstance(error, ObservatoryError) else f"{type(error).__name__}: {error}"
    warnings.warn(f"the training {what}: {one_line(said)}", stacklevel=2)


def _free_place(out: Path) -> Path:
    """``out``, or the first free of ``out-2``, ``out-3`` ..."""
    for number in itertools.count(1):
        place = out if number == 1 else out.with_name(f"{out.name}-{number}")
        try:
            check_free(place)
        except PlaceTakenError:
            if number >= _MOST_RUNS:
                raise
        else:
            return place
    raise AssertionError

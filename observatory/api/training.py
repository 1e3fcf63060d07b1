"""``observatory.TrainerCallback``: watch what transformers' Trainer trains.

transformers is imported with this module, which is imported when the name is first used.
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
import transformers

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


class TrainerCallback(transformers.TrainerCallback):
    """Watches the model while a Trainer trains it.

    A step is an optimiser step with all its micro-batches, under the Trainer's own number (``global_step``),
    also after a training was resumed. Evaluation is kept apart by its phase: ``prefill``, and what its cache
    shows where it generates, never ``train_forward``. Its rows have the number of the step that comes next.
    Correction biases of routers and the auxiliary loss that the model states are kept for every step.

    A failure of the capture is a warning, and the training goes on without it. ``observatory ctl`` works on
    the run while it is written.

    With rules (those of ``observatory check``, docs/check.md) the first rank judges the newest rows on disk,
    whenever the Trainer logs or evaluates and when the training ends, and warns of each broken rule once. The
    training is never stopped.

    Args:
        out: run directory. A training that finds something there, as when it is resumed from a checkpoint,
            writes to the first free of ``out-2``, ``out-3`` ...
        every: capture one step in so many, those that the number divides.
        stopped: capture nothing before ``observatory ctl OUT start``.
        exchanges: as of :func:`observatory.watch`.
        power: likewise.
        flush_s: likewise.
        rules: a TOML file of rules; None for none.

    Raises:
        CaptureError: ``every`` is not at least 1.
        RulesError: the file of rules is none.

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

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Begin with the number of the step that comes first."""
        del args, control
        self._end(CaptureError("the training ended without saying so"))
        with _warned("is not captured"):
            self._begin(given["model"], int(state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """An optimiser step has ended."""
        del args, state, control, given
        if self._watch is not None:
            try:
                self._watch.step()
            except Exception as error:
                _warn("is captured no further", error)
                self._end(error)

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """An evaluation has ended."""
        del args, control, given
        self._state_phase(None)
        self._check(state)

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The Trainer logs."""
        del args, control, given
        self._check(state)

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any, **given: Any) -> None:
        """A prediction has ended."""
        del args, state, control, metrics, given
        self._state_phase(None)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Write what is left and take the hooks off."""
        del args, control, given
        was_captured = self._watch is not None
        self._end(None)
        if was_captured:
            self._check(state)

    def _begin(self, model: Any, step: int) -> None:
        where = find_rank()
        place = agreed_by_ranks(where, lambda: _free_place(self._out))
        watch = Watch(
            model,
            place,
            WatchOptions(
                where=where,
                flush_s=self._flush_s,
                steps=StepOptions(
                    at=step, first=-(-step // self._every) * self._every, every=self._every,
                    stopped=self._stopped, listens=True,
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

    def _check(self, state: Any) -> None:
        """Warn of rules that are broken, each once; what cannot be judged yet may be later."""
        if not self._rules or self.run_path is None or not state.is_world_process_zero:
            return
        with _warned("is checked by its rules no further"):
            rules, self._rules = self._rules, ()
            judged = judge_rules(Run.open_tail(self.run_path, parts=_CHECKED_PARTS), rules)
            broken = {item.rule: item for item in reversed(judged) if item.state == "broken"}
            for item in broken.values():
                warnings.warn(f"a rule is broken: {judged_sentence(item)}", stacklevel=2)
            self._rules = tuple(rule for rule in rules if rule not in broken)

    def _before_forward(self, model: Any, args: Any, given: dict[str, Any]) -> None:
        """A call without gradients is one of an evaluation; one that is given a cache shows its own phase."""
        del args
        evaluates = not (model.training and torch.is_grad_enabled())
        self._state_phase("prefill" if evaluates and given.get("past_key_values") is None else None)

    def _state_phase(self, phase: Phase | None) -> None:
        if self._watch is not None:
            with contextlib.suppress(ObservatoryError):  # stated when the step ends
                self._watch.state_phase(phase)

    def _end(self, error: Exception | None) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            atexit.unregister(self._end)
            self._handle.remove()
            with _warned("may lack its end"):
                watch.__exit__(None if error is None else type(error), error, None)


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

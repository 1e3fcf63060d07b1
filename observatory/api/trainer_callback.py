"""``observatory.TrainerCallback``: watch what transformers' Trainer trains.

transformers is imported with this module, which is imported when the name is first used.
"""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn

from observatory.api.training import TrainingCallback


class TrainerCallback(TrainingCallback, transformers.TrainerCallback):
    """Watches the model while a Trainer trains it; what it captures, `TrainingCallback` says."""

    def _trains(self, model: nn.Module) -> bool:
        """The Trainer puts its model into training mode for each micro-batch."""
        return model.training

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Begin with the number of the step that comes first."""
        del args, control
        self._begin(given["model"], int(state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """An optimiser step has ended."""
        del args, control, given
        self._end_step(int(state.global_step))

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """An evaluation has ended."""
        del args, control, given
        self._state_phase("train_forward")
        self._check(is_first_rank=state.is_world_process_zero)

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The Trainer logs."""
        del args, control, given
        self._check(is_first_rank=state.is_world_process_zero)

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any, **given: Any) -> None:
        """A prediction has ended."""
        del args, state, control, metrics, given
        self._state_phase("train_forward")

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Write what is left and take the hooks off."""
        del args, control, given
        if self._end(None):
            self._check(is_first_rank=state.is_world_process_zero)

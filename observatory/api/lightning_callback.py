"""``observatory.LightningCallback``: watch what Lightning's Trainer trains.

There are two packages with a Trainer of Lightning, ``lightning`` and ``pytorch_lightning``. Those that the
program has imported when the name is first used are meant, else the first that is installed.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from torch import nn

from observatory.api.training import TrainingCallback
from observatory.probes.routing.discover import find_sites

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _callbacks() -> tuple[Any, ...]:
    """The class that callbacks of Lightning have as their base, from each package that is meant.

    Raises:
        ModuleNotFoundError: neither package is installed.
    """
    imported = [sys.modules[name].Callback for name in _PACKAGES if sys.modules.get(name) is not None]
    if imported:
        return tuple(imported)
    for name in _PACKAGES:
        try:
            return (importlib.import_module(name).Callback,)
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise
    raise ModuleNotFoundError("neither lightning nor pytorch_lightning is installed", name="lightning")


class LightningCallback(TrainingCallback, *_callbacks()):  # type: ignore[misc]
    """Watches the model while Lightning fits it; what it captures, `TrainingCallback` says.

    Watched is the module inside the LightningModule that has all its MoE layers, as `self.model`, or else the
    LightningModule itself. Evaluation is the validation inside of `fit`; the sanity check before the first
    step is not captured. A batch in which several optimisers step is one step, as `global_step` skips the
    numbers between.
    """

    _is_validating = False

    def _trains(self, model: nn.Module) -> bool:
        """Lightning leaves the mode of modules as it is, and `from_pretrained` loads in evaluation mode."""
        del model
        return not self._is_validating

    def _model_of(self, module: nn.Module) -> nn.Module:
        """The child that all MoE layers are in, if it is one that is called.

        Lightning calls methods of the LightningModule and not the module, which has no configuration either.
        """
        children = {site.spec.module.partition(".")[0] for site in find_sites(module)}
        inner = getattr(module, children.pop()) if len(children) == 1 else module
        return module if isinstance(inner, nn.ModuleList | nn.ModuleDict) else inner

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin with the number of the step that comes first."""
        self._is_validating = False
        self._begin(pl_module, int(trainer.global_step))

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A micro-batch has ended, and with the last of them the step."""
        del pl_module, outputs, batch, batch_idx
        step = int(trainer.global_step)
        if self._watch is None or step == self._watch.steps:
            return
        self._end_step(step)
        if trainer.log_every_n_steps and step % trainer.log_every_n_steps == 0:
            self._check(is_first_rank=trainer.is_global_zero)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """What is computed from here on is evaluation, whatever calls it."""
        del trainer, pl_module
        self._is_validating = True
        self._state_phase("prefill")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """The training goes on."""
        del pl_module
        self._is_validating = False
        self._state_phase("train_forward")
        self._check(is_first_rank=trainer.is_global_zero)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write what is left and take the hooks off."""
        del pl_module
        if self._end(None):
            self._check(is_first_rank=trainer.is_global_zero)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The training was interrupted, which its run states."""
        del trainer, pl_module
        self._end(exception)

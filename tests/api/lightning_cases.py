"""A module of Lightning that trains the tiny model, and a Trainer for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch
import torch
from torch.utils.data import DataLoader

from tests.api.training_cases import Counted, Texts, mixtral

BATCH = 2


class Steps:
    """Trains a model in the mode that ``from_pretrained`` leaves it in, and generates when it validates."""

    def __init__(self, *, generates: bool = False) -> None:
        super().__init__()
        self.language_model = mixtral().eval()
        self.generates = generates
        self.is_training_step = False
        self.counted = Counted(self.language_model, self.phase)

    def phase(self, _module: Any) -> str:
        return "train_forward" if self.is_training_step else "prefill"

    def training_step(self, batch: dict[str, torch.Tensor], _index: int) -> torch.Tensor:
        self.is_training_step = True
        loss = self.language_model(**batch).loss
        self.is_training_step = False
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], _index: int) -> None:
        self.language_model(**batch)
        if self.generates:
            self.language_model.generate(batch["input_ids"], max_new_tokens=3, do_sample=False)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_batch_end(self, *_: Any) -> None:
        self.counted.step = self.trainer.global_step  # after those of callbacks

    def on_train_start(self) -> None:
        self.counted.step = self.trainer.global_step
        self.counted.found.clear()  # of the sanity check
        self.counted.losses.clear()


class Training(Steps, lightning.pytorch.LightningModule):
    """A module of the package ``lightning``."""


def trainer(folder: Path, callbacks: list[Any], package: Any = lightning.pytorch, **options: Any) -> Any:
    usual = {
        "accelerator": "cpu", "max_steps": 4, "accumulate_grad_batches": 2, "val_check_interval": 3,
        "check_val_every_n_epoch": None, "num_sanity_val_steps": 1, "default_root_dir": folder,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "logger": False,
    }  # fmt: skip
    return package.Trainer(callbacks=callbacks, **(usual | options))


def fit(made: Any, module: Any, **options: Any) -> None:
    made.fit(module, DataLoader(Texts(32), batch_size=BATCH), DataLoader(Texts(3), batch_size=3), **options)

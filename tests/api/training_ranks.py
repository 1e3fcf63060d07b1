"""What each rank of a training runs: three trainings, each of which leaves its own count of the routing."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

from torch import distributed

import observatory
from tests.api import lightning_cases
from tests.api.training_cases import Counted, mixtral, trainer


def train(folder: Path) -> None:
    """Train four steps with each Trainer, that of transformers once more from its second step on."""
    for name, resumes in (("run", None), ("run-2", str(folder / "checkpoints" / "checkpoint-2"))):
        training = trainer(
            mixtral(), folder / "checkpoints", [observatory.TrainerCallback(out=folder / "run")]
        )
        training.train(resume_from_checkpoint=resumes)
        leave(folder / name, training.counted)
    module = lightning_cases.Training()
    watched = [observatory.LightningCallback(out=folder / "lightning")]
    lightning_cases.fit(lightning_cases.trainer(folder, watched, strategy="ddp", devices=2), module)
    leave(folder / "lightning", module.counted)
    distributed.destroy_process_group()


def leave(place: Path, counted: Counted) -> None:
    """Write what this rank has counted."""
    document = [[*key, *load.items()] for key, load in counted.found.items()]
    place.with_name(f"{place.name}-{distributed.get_rank()}.json").write_text(json.dumps(document))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    train(Path(sys.argv[1]))

"""Lightning's own Trainer, watched by its callback: counts equal those of the experts' arguments."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

import observatory
from observatory.api import lightning_callback
from tests.api.lightning_cases import BATCH, Steps, Training, fit, trainer
from tests.api.training_cases import LENGTH, loads

pytestmark = [
    pytest.mark.slow,  # Lightning alone takes seconds to load
    # Lightning warns of this machine, of few workers, and of what torch deprecates; of ours none is expected.
    pytest.mark.filterwarnings("ignore", "error:the training", "error:run ", "error:a rule"),
]


class OtherTraining(Steps, pytorch_lightning.LightningModule):
    """A module of the package ``pytorch_lightning``."""


def test_steps_are_optimiser_steps_validation_is_apart_and_a_resumed_training_goes_on(tmp_path: Path) -> None:
    keeps = lightning.pytorch.callbacks.ModelCheckpoint(
        tmp_path, "at-{step}", every_n_train_steps=2, save_top_k=-1
    )
    callback = observatory.LightningCallback(out=tmp_path / "run")
    module = Training()
    fit(trainer(tmp_path, [callback, keeps], enable_checkpointing=True), module)
    assert callback.run_path == tmp_path / "run"
    assert loads(tmp_path / "run") == module.counted.found
    run = observatory.open_run(tmp_path / "run")
    assert run.problems == ()
    assert [rank.state for rank in run.manifest.ranks] == ["complete"]
    assert run.manifest.model.family == "mixtral"
    tokens = run.routed_tokens().set_index(["step", "phase"])["tokens"].to_dict()
    # Validation after micro-batches 3 and 6: in the middle of step 1, and before step 3.
    of_step = {(step, "train_forward"): 2 * BATCH * LENGTH for step in range(4)}
    assert tokens == of_step | {(step, "prefill"): 3 * LENGTH for step in (1, 3)}
    losses = run.auxiliary_losses().set_index(["step", "phase"])
    means = {key: sum(values) / len(values) for key, values in module.counted.losses.items()}
    assert losses["value"].to_dict() == pytest.approx(means, rel=1e-6)

    again = observatory.LightningCallback(out=tmp_path / "run", every=2)
    second = Training()
    fit(trainer(tmp_path, [again], max_steps=7), second, ckpt_path=tmp_path / "at-step=2.ckpt")
    assert again.run_path == tmp_path / "run-2"
    captured = loads(tmp_path / "run-2")
    assert captured == {key: load for key, load in second.counted.found.items() if key[0] % 2 == 0}
    assert {step for step, phase, _ in captured if phase == "train_forward"} == {2, 4, 6}
    assert observatory.open_run(tmp_path / "run-2").manifest.config["trainer"] == {"first_step": 2}


def test_generation_in_a_validation_has_the_number_of_the_step_that_follows(tmp_path: Path) -> None:
    module = Training(generates=True)
    fit(trainer(tmp_path, [observatory.LightningCallback(out=tmp_path / "run")]), module)
    tokens = observatory.open_run(tmp_path / "run").routed_tokens().set_index(["step", "phase"])["tokens"]
    of_step = {(step, "train_forward"): 2 * BATCH * LENGTH for step in range(4)}
    prefill, decode = 2 * 3 * LENGTH, 2 * 3
    validated = {
        (step, phase): count for step in (1, 3) for phase, count in (("prefill", prefill), ("decode", decode))
    }
    assert tokens.to_dict() == of_step | validated


class Parts(Training):
    """Calls parts of the model, and no module that has all MoE layers; two optimisers step in each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        model = self.language_model.model
        del self.language_model
        self.tokens, self.rotary, self.layers = model.embed_tokens, model.rotary_emb, model.layers

    def training_step(self, batch: dict[str, torch.Tensor], _index: int) -> None:
        self.is_training_step = True
        loss = self.run_layers(batch)
        self.is_training_step = False
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def validation_step(self, batch: dict[str, torch.Tensor], _index: int) -> None:
        self.run_layers(batch)

    def run_layers(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden = self.tokens(batch["input_ids"])
        positions = self.rotary(hidden, torch.arange(LENGTH)[None])
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=positions)
        return hidden.square().mean()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.tokens, self.layers)]


def test_a_module_that_calls_parts_of_its_model_is_watched_with_several_optimisers(tmp_path: Path) -> None:
    module = Parts()
    options = {"accumulate_grad_batches": 1, "max_steps": 8, "val_check_interval": 2}
    fit(trainer(tmp_path, [observatory.LightningCallback(out=tmp_path / "run")], **options), module)
    found = loads(tmp_path / "run")
    assert found == module.counted.found
    assert {step for step, phase, _ in found if phase == "train_forward"} == {0, 2, 4, 6}
    assert {step for step, phase, _ in found if phase == "prefill"} == {4, 8}


def test_an_exception_ends_the_run_as_failed(tmp_path: Path) -> None:
    module = Training()

    def refuse(*_: Any) -> None:
        if module.is_training_step and module.counted.step == 1:
            raise RuntimeError("no more")

    module.language_model.register_forward_hook(refuse)
    with pytest.raises(RuntimeError, match="no more"):
        fit(trainer(tmp_path, [observatory.LightningCallback(out=tmp_path / "run")]), module)
    (rank,) = observatory.open_run(tmp_path / "run").manifest.ranks
    assert (rank.state, rank.error) == ("failed", "RuntimeError: no more")


def test_a_model_without_moe_layers_and_a_broken_rule_are_warnings(tmp_path: Path) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text("[[rule]]\nmetric = 'gini'\nphase = 'train_forward'\nabove = 0\n")
    callback = observatory.LightningCallback(out=tmp_path / "run", rules=rules, flush_s=0.01)
    made = trainer(tmp_path, [callback])
    with pytest.warns(UserWarning, match="a rule is broken: train_forward.gini > 0: "):
        fit(made, Training())
    assert made.global_step == 4
    dense = BoringModel()
    with pytest.warns(UserWarning, match="the training is not captured: BoringModel has no MoE layer"):
        trainer(tmp_path, [observatory.LightningCallback(out=tmp_path / "dense")], limit_train_batches=4).fit(
            dense
        )


def test_the_trainer_of_the_other_package_takes_the_callback(tmp_path: Path) -> None:
    module = OtherTraining()
    callback = observatory.LightningCallback(out=tmp_path / "run")
    fit(trainer(tmp_path, [callback], package=pytorch_lightning), module)
    assert isinstance(callback, pytorch_lightning.Callback)
    assert loads(tmp_path / "run") == module.counted.found


def test_the_package_that_the_program_has_imported_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    both = (lightning.pytorch.Callback, pytorch_lightning.Callback)
    assert lightning_callback._callbacks() == both
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    assert lightning_callback._callbacks() == both[1:]
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    monkeypatch.delitem(sys.modules, lightning_callback.__name__)
    with pytest.raises(
        ModuleNotFoundError, match=r"LightningCallback needs lightning.*: pip install lightning"
    ):
        _ = observatory.LightningCallback

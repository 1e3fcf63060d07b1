"""transformers' own Trainer, watched by its callback: counts equal those of the experts' arguments."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import observatory
from observatory.errors import CaptureError, RulesError
from tests.api.training_cases import LENGTH, loads, mixtral, trainer
from tests.probes.routing.test_router_bias import biases, deepseek

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::DeprecationWarning:")


@pytest.fixture(autouse=True)
def transformers_is_quiet(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    yield
    capfd.readouterr()


def test_steps_are_optimiser_steps_evaluation_is_apart_and_a_resumed_training_goes_on(
    tmp_path: Path,
) -> None:
    callback = observatory.TrainerCallback(out=tmp_path / "run")
    first = trainer(mixtral(), tmp_path / "checkpoints", [callback])
    first.train()
    assert callback.run_path == tmp_path / "run"
    assert loads(tmp_path / "run") == first.counted.found
    run = observatory.open_run(tmp_path / "run")
    assert run.problems == ()
    assert [(rank.state, rank.steps) for rank in run.manifest.ranks] == [("complete", 5)]
    losses = run.auxiliary_losses().set_index(["step", "phase"])
    means = {key: sum(values) / len(values) for key, values in first.counted.losses.items()}
    assert losses["value"].to_dict() == pytest.approx(means, rel=1e-6)
    assert losses["calls"].to_dict() == {key: len(values) for key, values in first.counted.losses.items()}
    tokens = run.routed_tokens().set_index(["step", "phase"])["tokens"].to_dict()
    micro_batches, batch, evaluated = 2, 2, 3
    of_step = {(step, "train_forward"): micro_batches * batch * LENGTH for step in range(4)}
    assert tokens == of_step | {(step, "prefill"): evaluated * LENGTH for step in (2, 4)}

    again = observatory.TrainerCallback(out=tmp_path / "run", every=2)
    second = trainer(mixtral(), tmp_path / "checkpoints", [again], steps=7)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "checkpoint-2"))
    assert again.run_path == tmp_path / "run-2"
    captured = loads(tmp_path / "run-2")
    wanted = {key: load for key, load in second.counted.found.items() if key[0] % 2 == 0}
    assert captured == wanted
    assert {step for step, phase, _ in captured if phase == "train_forward"} == {2, 4, 6}
    resumed = observatory.open_run(tmp_path / "run-2")
    assert resumed.manifest.config["trainer"] == {"first_step": 2}
    assert "one in 2" in "".join(resumed.manifest.notes)


def test_the_training_goes_on_where_nothing_can_be_captured(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    callback = observatory.TrainerCallback(out=tmp_path / "run")
    training = trainer(mixtral(), tmp_path / "checkpoints", [callback], steps=1)
    with pytest.warns(UserWarning, match="the training is not captured: .* is not a directory"):
        assert training.train().global_step == 1


def test_a_capture_that_fails_in_the_middle_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = observatory.TrainerCallback(out=tmp_path / "run")
    training = trainer(mixtral(), tmp_path / "checkpoints", [callback], steps=3)
    monkeypatch.setattr("observatory.probes.session.CaptureSession.check", refuse_capture)
    with pytest.warns(UserWarning, match="the training is captured no further: no more"):
        assert training.train().global_step == 3
    (rank,) = observatory.open_run(tmp_path / "run").manifest.ranks
    assert (rank.state, rank.error) == ("failed", "CaptureError: no more")


def refuse_capture(*_: Any) -> None:
    raise CaptureError("no more")


def refuse(*_: Any) -> None:
    raise RuntimeError("no more")


def test_an_exception_in_the_training_is_stated_when_the_next_one_begins(tmp_path: Path) -> None:
    callback = observatory.TrainerCallback(out=tmp_path / "run")
    broken = trainer(mixtral(), tmp_path / "checkpoints", [callback])
    broken.model.register_forward_hook(refuse)
    with pytest.raises(RuntimeError, match="no more"):
        broken.train()
    with warnings.catch_warnings():
        trainer(mixtral(), tmp_path / "others", [callback], steps=1).train()
    (rank,) = observatory.open_run(tmp_path / "run").manifest.ranks
    assert (rank.state, rank.error) == ("failed", "CaptureError: the training ended without saying so")
    assert callback.run_path == tmp_path / "run-2"


def test_a_broken_rule_is_one_warning_and_the_training_goes_on(tmp_path: Path) -> None:
    rules = tmp_path / "rules.toml"
    limits = ("phase = 'train_forward'\nabove = 0", "above = 2", "phase = 'decode'\nabove = 0")
    rules.write_text("".join(f"[[rule]]\nmetric = 'gini'\n{limit}\n" for limit in limits))
    callback = observatory.TrainerCallback(out=tmp_path / "run", rules=rules, flush_s=0.01)
    training = trainer(mixtral(), tmp_path / "checkpoints", [callback])
    with pytest.warns(UserWarning, match="a rule is broken") as caught:
        assert training.train().global_step == 4
    said = [str(one.message) for one in caught if "rule" in str(one.message)]
    assert len(said) == 1
    assert said[0].startswith("a rule is broken: train_forward.gini > 0: ")
    assert said[0].endswith(" in train_forward, layer 0, from step 0")


def test_options_that_do_not_fit_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(observatory.ObservatoryError, match="every is 0; expected 1 or more"):
        observatory.TrainerCallback(out=tmp_path, every=0)
    with pytest.raises(RulesError, match="cannot be read"):
        observatory.TrainerCallback(out=tmp_path, rules=tmp_path / "absent.toml")


def test_the_bias_of_routers_is_read_at_every_step(tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Balance(TrainerCallback):
        """Moves the bias as training without an auxiliary loss does; before the capture reads it."""

        def on_step_end(self, *given: Any, **_: Any) -> None:
            for layer in (1, 2):
                bias = biases(model)[layer]
                bias += given[1].global_step * layer
                moved[given[1].global_step, layer] = bias.tolist()

    model, moved = deepseek(), dict[tuple[int, int], list[float]]()
    moved |= {(0, layer): bias.tolist() for layer, bias in biases(model).items()}
    training = trainer(model, tmp_path / "c", [Balance(), observatory.TrainerCallback(out=tmp_path / "run")])
    training.train()
    frame = observatory.open_run(tmp_path / "run").router_biases()
    assert {(row.step, row.layer): list(row.bias) for row in frame.itertuples()} == moved

"""Energy of steps and clock locks as advice states them, where the answer is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from observatory.advice.conclusions import conclude_advice
from observatory.advice.mitigations.advise import advise_run
from observatory.advice.mitigations.document import advice_document, doubt_sentences
from observatory.advice.mitigations.lab import Lab
from observatory.advice.mitigations.setup import Setup
from observatory.advice.mitigations.timed import Models
from observatory.advice.mitigations.verdict import Mitigation, MitigationCode
from observatory.advice.words import conclusion_sentences
from observatory.analysis.experts.cost import of_hardware
from observatory.analysis.experts.run_experts import shape_of_model
from observatory.analysis.experts.words import StepCode
from observatory.analysis.hardware.profiles import load_profile
from observatory.cli import main
from observatory.run import open_run
from tests.advice.mitigations.runs import sized_run
from tests.advice.mitigations.test_changes import SKEWED, lab_of, verdicts
from tests.analysis.experts.models import network
from tests.devices.synthetic_device import DEVICES, made_sweep

EXCHANGES = network(latency_us=100.0, us_per_byte=1e-3)


def with_power(lab: Lab, *rows: tuple[str, str, str | None, float | None]) -> Lab:
    """The same with rows of device, phase, span and milliwatts."""
    power = pd.DataFrame(rows, columns=["device_uuid", "phase", "span", "power_mw"])
    models = Models(
        experts=lab.models.experts,
        network=lab.models.network,
        horizon_steps=10_000,
        power=power,
        power_ranks=4,
    )
    return Lab(lab.trace, lab.setup, models)


def document_of(run: Path, *, ranks: int = 4) -> dict[str, Any]:
    opened = open_run(run)
    advice = advise_run(
        opened,
        Setup(ranks=ranks, gpus_per_node=4, placement="linear", move_bytes_per_s=1e9),
        experts=of_hardware(load_profile("h100-sxm"), shape_of_model(opened.manifest.model)),
        network=EXCHANGES,
        network_source="test",
    )
    return advice_document([(str(run), advice, ())])


def test_energy_is_the_time_of_each_part_times_its_power() -> None:
    lab = with_power(
        lab_of(SKEWED, exchanges=EXCHANGES),
        ("a", "prefill", None, 100e3),
        ("a", "prefill", "experts", 300e3),
        ("b", "prefill", None, 50e3),
    )
    found = verdicts(lab)
    for mitigation in (Mitigation.TODAY, Mitigation.PLACEMENT):
        parts_us = found[mitigation].parts_us
        experts_ms = (parts_us["experts"] + parts_us["waiting"]) / 1e3
        other_ms = (found[mitigation].step_us or 0.0) / 1e3 - experts_ms
        assert found[mitigation].energy_mj == pytest.approx(350 * experts_ms + 150 * other_ms)
        assert found[mitigation].energy_covered == pytest.approx(1.0)
    ceiling = found[Mitigation.CEILING]
    assert ceiling.energy_mj is None
    assert ceiling.energy_reason is not None
    assert ceiling.energy_reason.code is MitigationCode.NO_PROGRAM


def test_what_comes_on_top_has_no_known_power_and_lowers_what_is_covered() -> None:
    lab = with_power(lab_of(SKEWED, exchanges=EXCHANGES), ("a", "prefill", None, 100e3))
    quick = verdicts(lab)[Mitigation.SPILL]
    assert quick.step_us is not None
    extra = quick.parts_us["extra"]
    assert quick.energy_covered == pytest.approx(1 - extra / quick.step_us)
    assert quick.energy_mj == pytest.approx(0.1 * quick.step_us, rel=1e-3)
    slow = Lab(lab.trace, lab.setup.model_copy(update={"move_bytes_per_s": 1e6}), lab.models)
    spilled = verdicts(slow)[Mitigation.SPILL]
    assert spilled.energy_mj is None
    assert spilled.energy_reason is not None
    assert spilled.energy_reason.code is StepCode.POWER_COVERS
    assert spilled.energy_reason.values["covered"] == spilled.energy_covered
    assert spilled.energy_covered is not None
    assert spilled.energy_covered < 0.9


def test_a_run_whose_device_draws_250_watts_has_that_energy_in_every_step(tmp_path: Path) -> None:
    document = document_of(sized_run(tmp_path / "run", watts=250.0))
    (phase,) = document["runs"][0]["phases"]
    rows = {row["change"]: row for row in phase["verdicts"]}
    for change in ("today", "placement", "perfect balance"):
        assert rows[change]["energy_mj"] == pytest.approx(0.25 * rows[change]["step_us"], rel=0.01)
        assert rows[change]["energy_covered"] == pytest.approx(1.0)
    conclusion = conclude_advice(document)
    gain = next(reason for reason in conclusion if reason.code == "change_gain")
    best = phase["verdicts"][phase["best"]]
    assert gain.values["energy_saved"] == pytest.approx(1 - best["energy_mj"] / rows["today"]["energy_mj"])
    assert any("less energy" in sentence for sentence in conclusion_sentences(conclusion))


def test_power_of_four_ranks_is_not_that_of_two(tmp_path: Path) -> None:
    run = sized_run(tmp_path / "run", watts=250.0)
    today = document_of(run, ranks=2)["runs"][0]["phases"][0]["verdicts"][0]
    assert today["energy_mj"] is None
    assert today["energy_reason"] == {"code": "power_of_other_ranks", "ranks": 2, "measured": 4}
    (phase,) = document_of(run)["runs"][0]["phases"]
    twice = next(row for row in phase["verdicts"] if row["setting"] == "EP 2")
    assert twice["step_us"] is not None
    assert twice["energy_mj"] is None


def test_ranks_whose_devices_were_not_sampled_are_named(tmp_path: Path) -> None:
    document = document_of(sized_run(tmp_path / "run", watts=250.0, devices=("GPU-b",)))
    assert document["runs"][0]["unsampled_ranks"] == [0]
    assert any("rank 0 were not" in sentence for sentence in doubt_sentences(document))
    sampled = document_of(sized_run(tmp_path / "sampled", watts=250.0))
    assert sampled["runs"][0]["unsampled_ranks"] == []


def test_a_run_without_power_states_so_for_each_row_and_once_in_words(tmp_path: Path) -> None:
    document = document_of(sized_run(tmp_path / "run"))
    today = document["runs"][0]["phases"][0]["verdicts"][0]
    assert today["energy_mj"] is None
    assert today["energy_reason"] == {"code": "no_power"}
    assert sum("no energy" in sentence for sentence in doubt_sentences(document)) == 1
    powered = document_of(sized_run(tmp_path / "powered", watts=250.0))
    assert not any("no energy" in sentence for sentence in doubt_sentences(powered))


def test_little_known_power_is_stated_with_its_share() -> None:
    lab = with_power(lab_of(SKEWED, exchanges=EXCHANGES, tokens=1000), ("a", "prefill", "experts", 300e3))
    today = verdicts(lab)[Mitigation.TODAY]
    assert today.energy_mj is None
    assert today.energy_reason is not None
    assert today.energy_reason.code is StepCode.POWER_COVERS
    parts_us = today.parts_us
    covered = (parts_us["experts"] + parts_us["waiting"]) / sum(parts_us.values())
    assert today.energy_reason.values["covered"] == pytest.approx(covered)


@pytest.mark.parametrize("device", ["memory-bound", "compute-bound"])
def test_a_clock_lock_is_what_the_clock_model_recommends(
    device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep, fit, phase = tmp_path / "sweep.json", tmp_path / "fit.json", DEVICES[device].phase
    run = sized_run(tmp_path / "run", skew=1.0, phase=phase)
    sweep.write_text(made_sweep([DEVICES[device]], time_noise=0.003, energy_noise=0.01).model_dump_json())
    assert main(["clocks", "fit", str(sweep), "--out", str(fit), "--bootstrap", "40"]) == 0
    capsys.readouterr()
    assert main(["clocks", "recommend", str(fit), "--json"]) == 0
    (series,) = json.loads(capsys.readouterr().out)["series"]
    argv = ["advise", str(run), "--ranks", "4", "--hardware", "h100-sxm", "--clocks", str(fit), "--json"]
    assert main(argv) == 0
    document = json.loads(capsys.readouterr().out)
    (row,) = [row for row in document["runs"][0]["phases"][0]["verdicts"] if row["change"] == "clock lock"]
    choice = series["choice"]
    assert (choice is None) == (row["verdict"] == "not applicable")
    if choice is not None:
        assert row["verdict"] == "change"
        assert row["setting"].startswith(f"{choice['sm_clock_mhz']:.0f} MHz")
        assert row["energy_saving"] == pytest.approx(choice["saving"]["value"])
        assert row["slowdown"] == pytest.approx(choice["slowdown"]["value"])
        # Nothing else is worth changing, so the lock is the answer.
        assert document["conclusion"][0]["code"] == "clock_saves"
        assert 0.0 < document["conclusion"][0]["energy_saving_low"] <= row["energy_saving"]


def test_a_clock_model_of_another_phase_is_no_advice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep, fit = tmp_path / "sweep.json", tmp_path / "fit.json"
    sweep.write_text(made_sweep([DEVICES["memory-bound"]]).model_dump_json())
    assert main(["clocks", "fit", str(sweep), "--out", str(fit), "--bootstrap", "20"]) == 0
    run = sized_run(tmp_path / "run", phase="prefill")
    capsys.readouterr()
    argv = ["advise", str(run), "--ranks", "4", "--hardware", "h100-sxm", "--clocks", str(fit), "--json"]
    assert main(argv) == 0
    rows = json.loads(capsys.readouterr().out)["runs"][0]["phases"][0]["verdicts"]
    (row,) = [row for row in rows if row["change"] == "clock lock"]
    assert row["verdict"] == "not known"
    assert row["reason"] == {"code": "clocks_of_other_phases", "phase": "prefill"}


def test_energy_of_steps_follows_their_time_step_by_step() -> None:
    lab = with_power(lab_of(SKEWED, exchanges=EXCHANGES), ("a", "prefill", None, 200e3))
    energy_S, covered, reason = lab.today.energy_of(lab.today.total_S)
    assert energy_S is not None
    assert covered == pytest.approx(1.0)
    assert reason is None
    assert np.allclose(energy_S, 0.2 * lab.today.total_S)

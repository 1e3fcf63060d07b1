"""Sweeps of one clock each, fitted together, and what is said of sweeps that do not fit together."""

from __future__ import annotations

from pathlib import Path

import pytest

from observatory.advice.frequency import recommend_clocks
from observatory.analysis.frequency import ClockModel, fit_clocks
from observatory.analysis.frequency.model_file import FitCode
from observatory.cli import main
from observatory.errors import ClockError
from observatory.locks.commands import plan_commands
from observatory.run.documents.clock_sweep import ClockSweep
from tests.devices.synthetic_device import DEVICES, made_sweep


@pytest.fixture(scope="module")
def whole() -> ClockSweep:
    return made_sweep([DEVICES["knee"]], time_noise=0.003, energy_noise=0.01)


def apart(whole: ClockSweep, **update: object) -> list[ClockSweep]:
    """A sweep per setting."""
    (series,) = whole.series
    found = []
    for clock in dict.fromkeys(point.requested_sm_clock_mhz for point in series.points):
        points = tuple(point for point in series.points if point.requested_sm_clock_mhz == clock)
        part = {"series": (series.model_copy(update={"points": points}),), "set_outside": True, **update}
        found.append(whole.model_copy(update=part))
    return found


def without_reference(whole: ClockSweep) -> list[ClockSweep]:
    return [part for part in apart(whole) if part.series[0].points[0].requested_sm_clock_mhz is not None]


def fitted(sweeps: list[ClockSweep]) -> ClockModel:
    return fit_clocks(sweeps, sources=[f"{number}.json" for number in range(len(sweeps))], bootstrap=20)


def test_a_sweep_in_parts_is_fitted_like_the_whole(whole: ClockSweep) -> None:
    (one,), (many,) = fitted([whole]).series, fitted(apart(whole)).series
    assert many.points == one.points
    assert many.clock_mhz_K == one.clock_mhz_K
    assert many.critical.mhz == pytest.approx(one.critical.mhz, rel=0.03)
    assert many.reference == one.reference


def test_without_a_reference_the_advice_says_what_it_is_relative_to(whole: ClockSweep) -> None:
    advice = recommend_clocks(fitted(without_reference(whole))).series[0]
    assert advice.reference_how == "highest clock"
    assert "the highest clock measured, as no unlocked point counts" in advice.text
    assert "unlocked" not in advice.behaviour.text
    known = recommend_clocks(fitted(apart(whole))).series[0]
    assert known.reference_how == "unlocked"
    assert "it runs at unlocked" in known.behaviour.text


def test_measurements_given_twice_are_refused(whole: ClockSweep) -> None:
    with pytest.raises(ClockError, match=r"1\.json and 0\.json hold the same measurements"):
        fitted([whole, whole])


def test_sweeps_without_locks_that_ran_at_different_clocks_are_named(whole: ClockSweep) -> None:
    parts = apart(whole)
    unstated = []
    for part in parts:
        (series,) = part.series
        points = tuple(point.model_copy(update={"requested_sm_clock_mhz": None}) for point in series.points)
        unstated.append(part.model_copy(update={"series": (series.model_copy(update={"points": points}),)}))
    with pytest.raises(ClockError, match=r"state no lock.*--set-outside"):
        fitted(unstated)
    assert FitCode.UNLOCKED_DIFFER not in fitted(parts).note_codes


def test_files_at_other_temperatures_and_notes_of_sweeps_are_named(whole: ClockSweep) -> None:
    parts = apart(whole, notes=("shared with a stranger",))
    for number, part in enumerate(parts):
        (series,) = part.series
        points = tuple(
            point.model_copy(update={"start_temperature_c": 40 + 15 * (number == 2)})
            for point in series.points
        )
        parts[number] = part.model_copy(update={"series": (series.model_copy(update={"points": points}),)})
    model = fitted(parts)
    notes = model.notes
    assert any("40 C" in note and "55 C at those of 2.json" in note for note in notes)
    assert {FitCode.TEMPERATURES_DIFFER, FitCode.NOTE_OF_SWEEP} <= set(model.note_codes)
    assert "of 0.json: shared with a stranger" in notes
    assert len(notes) < 25  # however many files there are


def test_idle_power_is_that_of_a_device_without_a_lock(whole: ClockSweep) -> None:
    parts = [
        part.model_copy(
            update={"idle_power_mw": 120_000 if part.series[0].points[0].requested_sm_clock_mhz else 70_000}
        )
        for part in apart(whole)
    ]
    assert fitted(parts).idle_power_mw == 70_000


def test_a_plan_names_every_clock_in_every_way_and_quotes_what_it_is_given() -> None:
    ways = plan_commands(
        "GPU-1; rm -rf ~", (600, 900), (300_000,), sweep=["observatory", "clocks", "sweep"],
        program=["./run me.sh"], stem="out/a b", default_limit_mw=700_000,
    )  # fmt: skip
    lines = [line for way in ways.values() for line in way]
    for mhz in (600, 900):
        assert any(line.startswith(f"srun --gpu-freq={mhz},") and "'./run me.sh'" in line for line in lines)
        assert any(f"--lock-gpu-clocks={mhz},{mhz}" in line for line in lines)
        assert any(f"min_clock_mhz={mhz}&" in line for line in lines)
    assert "nvidia-smi -i 'GPU-1; rm -rf ~' --power-limit=300" in lines
    assert "nvidia-smi -i 'GPU-1; rm -rf ~' --power-limit=700" in lines
    (fit,) = (line for line in lines if " fit " in line)
    assert fit.count("'out/a b-") == 5  # none, 600, 900, 300 W, and the model


def test_a_sweep_given_to_recommend_is_told_to_be_fitted(
    whole: ClockSweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sweep.json"
    path.write_text(whole.model_dump_json())
    assert main(["clocks", "recommend", str(path)]) == 1
    assert "is a sweep that was not fitted" in capsys.readouterr().err

"""Energy of windows that repeat one iteration in time with the power sensor: sweeps and reuse."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from observatory.advice.frequency import recommend_clocks
from observatory.analysis.energy import fit_reuse, sensor_of
from observatory.analysis.energy.words import reason_words
from observatory.analysis.frequency import fit_clocks
from observatory.campaign.prefix_cache import _measurement
from observatory.campaign.sweep.document import sweep_document
from observatory.campaign.sweep.journal import JournalHead, JournalPoint, JournalSeries
from observatory.campaign.workloads import Window
from observatory.cli import main
from observatory.run.documents.clock_sweep import ClockPoint
from observatory.run.documents.prefix_cache import ReuseMeasurement, ReuseMeasurements
from observatory.run.manifest import RankPower
from tests.devices.sensor import Load, SimulatedSensor, steps
from tests.devices.synthetic_device import DEVICES, made_sweep
from tests.reports.sample_power import DEVICE, UUID, a_power_run

#: Length of an iteration in ms -> whether integrated power of it has an energy and a flag.
RHYTHMS = [(60.0, True, True), (100.0, False, True), (43.7, True, False)]


def load_of(step_ms: float) -> Load:
    return steps([("a", step_ms / 2, 420.0), ("b", step_ms / 2, 290.0)], seconds=10)


def rows_of(load: Load, *, counter: bool) -> pd.DataFrame:
    rows = SimulatedSensor().sample(load)
    rows = rows.assign(
        device_uuid=UUID,
        sm_clock_mhz=pd.array(np.full(len(rows), 1500), "Int32"),
        event_reasons=pd.array(np.zeros(len(rows), dtype=np.int64), "Int64"),
    )
    return rows if counter else rows.drop(columns="energy_mj")


def point_of(path: Path, step_ms: float, *, counter: bool) -> ClockPoint:
    load = load_of(step_ms)
    a_power_run(path, power=rows_of(load, counter=counter))
    head = JournalHead(device=DEVICE, series=(JournalSeries(name="one"),), supported_sm_clocks_mhz=(1500,))
    window = JournalPoint(
        order=0, repeat=0, series=0, sm_clock_mhz=1500, start_ns=load.start_ns, end_ns=load.end_ns,
        iterations=round((load.end_ns - load.start_ns) / (step_ms * 1e6)),
    )  # fmt: skip
    return sweep_document(head, [window], RankPower(), path).series[0].points[0]


@pytest.mark.parametrize(("step_ms", "has_energy", "flagged"), RHYTHMS)
def test_a_point_of_a_sweep_carries_what_the_sensor_may_have_missed(
    tmp_path: Path, step_ms: float, has_energy: bool, flagged: bool
) -> None:
    point = point_of(tmp_path / "power", step_ms, counter=False)
    assert (point.energy_mj is not None) == has_energy
    assert point.energy_flag == ("in time with the sensor" if flagged else None)
    assert ("in time with the power sensor" in point.reason) == flagged
    if has_energy:
        assert point.energy_error is not None
        assert (point.energy_error > 0.05) == flagged
    assert (point.energy_source is None) == (point.energy_mj is None)
    counted = point_of(tmp_path / "counter", step_ms, counter=True)
    assert (counted.energy_source, counted.energy_flag) == ("counter", None), "a counter misses nothing"


def test_fit_and_advice_name_flagged_energies() -> None:
    sweep = made_sweep([DEVICES["memory-bound"]], repeats=2)
    flag = {"energy_source": "integral", "energy_flag": "in time with the sensor", "energy_error": 0.1}
    series = sweep.series[0]
    points = [
        point.model_copy(update=flag) if point.requested_sm_clock_mhz == 990 else point
        for point in series.points
    ]
    flagged = sum(point.energy_flag is not None for point in points)
    assert flagged
    changed = sweep.model_copy(update={"series": (series.model_copy(update={"points": tuple(points)}),)})
    model = fit_clocks([changed])
    (found,) = [item for item in model.series[0].confounds if item.kind == "in time with the sensor"]
    assert found.numbers["points"] == flagged
    (advice,) = recommend_clocks(model).series
    assert advice.verdict == "lock"
    assert f"the energy of {flagged} points is integrated power in time with the sensor" in advice.text
    assert not [item for item in fit_clocks([sweep]).series[0].confounds if "sensor" in item.kind]
    # Energies that are too uncertain are not there at all, and the fit says so.
    lost = [
        point.model_copy(update={**flag, "energy_mj": None, "energy_source": None, "energy_error": None})
        for point in series.points
    ]
    gone = sweep.model_copy(update={"series": (series.model_copy(update={"points": tuple(lost)}),)})
    assert "in time with the sensor" in fit_clocks([gone]).series[0].no_power


@pytest.mark.parametrize(("step_ms", "has_energy", "flagged"), RHYTHMS)
def test_a_window_of_prefills_carries_it_too(step_ms: float, has_energy: bool, flagged: bool) -> None:
    load = load_of(step_ms)
    window = Window(
        start_ns=load.start_ns, end_ns=load.end_ns,
        iterations=round((load.end_ns - load.start_ns) / (step_ms * 1e6)),
    )  # fmt: skip
    row = _measurement(0.0, window, rows_of(load, counter=False), sensor_of(DEVICE.name))
    assert isinstance(row, ReuseMeasurement) == has_energy
    if isinstance(row, ReuseMeasurement):
        assert row.energy_flag == ("in time with the sensor" if flagged else None)
    else:
        assert "in time with the power sensor" in reason_words(row)


def test_reuse_show_widens_and_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def document(flag: bool) -> ReuseMeasurements:
        rows = [
            ReuseMeasurement.model_validate(
                {
                    "cell": "MISS" if fraction == 0 else "EXACT_HIT", "cached_fraction": fraction,
                    "prefills": 100, "duration_s": 5.0, "energy_mj": energy * (1 + 0.001 * number),
                    "energy_error": 0.1 if flag else 0.01,
                    "energy_flag": "in time with the sensor" if flag and fraction == 0 else None,
                }
            )
            for fraction, energy in ((0.0, 1e6), (1.0, 4e5))
            for number in range(3)
        ]  # fmt: skip
        return ReuseMeasurements(
            created_unix_s=time.time(), model="m", prompt_tokens=4096, device=DEVICE, measurements=tuple(rows)
        )

    plain, flagged = fit_reuse(document(False)), fit_reuse(document(True))
    assert (plain.saved_flag, flagged.saved_flag) == (None, "in time with the sensor")
    assert flagged.cells["flag"].tolist() == ["in time with the sensor", None]
    assert flagged.saved is not None
    assert flagged.saved_low is not None
    assert flagged.saved_low < flagged.saved - 0.03 < (plain.saved_low or 0.0)
    assert flagged.cells["high_mj"].iloc[0] > 1.09 * flagged.cells["prefill_mj"].iloc[0]
    path = tmp_path / "reuse.json"
    path.write_text(document(True).model_dump_json())
    assert main(["reuse", "show", str(path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["reuse"]
    assert (shown["saved_flag"], shown["cells"][0]["flag"]) == ("in time with the sensor",) * 2
    assert main(["reuse", "show", str(path)]) == 0
    assert "integrated power of" in "".join(capsys.readouterr())

"""The recording of a simulated GPU is one that the replay device plays."""

from __future__ import annotations

from pathlib import Path

from observatory.devices.replay import ReplayDevice
from observatory.devices.simulated import SIMULATED_UUID, main


def test_its_counter_is_the_integral_of_its_power(tmp_path: Path) -> None:
    path = tmp_path / "gpu.parquet"
    assert main([str(path), "--seconds", "6"]) == 0
    device = ReplayDevice(path, pace="recorded")
    assert device.spec.uuid == SIMULATED_UUID
    first, *_, last = [device.read() for _ in range(120)]
    assert first.energy_mj == 0
    # 1.5 s idle, busy, idle, busy; the last sample is 50 ms before the end
    assert last.energy_mj == round((2 * 1.5 * 90 + (2 * 1.5 - 0.05) * 420) * 1e3)
    assert {first.power_mw, last.power_mw} == {90_000, 420_000}

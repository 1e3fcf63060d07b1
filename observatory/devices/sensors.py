"""How a device's sensors work: their update periods and averaging windows.

Numbers of NVIDIA devices are measured ones of arXiv 2312.02741 (instant power, milliseconds): H100 and A100
update every 100 and average the last 25, so they cover a quarter of the time; Ada 100 and 100; V100 20 and
10. The energy counter is updated about every 100 ms and is taken to count all the time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from observatory.run.manifest import DeviceCalibration

#: Kinds of devices that are a processor's package and work for all ranks of their node.
PROCESSOR_KINDS = ("rapl", "cpu")

#: Sensors of different boards are off by about +-5 % (arXiv 2312.02741). It is the same for all phases of one
#: device and in no interval of this package.
CALIBRATION_ERROR = 0.05

#: Device names -> update and window of the instant sensor, in ms. The first match counts.
_SENSORS = (
    (re.compile(r"\b(A100|H100|H200|GH200|H800|A800)\b"), 100.0, 25.0),
    (re.compile(r"\b(RTX 40\d\d|RTX \w* ?(4000|4500|5000|6000) Ada|L4|L40S?)\b"), 100.0, 100.0),
    (re.compile(r"\bV100\b"), 20.0, 10.0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SensorModel:
    """Properties of a device's sensors.

    Attributes:
        update_ms: update period of instant power; None: to be determined from the samples.
        window_ms: averaging window, the time before the update that power is the mean of; None where not
            known: then it is taken to be short, so that what happens between updates is not covered.
        counter_ms: update period of the energy counter; None: to be determined from the samples.
        lag_low_ms, lag_high_ms: bounds of how long after the end of its averaging window a value can be read.
        counter_over_integral: ratio of counter and integrated power that the start-up calibration measured; 1
            when it measured none.
        source: where these come from.
    """

    update_ms: float | None = None
    window_ms: float | None = None
    counter_ms: float | None = None
    lag_low_ms: float = 0.0
    lag_high_ms: float = 30.0
    counter_over_integral: float = 1.0
    source: str = "not known"

    @property
    def unseen_share(self) -> float:
        """Share of the time that instant power does not cover; 1 where the window is not known."""
        if self.update_ms is None or self.window_ms is None:
            return 1.0
        return max(0.0, 1.0 - self.window_ms / self.update_ms)


def sensor_of(
    name: str | None, calibration: DeviceCalibration | None = None, *, kind: str | None = None
) -> SensorModel:
    """Properties of a device's sensors by its name and a run's calibration of it.

    Args:
        name: as the driver names it.
        calibration: what the sampler measured of the device. Impossible numbers are passed over.
        kind: of the device, as the manifest has it.
    """
    model = SensorModel()
    if kind is not None and kind.lower() in PROCESSOR_KINDS:
        model = SensorModel(counter_ms=1.0, source="RAPL counters are updated about every millisecond")
    for pattern, update_ms, window_ms in _SENSORS:
        if name is not None and pattern.search(name):
            model = SensorModel(
                update_ms=update_ms, window_ms=window_ms, counter_ms=100.0,
                source="arXiv 2312.02741, by the device's name",
            )  # fmt: skip
            break
    if calibration is None:
        return model
    measured = {
        "update_ms": _within(_period_ms(calibration, "power_mw"), 1.0, 10_000.0),
        "counter_ms": _within(_period_ms(calibration, "energy_mj"), 1.0, 10_000.0),
        "counter_over_integral": _within(calibration.counter_over_integral, 0.5, 2.0),
    }
    usable = {target: value for target, value in measured.items() if value is not None}
    if not usable:
        return model
    return replace(model, **usable, source=f"calibration at start-up; else {model.source}")


def _period_ms(calibration: DeviceCalibration, quantity: str) -> float | None:
    field = calibration.fields.get(quantity)
    return None if field is None else field.update_period_ms


def _within(value: float | None, low: float, high: float) -> float | None:
    return value if value is not None and low <= value <= high else None

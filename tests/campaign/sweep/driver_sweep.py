"""A sweep of the driver in C, locked through the real pynvml: a module with the argument STATE.

Prints a :class:`ClockSweep`. Clock, time and power of each lock and limit are those the driver itself works
with (``fake_get``), so that the points are exact and take no waiting.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pynvml

from observatory.run.documents.clock_sweep import ClockPoint, ClockSeries, ClockSweep
from observatory.run.manifest import DeviceSpec
from tests.devices.driver import FakeDriver

LOCKS_MHZ = (480, 600, 690, 780, 870, 990, 1110, 1230, 1350, 1470, 1590, 1710, 1830, 1905, 1980)
CAPS_W = (220, 240, 300, 500)
ITERATIONS = 100


def main(state: Path) -> None:
    """Ask for every lock and limit, and print what the driver does with it."""
    driver = FakeDriver(state)
    driver.load()
    driver.set(busy=1, ambient_c=20)
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    default_mw = pynvml.nvmlDeviceGetPowerManagementDefaultLimit(handle)
    points: list[ClockPoint] = []

    def measure(lock: int | None, limit_w: int | None) -> None:
        mhz = round(driver.get("mhz"))
        capped = bool(pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle) & 0x4)
        missed = lock is not None and abs(mhz - lock) > 15
        seconds = driver.get("iteration_s")
        points.append(
            ClockPoint(
                order=len(points),
                requested_sm_clock_mhz=lock,
                requested_limit_mw=None if limit_w is None else 1000 * limit_w,
                enforced_limit_mw=pynvml.nvmlDeviceGetEnforcedPowerLimit(handle),
                iterations=ITERATIONS,
                duration_s=ITERATIONS * seconds,
                energy_mj=1e3 * ITERATIONS * seconds * driver.get("watts"),
                energy_source="counter",
                sm_clock_mhz=mhz,
                sm_clock_low_mhz=mhz,
                sm_clock_high_mhz=mhz,
                event_reasons=0x4 if capped else 0,
                power_cap_share=float(capped),
                label="power-capped" if capped else "clamped" if missed else "ok",
            )
        )

    measure(None, None)
    for lock in LOCKS_MHZ:
        pynvml.nvmlDeviceSetGpuLockedClocks(handle, lock, lock)
        measure(lock, None)
    pynvml.nvmlDeviceResetGpuLockedClocks(handle)
    for limit_w in CAPS_W:
        pynvml.nvmlDeviceSetPowerManagementLimit(handle, 1000 * limit_w)
        measure(None, limit_w)
    sweep = ClockSweep(
        created_unix_s=0.0,
        device=DeviceSpec(kind="gpu", name="Fake GPU", uuid=pynvml.nvmlDeviceGetUUID(handle)),
        default_limit_mw=default_mw,
        supported_sm_clocks_mhz=tuple(range(210, 1981, 15)),
        series=(ClockSeries(name="decode", phase="decode", points=tuple(points)),),
    )
    sys.stdout.write(sweep.model_dump_json())


if __name__ == "__main__":
    main(Path(sys.argv[1]))

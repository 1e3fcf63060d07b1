"""A program on the fake driver's GPU: busy while it runs, one line per iteration the driver has counted.

    python -m tests.campaign.sweep.iterating

The driver keeps the device busy also while this program is stopped: its rests do not cool the chip. Lines
that came up meanwhile are dropped, as a real program would not have made them.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from tests.devices.driver import FakeDriver


def main() -> None:
    """Iterate until ended."""
    driver = FakeDriver(Path(os.environ["FAKE_NVML_STATE"]))
    driver.set(busy=1)
    looked_ns = time.monotonic_ns()
    done = int(driver.get("iterations"))
    while True:
        time.sleep(0.002)
        woken_ns = time.monotonic_ns()
        now = int(driver.get("iterations"))
        rested = woken_ns - looked_ns > 1e9
        looked_ns = woken_ns
        sys.stdout.write("\n" * (0 if rested else now - done))
        sys.stdout.flush()
        done = now


if __name__ == "__main__":
    main()

"""`observatory doctor` and the manifest's device list, on the fake driver."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from observatory.cli import main
from observatory.host.provenance import driver_devices
from tests.devices.driver import FakeDriver
from tests.devices.scenes import needs_driver, play

pytestmark = needs_driver


def printed(*argv: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(list(argv)) == 0
    return out.getvalue()


def doctor_scene(driver: FakeDriver) -> dict[str, Any]:
    driver.devices(3)
    driver.fail("field:186", 3, 1)
    driver.fail("nvmlDeviceGetEnforcedPowerLimit", 4, 1)
    driver.set(2, lost=1)
    outcome = {
        "document": json.loads(printed("doctor", "--json")),
        "text": printed("doctor"),
        "manifest": [spec.model_dump() for spec in driver_devices()],
    }
    assert driver.changes() == []
    return outcome


def test_the_doctor_says_of_every_device_what_it_tells_and_what_not(tmp_path: Path) -> None:
    outcome = play(doctor_scene, tmp_path)
    document, text = outcome["document"], outcome["text"]
    assert set(document) >= {"capabilities", "devices", "layers"}
    nvml = next(item for item in document["capabilities"] if item["name"] == "NVML")
    assert nvml["works"]
    assert "3 devices, driver 999.01-fake" in nvml["detail"]
    first, second, lost, *absent = document["devices"]
    assert {field["state"] for field in first["fields"]} == {"works"}
    (gap,) = [field for field in second["fields"] if field["state"] != "works"]
    assert (gap["name"], gap["state"], gap["remedy"]) == ("power_mw", "not supported", None)
    assert lost["state"] == "failed"
    assert {status["kind"] for status in absent} >= {"amd"}
    for part in (
        "GPU-fa4e0000-0000-4000-8000-000000000001", "field 186 returned 3", "GPU is lost",
        "amdsmi is not installed", "119 clocks from 210 to 1980 MHz",
    ):  # fmt: skip
        assert part in text
    limits = [spec["enforced_limit_mw"] for spec in outcome["manifest"]]
    assert limits == [700_000, None, None]
    assert outcome["manifest"][0]["bus_id"] == "00000000:10:00.0"
    assert outcome["manifest"][2]["uuid"] is None

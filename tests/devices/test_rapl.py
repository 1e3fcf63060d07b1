"""RAPL on a powercap tree of our own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from observatory.devices.rapl import RaplDevice, find_domains
from observatory.errors import DeviceError, DeviceLostError

RANGE_UJ = 65_532_610_987


class Zones:
    """A powercap folder as the kernel shows it: flat names, nested zones named by colons."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir()

    def add(self, zone: str, name: str, *, energy_uj: int = 0, range_uj: int = RANGE_UJ) -> Path:
        folder = self.root / zone
        folder.mkdir()
        (folder / "name").write_text(f"{name}\n")
        (folder / "energy_uj").write_text(f"{energy_uj}\n")
        (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")
        (folder / "constraint_0_power_limit_uw").write_text("225000000\n")
        return folder

    @staticmethod
    def spend(folder: Path, energy_uj: int) -> None:
        """Let the counter count, and wrap."""
        most = int((folder / "max_energy_range_uj").read_text())
        counter = int((folder / "energy_uj").read_text()) + energy_uj
        (folder / "energy_uj").write_text(f"{counter if counter < most else counter - most}\n")


@pytest.fixture
def zones(tmp_path: Path) -> Zones:
    return Zones(tmp_path / "powercap")


def server(zones: Zones) -> None:
    for socket in (0, 1):
        zones.add(f"intel-rapl:{socket}", f"package-{socket}")
        zones.add(f"intel-rapl:{socket}:0", "dram")
        zones.add(f"intel-rapl:{socket}:1", "core")
    zones.add("intel-rapl:2", "psys")
    zones.add("intel-rapl-mmio:0", "package-0")
    (zones.root / "intel-rapl").mkdir()
    (zones.root / "dtpm").mkdir()


def test_packages_memory_and_platform_are_named_and_nothing_is_counted_twice(zones: Zones) -> None:
    server(zones)
    found = find_domains(zones.root)
    assert [domain.name for domain in found] == ["dram-0", "dram-1", "package-0", "package-1", "psys"]
    covers = {domain.name: domain.covers for domain in found}
    assert "without the DRAM" in covers["package-0"]
    assert "contains the package" in covers["psys"]


def test_dies_and_several_platform_domains_keep_names_of_their_own(zones: Zones) -> None:
    zones.add("intel-rapl:0", "package-0-die-0")
    zones.add("intel-rapl:0:0", "dram")
    zones.add("intel-rapl:1", "package-0-die-1")
    zones.add("intel-rapl:1:0", "dram")
    zones.add("intel-rapl:2", "psys")
    zones.add("intel-rapl:3", "psys")
    assert [domain.name for domain in find_domains(zones.root)] == [
        "dram-0-die-0", "dram-0-die-1", "package-0-die-0", "package-0-die-1", "psys", "psys-3",
    ]  # fmt: skip


def test_a_machine_without_rapl_has_no_domains_and_says_so(tmp_path: Path) -> None:
    assert find_domains(tmp_path / "nowhere") == []
    with pytest.raises(DeviceError, match="no RAPL domain package-0; expected one of none"):
        RaplDevice("package-0", root=tmp_path)


def test_the_counter_goes_on_over_its_wraps(zones: Zones) -> None:
    package = zones.add("intel-rapl:0", "package-0", energy_uj=RANGE_UJ - 3_000_000)
    with RaplDevice("package-0", root=zones.root) as device:
        first = device.read().energy_mj
        outcome = []
        for _ in range(3):
            for _ in range(3):
                zones.spend(package, RANGE_UJ // 3 + 1_000_000)
                sample = device.read()
                assert sample.energy_mj is not None
                outcome.append(sample.energy_mj)
    assert first is not None
    spent_uj = RANGE_UJ // 3 + 1_000_000
    assert [energy_mj - first for energy_mj in outcome] == pytest.approx(
        [number * spent_uj / 1000 for number in range(1, 10)], abs=2
    )


def test_a_counter_unread_for_longer_than_it_may_take_to_wrap_is_not_trusted_again(zones: Zones) -> None:
    zones.add("intel-rapl:0", "package-0")
    now_ns = 0
    with RaplDevice("package-0", root=zones.root, clock_ns=lambda: now_ns) as device:
        now_ns += 60_000_000_000
        assert device.read().energy_mj is not None
        now_ns += 66_000_000_000  # 65.5 kJ last 65.5 s at 1 kW
        assert device.read().energy_mj is None
        now_ns += 1_000_000_000
        assert device.read().energy_mj is None


def test_power_is_never_made_up_from_energy(zones: Zones) -> None:
    zones.add("intel-rapl:0", "package-0")
    with RaplDevice("package-0", root=zones.root, host="node7") as device:
        assert device.read().power_mw is None
        assert "difference of two readings" in device.unavailable["power_mw"]
        assert device.uuid == "rapl:package-0@node7"
        assert device.read().enforced_limit_mw == 225_000


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_counter_that_only_root_may_read_says_how_to_get_it(zones: Zones) -> None:
    (zones.add("intel-rapl:0", "package-0") / "energy_uj").chmod(0)
    refused(zones)


def test_a_refused_counter_says_how_to_get_it(zones: Zones, monkeypatch: pytest.MonkeyPatch) -> None:
    zones.add("intel-rapl:0", "package-0")
    from observatory.devices import rapl

    def guarded(path: Path, limit: int) -> bytes | None:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return path.read_bytes()[:limit]

    monkeypatch.setattr(rapl, "read_at_most", guarded)
    refused(zones)


def refused(zones: Zones) -> None:
    with RaplDevice("package-0", root=zones.root) as device:
        assert device.read().energy_mj is None
        gap = device.gaps["energy_mj"]
        assert gap.kind == "not permitted"
        assert gap.remedy is not None
        assert f"chmod a+r {zones.root}/intel-rapl:0/energy_uj" in gap.remedy
        assert "docs/power.md#permissions" in gap.remedy


@pytest.mark.parametrize("content", ["", "many", "-5", "9" * 40, "\x00\xff"])
def test_a_counter_that_is_no_number_is_a_reason_and_no_reading(zones: Zones, content: str) -> None:
    folder = zones.add("intel-rapl:0", "package-0")
    (folder / "energy_uj").write_text(content)
    with RaplDevice("package-0", root=zones.root) as device:
        assert device.read().energy_mj is None
        assert "holds no such number" in device.unavailable["energy_mj"]


def test_a_counter_of_unknown_range_is_not_used(zones: Zones) -> None:
    zones.add("intel-rapl:0", "package-0", range_uj=0)
    with RaplDevice("package-0", root=zones.root) as device:
        assert device.read().energy_mj is None
        assert "max_energy_range_uj" in device.unavailable["energy_mj"]


def test_an_unloaded_module_is_a_lost_device(zones: Zones) -> None:
    folder = zones.add("intel-rapl:0", "package-0")
    with RaplDevice("package-0", root=zones.root) as device:
        device.read()
        (folder / "energy_uj").unlink()
        with pytest.raises(DeviceLostError, match="is gone"):
            device.read()

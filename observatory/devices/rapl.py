"""Processors through RAPL, as the kernel's powercap files show it (Intel, and AMD since kernel 5.8).

A domain is a counter of energy, in microjoules up to ``max_energy_range_uj``, then from 0 again:

    package-N  cores, caches and the rest of the chip. On servers without the DRAM, which is dram-N
    dram-N     the memory of package N
    psys       the platform, as its vendor wired it; it contains the package

They overlap: never add psys to the others. The domains core and uncore lie inside the package and are left
out, and so is intel-rapl-mmio, which shows package-0 a second time. There is no power in RAPL, only energy.
Since CVE-2020-8694 only root may read the counter.
"""

from __future__ import annotations

import errno
import re
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from observatory.devices.base import FIELDS, Gap, PowerDevice, Sample
from observatory.errors import DeviceError, DeviceLostError
from observatory.run.bounded import read_at_most
from observatory.run.files import one_line, os_reason
from observatory.run.manifest import DeviceSpec

POWERCAP = Path("/sys/class/powercap")

#: More than any socket draws. A counter unread for longer than its range lasts at this power may have wrapped
#: unseen, and is not trusted any more.
_MOST_W = 1000

_ZONE = re.compile(r"intel-rapl:(\d{1,4})(?::(\d{1,4}))?", re.ASCII)
_MAX_ZONES = 1024
_MAX_DIGITS = 64

_COVERS = {
    "package": "cores, caches and the rest of the chip; on servers without the DRAM",
    "dram": "memory of the package",
    "psys": "platform as its vendor wired it; contains the package",
}
_REMEDY = (
    "run as root or with CAP_DAC_READ_SEARCH, or let root `chmod a+r {path}` until the next boot, which "
    "opens a side channel (docs/power.md#permissions)"
)
_NO_POWER = Gap(kind="not supported", detail="RAPL counts energy; power is a difference of two readings")
_NOT_REPORTED = Gap(kind="not supported", detail="RAPL does not report it")


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """One RAPL domain.

    Attributes:
        name: ``package-0``, ``dram-0``, ``psys``.
        folder: its files.
        covers: what its energy is that of.
    """

    name: str
    folder: Path
    covers: str


def find_domains(root: Path = POWERCAP) -> list[Domain]:
    """Package, DRAM and platform domains of this machine, by name; empty where the kernel shows none."""
    try:
        names = sorted(entry.name for entry in root.iterdir())[:_MAX_ZONES]
    except OSError:
        return []
    domains: dict[str, Domain] = {}
    for zone in names:
        match = _ZONE.fullmatch(zone)
        label = _text(root / zone / "name") if match else None
        if match is None or label is None:
            continue
        parent = None if match[2] is None else _text(root / f"intel-rapl:{match[1]}" / "name")
        name = label if parent is None else f"{label}{parent.removeprefix('package')}"
        kind = label.split("-", 1)[0]
        if kind not in _COVERS or (kind == "dram") != (parent is not None):
            continue
        if name in domains:  # one psys per package
            name = f"{name}-{match[1]}"
        domains[name] = Domain(name=name, folder=root / zone, covers=_COVERS[kind])
    return [domains[name] for name in sorted(domains)]


class RaplDevice(PowerDevice):
    """One RAPL domain. Its UUID is ``rapl:DOMAIN@HOST``, for every machine has a ``package-0``.

    Args:
        name: the domain, ``package-0``.
        root: powercap's folder.
        host: name of this machine; asked of the system by default.
        clock_ns: monotonic time.

    Raises:
        DeviceError: there is no such domain.
    """

    def __init__(
        self,
        name: str,
        *,
        root: Path = POWERCAP,
        host: str | None = None,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        domains = {domain.name: domain for domain in find_domains(root)}
        if name not in domains:
            raise DeviceError(
                f"there is no RAPL domain {one_line(name, 80)}",
                expected="one of "
                f"{', '.join(domains) or 'none: the kernel shows no RAPL here, as in most virtual machines'}",
            )
        self._clock_ns = clock_ns
        self._domain = domains[name]
        self._gaps = dict.fromkeys(FIELDS, _NOT_REPORTED) | {
            "power_mw": _NO_POWER,
            "average_power_mw": _NO_POWER,
        }
        self._wraps = 0
        self._last_ns = self._clock_ns()
        self._last_uj = self._probe("energy_uj", "energy_mj")
        self._range_uj = 0
        if self._last_uj is not None:
            self._range_uj = self._probe("max_energy_range_uj", "energy_mj", least=1) or 0
        limit_uw = self._probe("constraint_0_power_limit_uw", "enforced_limit_mw")
        self._spec = DeviceSpec(
            kind="rapl",
            name=f"RAPL {name}",
            uuid=f"rapl:{name}@{one_line(host or socket.gethostname(), 200)}",
            enforced_limit_mw=None if limit_uw is None else limit_uw // 1000,
            covers=self._domain.covers,
        )

    @property
    def spec(self) -> DeviceSpec:
        """The domain; ``covers`` says what its energy is that of."""
        return self._spec

    @property
    def gaps(self) -> Mapping[str, Gap]:
        """Why all but energy and limit are missing, and these too where their files cannot be read."""
        return dict(self._gaps)

    def _read(self) -> Sample:
        """Read the counter, and the power limit."""
        start_ns = self._clock_ns()
        energy_mj = None if "energy_mj" in self._gaps else self._energy_mj(start_ns)
        limit_uw = None if "enforced_limit_mw" in self._gaps else self._number("constraint_0_power_limit_uw")
        return Sample(
            time_ns=start_ns,
            read_ns=self._clock_ns() - start_ns,
            device_uuid=self.uuid,
            energy_mj=energy_mj,
            enforced_limit_mw=None if limit_uw is None else limit_uw // 1000,
        )

    def _energy_mj(self, now_ns: int) -> int | None:
        """Energy since the counter's own beginning, wraps added; None once a wrap may have been missed."""
        counter_uj = self._number("energy_uj")
        if counter_uj is None or self._last_uj is None:
            return None
        if (now_ns - self._last_ns) * _MOST_W > self._range_uj * 1000:
            self._last_uj = None
            return None
        if counter_uj < self._last_uj:
            self._wraps += 1
        self._last_uj, self._last_ns = counter_uj, now_ns
        return (self._wraps * self._range_uj + counter_uj) // 1000

    def _number(self, file: str) -> int | None:
        """Content of a file; None when it holds no number or cannot be read this time."""
        try:
            return self._parse(file)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                return None
            raise DeviceLostError(
                f"{self._spec.name} is gone ({os_reason(error)})",
                expected=str(self._domain.folder / file),
                remedy="check that its kernel module is still loaded",
            ) from error
        except ValueError:
            return None

    def _parse(self, file: str, *, least: int = 0) -> int:
        content = read_at_most(self._domain.folder / file, _MAX_DIGITS) or b""
        value = int(content.decode("ascii"))
        if not least <= value < 1 << 63:
            raise ValueError(value)
        return value

    def _probe(self, file: str, field: str, *, least: int = 0) -> int | None:
        """Content of a file when the device is opened; the reason is kept where there is none."""
        self._gaps.pop(field, None)
        path = self._domain.folder / file
        try:
            return self._parse(file, least=least)
        except OSError as error:
            denied = error.errno in (errno.EACCES, errno.EPERM)
            self._gaps[field] = Gap(
                kind="not permitted" if denied else "not supported",
                detail=f"{path} cannot be read ({os_reason(error)})",
                remedy=_REMEDY.format(path=path) if denied else None,
            )
        except ValueError:
            self._gaps[field] = Gap(kind="failed", detail=f"{path} holds no such number")
        return None


def _text(path: Path) -> str | None:
    try:
        content = read_at_most(path, 256)
    except OSError:
        return None
    return one_line(content.decode("utf-8", "replace"), 80) if content else None

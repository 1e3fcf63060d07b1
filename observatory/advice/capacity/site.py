"""What a site overrides of hardware profiles, and what devices cost there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, ValidationError, model_validator

from observatory.analysis.hardware import Figure, HardwareProfile, Quantity
from observatory.analysis.hardware.profiles import UNITS
from observatory.errors import PlanError
from observatory.hpc.site import load_site as load_batch_site
from observatory.run.bounded import first_problem, read_toml
from observatory.run.records import Record

_MOST_BYTES = 64 << 10
_Positive = Annotated[float, Field(ge=1e-6, le=1e9)]
_Count = Annotated[int, Field(ge=1, le=65536)]


class Site(Record):
    """A site: what its links and power are, instead of what profiles assume.

    Attributes:
        gpus_per_node: devices that fast links join.
        gpus_per_rack: devices of a rack.
        link_bandwidth, nic_bandwidth: GB/s, one direction, of one device.
        power_limit: W of one device.
        rack_power: W that a rack may draw for its devices; needs ``gpus_per_rack``.
        source: where the figures come from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    gpus_per_node: _Count | None = None
    gpus_per_rack: _Count | None = None
    link_bandwidth: _Positive | None = None
    nic_bandwidth: _Positive | None = None
    power_limit: _Positive | None = None
    rack_power: _Positive | None = None
    source: Annotated[str, Field(min_length=1, max_length=500)] = "stated by the site"

    @model_validator(mode="after")
    def _rack_is_known(self) -> Site:
        if self.rack_power is not None and self.gpus_per_rack is None:
            raise ValueError("rack_power needs gpus_per_rack")
        return self

    def applied(self, profile: HardwareProfile) -> HardwareProfile:
        """The profile with this site's figures."""
        names: tuple[Quantity, ...] = ("link_bandwidth", "nic_bandwidth", "power_limit")
        stated: dict[Quantity, Figure] = {
            name: Figure(value=value, unit=UNITS[name], source=self.source, date="2026-01-01")
            for name in names
            if (value := getattr(self, name)) is not None
        }
        if not stated:
            return profile
        achievable = {name: item for name, item in profile.achievable.items() if name not in stated}
        return profile.model_copy(update={"peak": {**profile.peak, **stated}, "achievable": achievable})


class Prices(Record):
    """What an hour of a device costs.

    Attributes:
        currency: of all prices.
        gpu_hour: price by the name of the hardware profile.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    currency: Annotated[str, Field(pattern=r"^[A-Za-z]{3}$")]
    gpu_hour: dict[Annotated[str, Field(max_length=64)], _Positive]


def load_site(path: Path) -> Site:
    """Read the ``[hardware]`` of a site file, the one that ``observatory submit`` takes, too (docs/hpc.md).

    Raises:
        BatchError: it cannot be read, or says something that no site has.
        PlanError: its ``[hardware]`` does.
    """
    stated = load_batch_site(path).hardware
    try:
        return Site.model_validate(stated)
    except ValidationError as error:
        problem = first_problem(error)
    raise PlanError(
        f"[hardware] of site file {path} is not valid ({problem})", remedy="docs/plan.md has its keys"
    )


def load_prices(path: Path) -> Prices:
    """Read a file of prices (docs/plan.md).

    Raises:
        PlanError: it cannot be read, or is none.
    """
    return read_toml(
        path,
        Prices,
        most_bytes=_MOST_BYTES,
        failure=PlanError,
        what="price list",
        remedy="docs/plan.md has its form",
    )

"""What each power device of this machine tells, what it does not, and how to get that. Changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from observatory.devices.amd import list_amd, load_amdsmi
from observatory.devices.base import FIELDS, Gap, PowerDevice
from observatory.devices.find import all_selectors, open_device
from observatory.devices.nvml_library import close_nvml, code_text, list_gpus, load_nvml
from observatory.devices.processes import has_admin_capability
from observatory.devices.rapl import POWERCAP, find_domains
from observatory.errors import ObservatoryError
from observatory.locks.control import ClockControl

State = Literal["works", "not supported", "not permitted", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldStatus:
    """One quantity of a device.

    Attributes:
        name: one of ``FIELDS``.
        state: whether it is told, or which kind of reason there is.
        detail: the reason; None when it works.
        remedy: how to get it; None when it works or cannot be had.
    """

    name: str
    state: State
    detail: str | None = None
    remedy: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceStatus:
    """One device, or one kind of devices of which there is none.

    Attributes:
        selector: what opens it; None where there is no device.
        kind: ``nvidia``, ``amd`` or ``rapl``.
        name: the device's; None when it does not tell, or there is none.
        state: ``works`` when it tells something.
        detail: why there is no device, or it cannot be opened; what its energy covers, for RAPL.
        remedy: how to get it; None when it works or cannot be had.
        fields: its quantities; empty when it cannot be opened.
        clocks: whether its clocks may be locked, for NVIDIA; None for others.
    """

    selector: str | None
    kind: str
    name: str | None = None
    state: State = "works"
    detail: str | None = None
    remedy: str | None = None
    fields: tuple[FieldStatus, ...] = ()
    clocks: str | None = None


def device_report() -> list[DeviceStatus]:
    """Every device that drivers and kernel list, and why there is none where they list none."""
    found: list[DeviceStatus] = []
    for selector in all_selectors():
        try:
            with open_device(selector) as device:
                found.append(_status(selector, device))
        except ObservatoryError as error:
            kind = "nvidia" if selector.startswith("GPU-") else selector.partition(":")[0]
            detail, _, remedy = str(error).partition("; ")
            found.append(
                DeviceStatus(
                    selector=selector, kind=kind, state="failed", detail=detail, remedy=remedy or None
                )
            )
    return found + list(_absent({status.kind for status in found}))


def _status(selector: str, device: PowerDevice) -> DeviceStatus:
    gaps = device.gaps
    fields = tuple(
        FieldStatus(name=name, state=gaps[name].kind, detail=gaps[name].detail, remedy=gaps[name].remedy)
        if name in gaps
        else FieldStatus(name=name, state="works")
        for name in FIELDS
    )
    covers = (device.spec.model_extra or {}).get("covers")
    denied = next((field for field in fields if field.state == "not permitted"), None)
    works = any(field.state == "works" for field in fields)
    return DeviceStatus(
        selector=selector,
        kind=device.spec.kind,
        name=device.spec.name,
        state="works" if works else denied.state if denied else "not supported",
        detail=covers if isinstance(covers, str) else None,
        remedy=denied.remedy if denied and not works else None,
        fields=fields,
        clocks=lock_outlook(device.uuid) if device.spec.kind == "nvidia" else None,
    )


def lock_outlook(uuid: str) -> str:
    """Whether clocks may be locked, as far as it is told without trying.

    Begins with ``may be locked``, ``not permitted`` or ``refused``; the driver alone decides, when told to.
    """
    try:
        with ClockControl(uuid) as control:
            refusal = control.refusal()
            if refusal is not None:
                return f"refused: {refusal}"
            clocks = control.supported_sm_clocks_mhz
    except ObservatoryError as error:
        return f"refused: {error}"
    able = has_admin_capability()
    span = f"{len(clocks)} clocks from {clocks[0]} to {clocks[-1]} MHz"
    if able:
        return f"may be locked: {span}, and this process has CAP_SYS_ADMIN"
    why = "lacks CAP_SYS_ADMIN" if able is False else "may lack CAP_SYS_ADMIN"
    return f"not permitted: {span}, and this process {why} (docs/power.md#permissions)"


def _absent(kinds: set[str]) -> Iterator[DeviceStatus]:
    """Why there is no device of a kind, and GPUs that are listed and do not answer."""
    try:
        nvml = load_nvml()
        try:
            listed = list_gpus(nvml)
            for gpu in listed:
                if gpu.code:
                    yield DeviceStatus(
                        selector=gpu.spec.uuid, kind="nvidia", name=gpu.spec.name or "a listed GPU",
                        state="failed",
                        detail=f"it does not answer (NVML {gpu.code}, {code_text(nvml, gpu.code)})",
                        remedy="look for Xid lines in the kernel log; it takes a reset or a reboot",
                    )  # fmt: skip
        finally:
            close_nvml(nvml)
        if not listed:
            yield _none("nvidia", "the driver shows this process no GPU; ask the scheduler for one")
    except ObservatoryError as error:
        yield _none("nvidia", str(error))
    if "amd" not in kinds:
        try:
            amdsmi = load_amdsmi()
            try:
                list_amd(amdsmi)
            finally:
                amdsmi.amdsmi_shut_down()
            yield _none("amd", "amdsmi lists no GPU")
        except ObservatoryError as error:
            yield _none("amd", str(error))
    if not find_domains(POWERCAP):
        yield _none(
            "rapl",
            f"the kernel shows no RAPL domain under {POWERCAP}, as in virtual machines and many containers; "
            "run on the bare machine with the module intel_rapl_common, or let the container see the folder",
        )


def _none(kind: str, why: str) -> DeviceStatus:
    gap = Gap(kind="not supported", detail=why.partition("; ")[0], remedy=why.partition("; ")[2] or None)
    return DeviceStatus(selector=None, kind=kind, state=gap.kind, detail=gap.detail, remedy=gap.remedy)

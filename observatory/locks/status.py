"""What each power device of this machine reports, what it does not, and how to get that. Changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import JsonValue

from observatory.devices.amd import list_amd, load_amdsmi
from observatory.devices.base import FIELDS, PowerDevice
from observatory.devices.find import all_selectors, open_device
from observatory.devices.nvml_library import close_nvml, code_text, list_gpus, load_nvml
from observatory.devices.rapl import POWERCAP, find_domains
from observatory.errors import ObservatoryError
from observatory.host.processes import has_admin_capability
from observatory.locks.control import ClockControl
from observatory.locks.words import LockCode, outlook_words
from observatory.reasons import Reason

State = Literal["works", "not supported", "not permitted", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldStatus:
    """One quantity of a device.

    Attributes:
        name: one of ``FIELDS``.
        state: whether it is available, or which kind of reason there is.
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
        name: the device's; None when it does not report one, or there is no device.
        state: ``works`` when it reports something.
        detail: why there is no device, or it cannot be opened; what its energy covers, for RAPL.
        remedy: how to get it; None when it works or cannot be had.
        fields: its quantities; empty when it cannot be opened.
        clocks: whether its clocks may be locked (a ``LockCode``), for NVIDIA; None for others.
    """

    selector: str | None
    kind: str
    name: str | None = None
    state: State = "works"
    detail: str | None = None
    remedy: str | None = None
    fields: tuple[FieldStatus, ...] = ()
    clocks: Reason | None = None

    def document(self) -> dict[str, Any]:
        """The status for a JSON document; ``clocks`` in words, ``clocks_reason`` as a code."""
        clocks = self.clocks
        return asdict(self) | {
            "clocks": None if clocks is None else outlook_words(clocks),
            "clocks_reason": None if clocks is None else clocks.document(),
        }


def device_report() -> list[DeviceStatus]:
    """Every device that drivers and kernel list, and why there is none where they list none."""
    report: list[DeviceStatus] = []
    for selector in all_selectors():
        try:
            with open_device(selector) as device:
                report.append(_status(selector, device))
        except ObservatoryError as error:
            kind = "nvidia" if selector.startswith("GPU-") else selector.partition(":")[0]
            report.append(
                DeviceStatus(
                    selector=selector, kind=kind, state="failed", detail=error.what, remedy=error.advice
                )
            )
    return report + list(_absent({status.kind for status in report}))


def _status(selector: str, device: PowerDevice) -> DeviceStatus:
    gaps = device.gaps
    fields = tuple(
        FieldStatus(name=name, state=gaps[name].kind, detail=gaps[name].detail, remedy=gaps[name].remedy)
        if name in gaps
        else FieldStatus(name=name, state="works")
        for name in FIELDS
    )
    denied = next((field for field in fields if field.state == "not permitted"), None)
    works = any(field.state == "works" for field in fields)
    return DeviceStatus(
        selector=selector,
        kind=device.spec.kind,
        name=device.spec.name,
        state="works" if works else denied.state if denied else "not supported",
        detail=device.spec.covers,
        remedy=denied.remedy if denied and not works else None,
        fields=fields,
        clocks=lock_outlook(device.uuid) if device.spec.kind == "nvidia" else None,
    )


def lock_outlook(uuid: str) -> Reason:
    """Whether clocks may be locked, as far as it is known without trying; the driver alone decides."""
    try:
        with ClockControl(uuid) as control:
            refusal = control.refusal()
            if refusal is not None:
                return refusal
            clocks = control.supported_sm_clocks_mhz
    except ObservatoryError as error:
        return Reason(LockCode.UNAVAILABLE, {"error": str(error)})
    capable = has_admin_capability()
    values: dict[str, JsonValue] = {"clocks": len(clocks), "low_mhz": clocks[0], "high_mhz": clocks[-1]}
    if capable:
        return Reason(LockCode.ALLOWED, values)
    return Reason(LockCode.NOT_PERMITTED, values | {"capability_known": capable is not None})


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
            yield _none("nvidia", "the driver shows this process no GPU", "ask the scheduler for one")
    except ObservatoryError as error:
        yield _none("nvidia", error.what, error.advice)
    if "amd" not in kinds:
        try:
            amdsmi = load_amdsmi()
            try:
                list_amd(amdsmi)
            finally:
                amdsmi.amdsmi_shut_down()
            yield _none("amd", "amdsmi lists no GPU")
        except ObservatoryError as error:
            yield _none("amd", error.what, error.advice)
    if not find_domains(POWERCAP):
        yield _none(
            "rapl",
            f"the kernel shows no RAPL domain under {POWERCAP}, as in virtual machines and many containers",
            "run on the bare machine with the module intel_rapl_common, or let the container see the folder",
        )


def _none(kind: str, detail: str, remedy: str | None = None) -> DeviceStatus:
    return DeviceStatus(selector=None, kind=kind, state="not supported", detail=detail, remedy=remedy)

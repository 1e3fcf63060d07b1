"""Devices by name, and the devices that there are.

A selector is one of

    GPU-8932f937-...      UUID of an NVIDIA GPU, or a unique prefix of it
    00000000:10:00.0      PCI bus id of an NVIDIA or AMD GPU; the domain may be left out
    amd:UUID              an AMD GPU
    rapl:package-0        a RAPL domain of this machine
    replay:FILE           a recording (run directory or Parquet file); FILE#UUID when it holds several devices
    none                  no device

A device's own ``uuid`` is a selector of it, except a replayed one's. Ordinals are refused: CUDA, the driver
and Slurm count differently.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from observatory.devices.amd import AmdDevice, list_amd, load_amdsmi
from observatory.devices.base import FIELDS, NullDevice, PowerDevice
from observatory.devices.nvml import NvmlDevice
from observatory.devices.nvml_library import SUCCESS, close_nvml, list_gpus, load_nvml
from observatory.devices.rapl import POWERCAP, RaplDevice, find_domains
from observatory.devices.replay import ReplayDevice
from observatory.devices.visible import PciGpu, match_uuid, parse_bus_id, visible_gpus
from observatory.devices.words import GpuCode, gpu_words
from observatory.errors import DeviceError
from observatory.reasons import Reason
from observatory.run.files import one_line

_FORMS = "GPU-<uuid>, a PCI bus id, amd:<uuid>, rapl:<domain>, replay:<file> or none"


#: Any of them changes which AMD GPUs a program sees.
_AMD_VARIABLES = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalDevices:
    """GPUs that this process may use.

    Attributes:
        selectors: names for :func:`open_device`, in the order of the PCI bus ids.
        reason: why there are none, or fewer than the environment names; None when these are all.
    """

    selectors: tuple[str, ...] = ()
    reason: Reason | None = None


def open_device(selector: str) -> PowerDevice:
    """The device of this name, opened.

    Raises:
        DeviceError: there is no such device, the name fits several, or it cannot be opened.
    """
    kind, _, rest = selector.partition(":")
    if selector == "none":
        return NullDevice("no device was asked for (selector none)")
    if kind == "replay":
        return _open_recording(rest)
    if kind == "rapl":
        return RaplDevice(_domain_of(rest), root=POWERCAP)
    if kind == "amd":
        return AmdDevice(selector)
    if parse_bus_id(selector) is not None:
        return _open_by_bus_id(selector)
    if selector.upper().startswith("GPU-"):
        return NvmlDevice(_nvidia_uuid(selector))
    if selector.upper().startswith("MIG-"):
        raise DeviceError(
            f"{one_line(selector, 80)} is a MIG instance, and power is measured for whole GPUs only",
            remedy="name the GPU that it is part of, and read its power as that of all its instances",
        )
    if re.fullmatch(r"\d+", selector):
        raise DeviceError(
            f"{one_line(selector, 20)} is an ordinal, and CUDA, the driver and Slurm count differently",
            expected=f"{_FORMS}",
            remedy="see `observatory doctor`",
        )
    raise DeviceError(
        f"{one_line(selector, 80)!r} names no device",
        expected=f"{_FORMS}",
        remedy="`observatory doctor` lists them",
    )


def open_devices() -> list[PowerDevice]:
    """Every device of this machine that can be opened and reports something; the caller closes them.

    GPUs come first, then processors; the order does not depend on that of the drivers.
    """
    devices: list[PowerDevice] = []
    for selector in all_selectors():
        with contextlib.suppress(DeviceError):
            device = open_device(selector)
            if len(device.unavailable) < len(FIELDS):
                devices.append(device)
            else:
                device.close()
    return devices


def readable_devices(*, no_gpu: Reason | None) -> tuple[str, ...]:
    """Names of all devices that report something: what is sampled where a process has no GPU of its own.

    Args:
        no_gpu: why it has none.

    Raises:
        DeviceError: there are no such devices.
    """
    names: list[str] = []
    for device in open_devices():
        names.append(device.uuid)
        device.close()
    if not names:
        raise DeviceError(
            f"no device reports its power here{'' if no_gpu is None else f' ({gpu_words(no_gpu)})'}",
            remedy="see the reasons in `observatory doctor`, or name a device",
        )
    return tuple(names)


def all_selectors() -> list[str]:
    """Names of all devices that drivers and kernel list here, readable or not."""
    gpus, _ = nvidia_gpus()
    processors = [f"rapl:{domain.name}" for domain in find_domains(POWERCAP)]
    return [gpu.uuid for gpu in gpus] + list(_amd_gpus()[0]) + processors


def local_devices(environment: Mapping[str, str] = os.environ) -> LocalDevices:
    """GPUs that a program of this environment uses (``CUDA_VISIBLE_DEVICES``); none stays open."""
    gpus, no_nvidia = nvidia_gpus()
    if no_nvidia is None:
        visible = visible_gpus(environment, gpus)
        return LocalDevices(selectors=visible.uuids, reason=visible.reason)
    amd, no_amd = _amd_gpus()
    if no_amd is not None:
        return LocalDevices(reason=Reason(GpuCode.NO_GPU, because=(no_nvidia, no_amd)))
    hidden = next((name for name in _AMD_VARIABLES if name in environment), None)
    if hidden is None:
        return LocalDevices(selectors=tuple(amd))
    values = {"variable": f"{hidden}={one_line(environment[hidden], 80)}", "gpus": ", ".join(amd)}
    return LocalDevices(reason=Reason(GpuCode.AMD_ORDER, values))


def nvidia_gpus() -> tuple[list[PciGpu], Reason | None]:
    """NVIDIA GPUs in the order of their PCI bus ids, and why there are none; a lost one is left out."""
    try:
        nvml = load_nvml()
    except DeviceError as error:
        return [], Reason(GpuCode.NOT_READABLE, {"error": str(error)})
    try:
        listed = list_gpus(nvml)
    finally:
        close_nvml(nvml)
    gpus = [
        PciGpu(uuid=gpu.spec.uuid, bus_id=gpu.spec.bus_id, mig=bool(gpu.spec.mig))
        for gpu in listed
        if gpu.spec.uuid and gpu.code == SUCCESS
    ]
    if gpus:
        return sorted(gpus, key=lambda gpu: (parse_bus_id(gpu.bus_id or "") or (1 << 32,), gpu.uuid)), None
    if listed:
        return [], Reason(GpuCode.NONE_ANSWERS, {"gpus": len(listed)})
    return [], Reason(GpuCode.NONE_SHOWN)


def _amd_gpus() -> tuple[dict[str, str | None], Reason | None]:
    """Bus ids of AMD GPUs by UUID, sorted by both, and why there are none."""
    try:
        amdsmi = load_amdsmi()
    except DeviceError as error:
        return {}, Reason(GpuCode.NOT_READABLE, {"error": str(error)})
    try:
        places: dict[str, str | None] = {}
        for uuid, handle in list_amd(amdsmi).items():
            with contextlib.suppress(amdsmi.AmdSmiException):
                places[uuid] = amdsmi.amdsmi_get_gpu_device_bdf(handle)
            places.setdefault(uuid, None)
    except DeviceError as error:
        return {}, Reason(GpuCode.NOT_READABLE, {"error": str(error)})
    finally:
        amdsmi.amdsmi_shut_down()
    ordered = sorted(places, key=lambda uuid: (parse_bus_id(places[uuid] or "") or (1 << 32,), uuid))
    return {uuid: places[uuid] for uuid in ordered}, None if ordered else Reason(GpuCode.NO_AMD_GPU)


def _nvidia_uuid(start: str) -> str:
    gpus, why_not = nvidia_gpus()
    uuids = [gpu.uuid for gpu in gpus]
    matched = match_uuid(start, uuids)
    if len(matched) == 1:
        return matched[0]
    what = f"fits {len(matched)} GPUs" if matched else "is no GPU of this machine"
    raise DeviceError(
        f"{one_line(start, 80)} {what}", expected=f"one of {', '.join(uuids) or _none(why_not)}"
    )


def _none(why_not: Reason | None) -> str:
    return "none" if why_not is None else f"none: {gpu_words(why_not)}"


def _open_by_bus_id(selector: str) -> PowerDevice:
    place = parse_bus_id(selector)
    gpus, why_not = nvidia_gpus()
    for gpu in gpus:
        if parse_bus_id(gpu.bus_id or "") == place:
            return NvmlDevice(gpu.uuid)
    amd, _ = _amd_gpus()
    for uuid, bus_id in amd.items():
        if parse_bus_id(bus_id or "") == place:
            return AmdDevice(uuid)
    shown = ", ".join([gpu.bus_id or gpu.uuid for gpu in gpus] + [amd[uuid] or uuid for uuid in amd])
    raise DeviceError(f"there is no GPU at PCI {selector}", expected=f"one of {shown or _none(why_not)}")


def _open_recording(text: str) -> PowerDevice:
    path, mark, uuid = text.rpartition("#")
    if not mark or Path(text).exists():
        return ReplayDevice(text)
    return ReplayDevice(path, uuid)


def _domain_of(text: str) -> str:
    """Domain of ``DOMAIN`` or ``DOMAIN@HOST``, where the host must be this one."""
    name, mark, host = text.partition("@")
    if mark and host != one_line(socket.gethostname(), 200):
        raise DeviceError(
            f"rapl:{one_line(text, 80)} is a processor of another machine",
            expected=f"one of {socket.gethostname()}",
        )
    return name

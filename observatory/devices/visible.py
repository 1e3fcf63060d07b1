"""Which GPUs a CUDA program of this environment uses, determined without CUDA.

``CUDA_VISIBLE_DEVICES`` names GPUs by UUID, by the beginning of one, or by ordinal. An ordinal counts in
CUDA's order. With ``CUDA_DEVICE_ORDER=PCI_BUS_ID`` that is the order of the PCI bus ids; by default it is
fastest first, which only CUDA knows. Then a list of ordinals is understood only when it names all
GPUs there are. CUDA ends the list at the first entry that is no GPU, and uses none when one is named twice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from observatory.devices.words import GpuCode
from observatory.reasons import Reason
from observatory.run.files import one_line

_BUS_ID = re.compile(
    r"(?:([0-9a-f]{1,8}):)?([0-9a-f]{1,2}):([0-9a-f]{1,2})\.([0-7])", re.ASCII | re.IGNORECASE
)
_ORDINAL = re.compile(r"\d{1,9}", re.ASCII)
#: The variable with its value, for a reason.
Shown = dict[str, JsonValue]
_UUID_START = re.compile(r"GPU-[0-9a-f][0-9a-f-]{0,40}", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class PciGpu:
    """A GPU's two names, and whether it is partitioned (MIG)."""

    uuid: str
    bus_id: str | None
    mig: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class VisibleGpus:
    """GPUs that a process may use.

    Attributes:
        uuids: their UUIDs, in the order of the PCI bus ids.
        reason: why there are none, or not all that the environment names; None when these are all.
    """

    uuids: tuple[str, ...] = ()
    reason: Reason | None = None


def parse_bus_id(text: str) -> tuple[int, int, int, int] | None:
    """Domain, bus, device and function of ``[DOMAIN:]BUS:DEVICE.FUNCTION``; None for other texts."""
    match = _BUS_ID.fullmatch(text.strip())
    if match is None:
        return None
    return int(match[1] or "0", 16), int(match[2], 16), int(match[3], 16), int(match[4])


def match_uuid(start: str, uuids: Sequence[str]) -> list[str]:
    """UUIDs that begin so, upper and lower case alike; empty when ``start`` is no beginning of one."""
    if _UUID_START.fullmatch(start) is None:
        return []
    exact = [uuid for uuid in uuids if uuid.lower() == start.lower()]
    return exact or [uuid for uuid in uuids if uuid.lower().startswith(start.lower())]


def visible_gpus(environment: Mapping[str, str], gpus: Sequence[PciGpu]) -> VisibleGpus:
    """The GPUs among ``gpus`` that CUDA uses under this environment.

    A partitioned GPU is left out, for its power is that of all its instances.

    Args:
        environment: of the process.
        gpus: all that the driver shows, in any order.
    """
    visible = _visible(environment, sorted(gpus, key=_place))
    shared = [gpu.uuid for gpu in gpus if gpu.mig and gpu.uuid in visible.uuids]
    if not shared:
        return visible
    return VisibleGpus(
        uuids=tuple(uuid for uuid in visible.uuids if uuid not in shared),
        reason=Reason(GpuCode.PARTITIONED, {"gpu": shared[0]}),
    )


def _visible(environment: Mapping[str, str], ordered: Sequence[PciGpu]) -> VisibleGpus:
    wanted = environment.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return VisibleGpus(uuids=tuple(gpu.uuid for gpu in ordered))
    shown: Shown = {"variable": f"CUDA_VISIBLE_DEVICES={one_line(wanted, 80)}"}
    entries = [entry.strip() for entry in wanted.split(",")]
    if entries[0] == "":
        return VisibleGpus(reason=Reason(GpuCode.HIDDEN, shown))
    if any(entry.upper().startswith("MIG-") for entry in entries):
        return VisibleGpus(reason=Reason(GpuCode.INSTANCES_NAMED, shown))
    if all(_ORDINAL.fullmatch(entry) for entry in entries):
        return _by_ordinal([int(entry) for entry in entries], ordered, environment, shown)
    return _by_entry(entries, ordered, environment, shown)


def _place(gpu: PciGpu) -> tuple[tuple[int, ...], str]:
    place = parse_bus_id(gpu.bus_id or "")
    return place or (1 << 32,), gpu.uuid


def _by_ordinal(
    ordinals: Sequence[int], ordered: Sequence[PciGpu], environment: Mapping[str, str], shown: Shown
) -> VisibleGpus:
    if any(gpu.mig for gpu in ordered):
        return VisibleGpus(reason=Reason(GpuCode.INSTANCES_COUNTED, shown))
    valid: list[int] = []
    for ordinal in ordinals:
        if ordinal >= len(ordered):
            break  # CUDA ends the list here
        valid.append(ordinal)
    if len(set(valid)) != len(valid):
        return VisibleGpus(reason=Reason(GpuCode.NAMED_TWICE, shown))
    cut = None
    if len(valid) < len(ordinals):
        missing = {**shown, "ordinal": ordinals[len(valid)], "gpus": len(ordered)}
        cut = Reason(GpuCode.NO_SUCH_ORDINAL, missing)
    if len(valid) == len(ordered):  # all of them: their order does not matter
        return VisibleGpus(uuids=tuple(gpu.uuid for gpu in ordered), reason=cut)
    if not valid:
        return VisibleGpus(reason=cut)
    if environment.get("CUDA_DEVICE_ORDER", "").strip() != "PCI_BUS_ID":
        return VisibleGpus(reason=Reason(GpuCode.CUDA_ORDER, shown))
    if any(parse_bus_id(gpu.bus_id or "") is None for gpu in ordered):
        return VisibleGpus(reason=Reason(GpuCode.NO_BUS_IDS, shown))
    return VisibleGpus(uuids=tuple(ordered[ordinal].uuid for ordinal in sorted(valid)), reason=cut)


def _by_entry(
    entries: Sequence[str], ordered: Sequence[PciGpu], environment: Mapping[str, str], shown: Shown
) -> VisibleGpus:
    uuids: list[str] = []
    cut = None
    for entry in entries:
        matched = match_uuid(entry, [gpu.uuid for gpu in ordered])
        if not matched and _ORDINAL.fullmatch(entry):
            alone = _by_ordinal([int(entry)], ordered, environment, shown)
            if not alone.uuids and int(entry) < len(ordered):
                return alone
            matched = list(alone.uuids)
        if len(matched) != 1:
            named = {**shown, "entry": one_line(entry, 60), "gpus": len(matched)}
            cut = Reason(GpuCode.AMBIGUOUS if matched else GpuCode.NO_SUCH_GPU, named)
            break
        uuids.append(matched[0])
    if len(set(uuids)) != len(uuids):
        return VisibleGpus(reason=Reason(GpuCode.NAMED_TWICE, shown))
    places = {gpu.uuid: number for number, gpu in enumerate(ordered)}
    return VisibleGpus(uuids=tuple(sorted(uuids, key=places.__getitem__)), reason=cut)

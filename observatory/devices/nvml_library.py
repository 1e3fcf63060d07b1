"""The NVIDIA driver's management library (NVML), as far as more than one room needs it.

Every call's own return code is kept: :func:`ask` gives the answer and the code, and a failed call is never
turned into a number. Devices are named by UUID and PCI bus id; their index is used to list them only, for it
may differ from CUDA's and change at a reboot.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from observatory.devices.base import Closable
from observatory.errors import DeviceError, DeviceLostError
from observatory.run.files import one_line
from observatory.run.manifest import DeviceSpec

#: Return codes of NVML (``nvmlReturn_t``).
SUCCESS = 0
INVALID_ARGUMENT = 2
NOT_SUPPORTED = 3
NO_PERMISSION = 4
NO_LIBRARY = 12
NO_FUNCTION = 13
UNKNOWN = 999

#: Codes after which a device answers nothing more to this process: driver not loaded, GPU lost, reset
#: required, library and kernel driver of different versions, GPU not found.
GONE = frozenset({9, 15, 16, 18, 28})

_SM_CLOCK = 1
_MAX_DEVICES = 64

_TEXTS = {
    1: "not initialised", 2: "invalid argument", 3: "not supported", 4: "no permission", 6: "not found",
    7: "size too small", 9: "driver not loaded", 10: "timeout", 12: "library not found",
    13: "function not found", 15: "GPU is lost", 16: "reset required", 17: "blocked by the operating system",
    18: "library and kernel driver of different versions", 28: "GPU not found",
}  # fmt: skip

#: Code of a library that does not start -> why, and what to do.
_CANNOT_START: dict[int, tuple[str | None, str]] = {
    4: (
        "this user may not open /dev/nvidiactl",
        "ask the scheduler for a GPU, or the site for read and write permission on /dev/nvidia*",
    ),
    9: ("the NVIDIA kernel module is not loaded", "load it (`modprobe nvidia`), or use a node with GPUs"),
    12: (
        "libnvidia-ml.so.1 is missing",
        "install the NVIDIA driver, or start the container with its GPUs (`docker --gpus all`, "
        "`apptainer --nv`)",
    ),
    13: ("the driver is older than this nvidia-ml-py", "update the driver"),
    18: (
        "the driver was updated and the kernel still runs the old one",
        "reboot, or reload the nvidia modules",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU as the driver lists it.

    Attributes:
        spec: what a manifest keeps of it; its ``uuid`` is None when the driver does not report it.
        code: why it cannot be used, a return code; 0 when it can.
    """

    spec: DeviceSpec
    code: int = SUCCESS


def load_nvml() -> Any:
    """The initialised library (the ``pynvml`` module); match every call with :func:`close_nvml`.

    Raises:
        DeviceError: nvidia-ml-py is not installed, there is no driver, or this user may not talk to it.
    """
    try:
        import pynvml
    except ImportError as error:
        raise DeviceError(
            "NVIDIA devices cannot be read: nvidia-ml-py is not installed",
            remedy="`pip install nvidia-ml-py`",
        ) from error
    _, code = ask(pynvml, "nvmlInit")
    if code:
        why, remedy = _CANNOT_START.get(code, (None, "see the kernel log, and whether `nvidia-smi` works"))
        raise DeviceError(
            f"NVIDIA devices cannot be read (NVML {code}, {code_text(pynvml, code)})"
            + ("" if why is None else f": {why}"),
            remedy=remedy,
        )
    return pynvml


def close_nvml(nvml: Any) -> None:
    """Give back one :func:`load_nvml`; the library counts them."""
    ask(nvml, "nvmlShutdown")


def ask(nvml: Any, function: str, *arguments: Any) -> tuple[Any, int]:
    """Call a function of NVML.

    Returns:
        Its answer and the return code; the answer is None unless the code is 0. A function that this
        nvidia-ml-py does not have counts like one that the driver does not have.
    """
    entry = getattr(nvml, function, None)
    if entry is None:
        return None, NO_FUNCTION
    try:
        return entry(*arguments), SUCCESS
    except Exception as error:  # NVMLError, or an answer that the binding cannot decode
        if isinstance(error, getattr(nvml, "NVMLLibraryMismatchError", ())):
            return None, NO_FUNCTION  # how the binding says it for functions of several versions
        code = getattr(error, "value", None)
        return None, code if isinstance(code, int) and code != SUCCESS else UNKNOWN


def code_text(nvml: Any, code: int) -> str:
    """A return code in words."""
    if code in _TEXTS:
        return _TEXTS[code]
    return one_line(ask(nvml, "nvmlErrorString", code)[0] or "unknown error", 80)


def list_gpus(nvml: Any) -> list[Gpu]:
    """GPUs that the driver shows to this process, in its own order; at most 64."""
    driver = _text(ask(nvml, "nvmlSystemGetDriverVersion")[0])
    count = _whole(ask(nvml, "nvmlDeviceGetCount")[0]) or 0
    gpus: list[Gpu] = []
    for index in range(min(count, _MAX_DEVICES)):
        handle, code = ask(nvml, "nvmlDeviceGetHandleByIndex", index)
        if code:
            gpus.append(Gpu(spec=DeviceSpec(kind="nvidia", driver=driver), code=code))
        else:
            gpus.append(describe_gpu(nvml, handle, driver=driver))
    return gpus


def describe_gpu(nvml: Any, handle: Any, *, driver: str | None = None) -> Gpu:
    """What the driver reports of a GPU apart from its readings; every part None that it refuses."""
    uuid, code = ask(nvml, "nvmlDeviceGetUUID", handle)
    pci, _ = ask(nvml, "nvmlDeviceGetPciInfo", handle)
    mig, mig_code = ask(nvml, "nvmlDeviceGetMigMode", handle)
    limits, limits_code = ask(nvml, "nvmlDeviceGetPowerManagementLimitConstraints", handle)
    spec = DeviceSpec(
        kind="nvidia",
        name=_text(ask(nvml, "nvmlDeviceGetName", handle)[0]),
        uuid=_text(uuid),
        driver=driver or _text(ask(nvml, "nvmlSystemGetDriverVersion")[0]),
        enforced_limit_mw=_whole(ask(nvml, "nvmlDeviceGetEnforcedPowerLimit", handle)[0]),
        default_limit_mw=_whole(ask(nvml, "nvmlDeviceGetPowerManagementDefaultLimit", handle)[0]),
        min_limit_mw=None if limits_code else _whole(limits[0]),
        max_limit_mw=None if limits_code else _whole(limits[1]),
        max_sm_clock_mhz=_whole(ask(nvml, "nvmlDeviceGetMaxClockInfo", handle, _SM_CLOCK)[0]),
        bus_id=_text(getattr(pci, "busId", None)),
        mig=None if mig_code else bool(mig[0]),
    )
    return Gpu(spec=spec, code=code if code in GONE else SUCCESS)


class NvmlGpu(Closable):
    """One GPU, opened.

    Args:
        uuid: as the driver reports it, ``GPU-...``, in full.

    Attributes:
        nvml: the library.
        handle: of the GPU, for the library's functions.
        spec: the GPU; ``uuid`` is never None.
        name: for messages.

    Raises:
        DeviceError: there is no driver, or no GPU of this name.
        DeviceLostError: the GPU is there and does not answer.
    """

    def __init__(self, uuid: str) -> None:
        self.name = uuid
        self.nvml = load_nvml()
        try:
            self.handle, code = ask(self.nvml, "nvmlDeviceGetHandleByUUID", uuid)
            if self.checked(code):
                raise DeviceError(
                    f"GPU {uuid} cannot be opened ({self.code_text(code)})",
                    expected="the UUID of a GPU of this machine",
                    remedy="`observatory doctor` lists them",
                )
            gpu = describe_gpu(self.nvml, self.handle)
            self.checked(gpu.code)
        except BaseException:
            self.close()
            raise
        self.spec = gpu.spec.model_copy(update={"uuid": gpu.spec.uuid or uuid})
        self.name = f"{gpu.spec.name or 'GPU'} ({self.spec.uuid})"

    def ask(self, function: str, *arguments: Any) -> tuple[Any, int]:
        """Call a function of this GPU; see :func:`ask`.

        Raises:
            DeviceLostError: the GPU does not answer any more.
            DeviceError: it was closed.
        """
        if not self._open:
            raise DeviceError(f"{self.name} was closed and cannot be asked", remedy="open it again")
        answer, code = ask(self.nvml, function, self.handle, *arguments)
        return answer, self.checked(code)

    def checked(self, code: int) -> int:
        """A return code of this GPU.

        Raises:
            DeviceLostError: it says that the GPU does not answer any more.
        """
        if code in GONE:
            raise DeviceLostError(
                f"{self.name} does not answer any more ({self.code_text(code)})",
                remedy="look for Xid lines in the kernel log: it takes a reset of the GPU or a reboot to get "
                "it back, which also undoes locks",
            )
        return code

    def code_text(self, code: int) -> str:
        """A return code as a number and in words."""
        return f"NVML {code}, {code_text(self.nvml, code)}"

    def _release(self) -> None:
        close_nvml(self.nvml)


def _text(value: Any) -> str | None:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return (one_line(value, 255) or None) if isinstance(value, str) else None


def _whole(value: Any) -> int | None:
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        return int(value) if value is not None and 0 <= int(value) <= 1 << 62 else None
    return None

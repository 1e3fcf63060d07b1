"""A fake NVIDIA driver for tests: ``fake_nvml.c``, built once and driven through its own entry points.

    driver = FakeDriver(folder / "state")
    driver.set(busy=1, limit_w=400)
    subprocess.run([...], env=driver.environment())   # the real pynvml finds it there

The state file binds the process that first touches it: a test that needs a driver of its own runs its part
in a process of its own. Every process that finds the library in its environment sees the same devices. A
device has the settings listed at the top of ``fake_nvml.c``; while ``busy`` is 1 it runs iterations of a
workload, whose exact number and energy ``get("iterations")`` and ``get("energy_j")`` tell.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_SOURCE = Path(__file__).with_name("fake_nvml.c")
#: Names the folder of the library to processes that use the driver of their parent.
_BUILT = "FAKE_NVML_FOLDER"


def why_not() -> str | None:
    """Why the driver cannot be built here; None when it can."""
    return None if shutil.which("cc") else "no C compiler (cc) to build the fake driver with"


@functools.cache
def library_folder() -> Path:
    """Folder that holds ``libnvidia-ml.so.1``, built at the first call unless a parent has built it."""
    built = os.environ.get(_BUILT)
    if built:
        return Path(built)
    folder = Path(tempfile.mkdtemp(prefix="observatory-fake-nvml-"))
    atexit.register(_remove, folder, os.getpid())
    subprocess.run(
        ["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-Wl,-soname,libnvidia-ml.so.1",
         "-o", str(folder / "libnvidia-ml.so.1"), str(_SOURCE), "-lm", "-lpthread"],
        check=True, capture_output=True, timeout=400,
    )  # fmt: skip
    return folder


def _remove(folder: Path, builder: int) -> None:
    """Not by a fork of the process that built it."""
    if os.getpid() == builder:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One call that changed, or tried to change, a device.

    Attributes:
        time_ns: monotonic time.
        pid: the process that called.
        what: ``lock``, ``unlock`` or ``limit``.
        uuid: the device.
        values: the two arguments; 0 where there are fewer.
        code: what the driver returned.
    """

    time_ns: int
    pid: int
    what: str
    uuid: str
    values: tuple[int, int]
    code: int


class FakeDriver:
    """The devices of one state file. ``index`` counts devices from 0."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self._library: ctypes.CDLL | None = None

    def environment(self, inherited: Mapping[str, str] = os.environ) -> dict[str, str]:
        """Environment of a process that is to find this driver."""
        paths = [str(library_folder()), *filter(None, [inherited.get("LD_LIBRARY_PATH")])]
        return {
            **inherited, "LD_LIBRARY_PATH": ":".join(paths), "FAKE_NVML_STATE": str(self.state),
            _BUILT: str(library_folder()),
        }  # fmt: skip

    def load(self) -> ctypes.CDLL:
        """The library in this process, where pynvml then finds it too. One state file per process."""
        if self._library is None:
            known = os.environ.setdefault("FAKE_NVML_STATE", str(self.state))
            assert known == str(self.state), "this process already plays another driver"
            library = ctypes.CDLL(str(library_folder() / "libnvidia-ml.so.1"), mode=ctypes.RTLD_GLOBAL)
            library.fake_get.restype = ctypes.c_double
            library.fake_set.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_double]
            self._library = library
        return self._library

    def devices(self, count: int) -> None:
        """How many devices there are, at most 8; 1 at first."""
        self.load().fake_devices(count)

    def set(self, index: int = 0, **settings: float) -> None:
        """Change settings of a device from this moment on."""
        for name, value in settings.items():
            self.load().fake_set(index, name.encode(), value)

    def get(self, name: str, index: int = 0) -> float:
        """A setting, or ``energy_j``, ``iterations``, ``time_ns``, ``mhz``, ``watts``, ``temperature_c``,
        ``iteration_s``, ``lock_min``, ``lock_max`` as they are now.
        """
        return float(self.load().fake_get(index, name.encode()))

    def name(self, uuid: str, bus_id: str, name: str, index: int = 0) -> None:
        """Give a device other names."""
        self.load().fake_name(index, uuid.encode(), bus_id.encode(), name.encode())

    def fail(self, what: str, code: int, index: int = 0) -> None:
        """Let a function, or a field (``field:186``), return this code; 0 takes it back.

        The functions are those of the driver: ``nvmlDeviceGetHandleByIndex_v2``, and ``find`` for the two
        that look a device up by name.
        """
        self.load().fake_fault(index, what.encode(), code)

    def processes(self, pids: Sequence[int], index: int = 0) -> None:
        """Processes that use the device."""
        self.load().fake_processes(index, (ctypes.c_uint32 * len(pids))(*pids), len(pids))

    def changes(self) -> list[Change]:
        """All calls so far that changed or tried to change a device, in order."""
        log = Path(f"{self.state}.log")
        if not log.exists():
            return []
        found = []
        for line in log.read_text().splitlines():
            time_ns, pid, what, uuid, first, second, code = line.split()
            found.append(
                Change(
                    time_ns=int(time_ns), pid=int(pid), what=what, uuid=uuid,
                    values=(int(first), int(second)), code=int(code),
                )
            )  # fmt: skip
        return found

"""Clocks and power limit of one NVIDIA GPU, as far as the driver does them.

Nothing here is tried to find out whether it is allowed: every setter does what its caller has decided to do.
Who may decide it, for how long, and who undoes it when its owner dies is the business of the lease and the
watchdog. A lock cannot be read back and outlives the process that set it: use :class:`ClockControl` through
them.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable

from pydantic import JsonValue

from observatory.devices.base import Closable
from observatory.devices.nvml_library import NO_FUNCTION, NO_PERMISSION, NOT_SUPPORTED, SUCCESS, NvmlGpu
from observatory.errors import ClockError, LockNotPermittedError, LockRefusedError
from observatory.host.processes import descends_from
from observatory.locks.commands import limit_ways, lock_ways, unlock_ways
from observatory.locks.words import LockCode, refusal_remedy, refusal_words
from observatory.reasons import Reason

_PERMISSIONS = "docs/power.md#permissions"


class ClockControl(Closable):
    """The driver's setters for one GPU; also a context manager that closes it. Closing undoes nothing.

    Args:
        uuid: of the GPU, in full.
        owner_pid: the process whose descendants, with itself, may use the GPU; this one by default.

    Raises:
        DeviceError: there is no driver, or no such GPU.
        DeviceLostError: the GPU does not answer.
        LockRefusedError: it is no NVIDIA GPU.
    """

    def __init__(self, uuid: str, *, owner_pid: int | None = None) -> None:
        if not uuid.startswith("GPU-"):
            raise LockRefusedError(
                f"clocks of {uuid} cannot be locked: only NVIDIA GPUs are supported here",
                remedy="name one by its UUID, GPU-...",
            )
        self._owner_pid = os.getpid() if owner_pid is None else owner_pid
        #: Called just before each change of the device; where it raises nothing is changed.
        self.before_change: Callable[[], None] | None = None
        self.uuid = uuid
        self._gpu = NvmlGpu(uuid)

    @property
    def name(self) -> str:
        """The GPU, for messages."""
        return self._gpu.name

    @functools.cached_property
    def supported_sm_clocks_mhz(self) -> tuple[int, ...]:
        """SM clocks that the driver lists for the highest memory clock, ascending.

        Raises:
            ClockError: it lists none.
        """
        memory, code = self._gpu.ask("nvmlDeviceGetSupportedMemoryClocks")
        clocks: list[int] = []
        if memory:
            listed, code = self._gpu.ask("nvmlDeviceGetSupportedGraphicsClocks", max(memory))
            clocks = listed or []
        if not clocks:
            raise ClockError(
                f"the driver lists no SM clocks of {self.name} ({self._gpu.code_text(code)})",
                expected="at least one",
                remedy="sweep another GPU",
            )
        return tuple(sorted(set(clocks)))

    def snap(self, sm_clock_mhz: int) -> int:
        """The supported clock nearest to this one; of two equally near ones the lower.

        Raises:
            ClockError: it lies more than a step outside the supported range.
        """
        clocks = self.supported_sm_clocks_mhz
        step = max((b - a for a, b in itertools.pairwise(clocks)), default=0)
        if not clocks[0] - step <= sm_clock_mhz <= clocks[-1] + step:
            raise ClockError(
                f"{sm_clock_mhz} MHz is no SM clock of {self.name}",
                expected=f"{clocks[0]} to {clocks[-1]} MHz",
            )
        return min(clocks, key=lambda clock: (abs(clock - sm_clock_mhz), clock))

    def refusal(self) -> Reason | None:
        """Why clocks and limits of this GPU are not ours to set, whatever the driver says; None if they are.

        It is partitioned (MIG), or processes use it that are neither the owner nor its descendants, or the
        driver does not report which use it. Reads only. Permission is not tried: None does not mean that the
        driver will agree.

        Raises:
            DeviceLostError: the GPU does not answer.
        """
        mode, code = self._gpu.ask("nvmlDeviceGetMigMode")
        if not code and any(mode):
            return Reason(LockCode.PARTITIONED, {"gpu": self.name})
        if code not in (SUCCESS, NOT_SUPPORTED, NO_FUNCTION):
            return Reason(
                LockCode.PARTITIONS_UNKNOWN, {"gpu": self.name, "answer": self._gpu.code_text(code)}
            )
        pids, code = self._users()
        if code:
            return Reason(LockCode.USERS_UNKNOWN, {"gpu": self.name, "answer": self._gpu.code_text(code)})
        others: list[JsonValue] = [pid for pid in sorted(pids) if not descends_from(pid, self._owner_pid)]
        if not others:
            return None
        return Reason(LockCode.SHARED, {"gpu": self.name, "owner_pid": self._owner_pid, "pids": others})

    def lock_sm_clock(self, sm_clock_mhz: int) -> int:
        """Lock the SM clock to the nearest supported one.

        Returns:
            The clock that was locked. The driver may hold another: sample it under load.

        Raises:
            LockNotPermittedError: the driver wants a privilege.
            LockRefusedError: see :meth:`refusal`; or the driver does not support it.
            ClockError: no such clock, or the driver failed otherwise.
            DeviceLostError: the GPU does not answer.
        """
        locked_mhz = self.snap(sm_clock_mhz)
        self._refuse(f"locking the SM clock to {locked_mhz} MHz")
        self._set(
            f"locking {self.name} to {locked_mhz} MHz",
            lock_ways(self.uuid, locked_mhz),
            "nvmlDeviceSetGpuLockedClocks",
            locked_mhz,
            locked_mhz,
        )
        return locked_mhz

    def unlock(self) -> None:
        """Take every lock of the SM clock away, whoever set it: the driver does not know whose it is.

        Raises:
            LockRefusedError: the driver does not permit or support it.
            ClockError: the driver failed otherwise.
            DeviceLostError: the GPU does not answer.
        """
        self._set(f"unlocking {self.name}", unlock_ways(self.uuid), "nvmlDeviceResetGpuLockedClocks")

    @property
    def limit_range_mw(self) -> tuple[int, int] | None:
        """Least and most power limit; None when the driver does not report it."""
        limits, code = self._gpu.ask("nvmlDeviceGetPowerManagementLimitConstraints")
        return None if code else (int(limits[0]), int(limits[1]))

    @property
    def power_limit_mw(self) -> int | None:
        """The power limit that is set; None when the driver does not report it."""
        return self._whole("nvmlDeviceGetPowerManagementLimit")

    @property
    def default_limit_mw(self) -> int | None:
        """The power limit after a driver reload; None when the driver does not report it."""
        return self._whole("nvmlDeviceGetPowerManagementDefaultLimit")

    def set_power_limit_mw(self, limit_mw: int) -> int:
        """Set the power limit and read it back. Unlike a lock it can be restored, but nothing restores it.

        Returns:
            The limit that the driver holds afterwards.

        Raises:
            LockRefusedError: see :meth:`refusal`; or the driver does not permit or support it.
            ClockError: out of range, or the driver holds another limit than the one it accepted.
            DeviceLostError: the GPU does not answer.
        """
        limits = self.limit_range_mw
        if limits is not None and not limits[0] <= limit_mw <= limits[1]:
            raise ClockError(
                f"{limit_mw} mW is no power limit of {self.name}", expected=f"{limits[0]} to {limits[1]} mW"
            )
        self._refuse(f"setting a power limit of {limit_mw} mW")
        self._set(
            f"limiting {self.name} to {limit_mw} mW",
            limit_ways(self.uuid, limit_mw),
            "nvmlDeviceSetPowerManagementLimit",
            limit_mw,
        )
        held_mw = self.power_limit_mw
        if held_mw is None or abs(held_mw - limit_mw) > 1000:
            raise ClockError(
                f"{self.name} accepted a power limit of {limit_mw} mW and holds {held_mw} mW",
                expected="the one asked for",
                remedy="look for another program that sets limits",
            )
        return held_mw

    def restore_power_limit_mw(self, limit_mw: int) -> None:
        """Put back a limit that was in force before; not refused where others use the GPU by now.

        Raises:
            LockRefusedError: the driver does not permit or support it.
            ClockError: the driver failed otherwise.
            DeviceLostError: the GPU does not answer.
        """
        self._set(
            f"limiting {self.name} to {limit_mw} mW",
            limit_ways(self.uuid, limit_mw),
            "nvmlDeviceSetPowerManagementLimit",
            limit_mw,
        )

    def _release(self) -> None:
        self._gpu.close()

    def _whole(self, function: str) -> int | None:
        value, code = self._gpu.ask(function)
        return None if code else int(value)

    def _users(self) -> tuple[set[int], int]:
        """Processes that use the GPU; with a code when the driver does not report them."""
        pids: set[int] = set()
        for kind, optional in (("Compute", False), ("Graphics", True)):
            for version in ("v3", "v2"):
                function = f"nvmlDeviceGet{kind}RunningProcesses_{version}"
                processes, code = self._gpu.ask(function)
                if code != NO_FUNCTION:
                    break
            if code and not (optional and code in (NOT_SUPPORTED, NO_FUNCTION)):
                return pids, code
            pids |= {int(process.pid) for process in processes or ()}
        return pids, SUCCESS

    def _refuse(self, what: str) -> None:
        refusal = self.refusal()
        if refusal is not None:
            raise LockRefusedError(
                f"{what} is refused: {refusal_words(refusal)}", remedy=refusal_remedy(refusal)
            )

    def _set(self, what: str, commands: list[str], function: str, *arguments: int) -> None:
        """Call a setter; the error of a refusal names other ways to get it done."""
        if self.before_change is not None:
            self.before_change()
        _, code = self._gpu.ask(function, *arguments)
        if code == NO_PERMISSION:
            ways = "  ".join(f"{number}) {command}" for number, command in enumerate(commands, start=1))
            raise LockNotPermittedError(
                f"{what} is not permitted ({self._gpu.code_text(code)}): it needs root or CAP_SYS_ADMIN",
                remedy=f"have it done in another way ({_PERMISSIONS}): {ways}",
            )
        if code in (NOT_SUPPORTED, NO_FUNCTION):
            raise LockRefusedError(
                f"{what} is not supported ({self._gpu.code_text(code)})",
                expected="a GPU of the Volta generation or later and a driver that knows it",
                remedy="sweep another GPU",
            )
        if code:
            raise ClockError(
                f"{what} failed ({self._gpu.code_text(code)})", remedy=f"see whether `{commands[0]}` works"
            )

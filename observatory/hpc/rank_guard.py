"""How a rank of our commands ends when a signal comes, or when its launcher is gone.

A launcher that is killed can end no rank, and a signal does not reach Python code while the main thread waits
in C code (an exchange, a device). So a thread of each rank waits for both:

    launcher gone, or a signal -> the shard states it, what is known is flushed -> the main thread is
    interrupted -> it ends in order, or, after a grace, the thread closes the shard and ends the process

Only ranks that a launcher has started are guarded, and only in commands of the observatory: ``watch`` in a
program of the user ends nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from observatory.errors import CaptureError
from observatory.host.ranks import find_rank

if TYPE_CHECKING:
    from observatory.host.processes import ProcessId

_POLL_S = 0.2
#: How long the main thread has to notice the signal, and to end in order once it has.
_NOTICE_S, _IN_ORDER_S = 3.0, 12.0
#: How long stating that the rank ends may take: the main thread may hold what it needs.
_MARK_S = 2.0
#: When the rank ends at the latest, written or not: a second before its launcher kills it.
_END_S = 14.0
#: A parent is not yet gone when its children get their signal.
_SETTLE_S = 0.05
_SIGNAL_AT_PARENTS_DEATH = 1  # PR_SET_PDEATHSIG of prctl(2)
_INTERRUPTED = 130
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
#: What launchers put into the environment of the ranks that they start.
_MARKS = {
    "torchrun": ("TORCHELASTIC_RUN_ID",),
    "mpiexec": ("OMPI_COMM_WORLD_RANK", "PMI_RANK"),
    "srun": ("SLURM_PROCID",),
}


class Shard(Protocol):
    """What a rank writes. Both are called by a thread of the guard while the main thread may hang."""

    def mark(self, reason: str) -> None:
        """State that the rank is about to end, and flush what is known; the shard stays open."""

    def close(self, reason: str) -> None:
        """Flush what is known and close the shard as failed."""


#: Shards that this process has open.
SHARDS: list[Shard] = []

_noticed = threading.Event()
_decided = threading.Event()
#: Why this rank is about to end; empty when it is not.
_reasons: list[str] = []


def ending() -> str | None:
    """Why this rank is about to end; None when it is not."""
    if _noticed.is_set():
        _decided.wait(1.0)
    return _reasons[0] if _reasons else None


def find_launcher(environment: Mapping[str, str] = os.environ) -> ProcessId | None:
    """The process that started this rank: the next one above it that is no rank, which a script may be.

    None where no launcher has started it, also when a user has set ``RANK`` and ``WORLD_SIZE``.
    """
    try:
        launcher = find_rank(environment=environment).launcher
    except CaptureError:
        return None
    name = next((name for name in _MARKS.get(launcher, ()) if name in environment), None)
    if name is None:
        return None
    from observatory.host.processes import ProcessId, ProcessStat  # pydantic: only ranks wait for it

    mark = f"{name}={environment[name]}".encode()
    pid = os.getppid()
    while pid > 1:
        try:
            is_rank = mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:  # of another user: a daemon of the launcher
            is_rank = False
        if not is_rank:
            return ProcessId.of(pid)
        stat = ProcessStat.of(pid)
        pid = 0 if stat is None else stat.parent
    return None


def guard_rank() -> None:
    """Guard this process if a launcher has started it; called once, by the main thread."""
    launcher = find_launcher()
    if launcher is None:
        return
    wake_up, wake_up_end = os.pipe()
    os.set_blocking(wake_up_end, False)
    signal.set_wakeup_fd(wake_up_end, warn_on_full_buffer=False)
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, _interrupt)
    if sys.platform == "linux" and launcher.pid == os.getppid():
        ctypes.CDLL(None).prctl(
            _SIGNAL_AT_PARENTS_DEATH, signal.SIGCONT
        )  # a stopped rank is continued so that it ends
    threading.Thread(target=_guard, args=(launcher, wake_up), name="observatory-guard", daemon=True).start()


def end_rank(code: int) -> None:
    """End a rank that was interrupted, at once: libraries that wait for other ranks would hang at exit."""
    if ending() is not None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def _interrupt(*_: object) -> None:
    """End as after Ctrl-C; a second signal does not disturb what is still written."""
    if not _noticed.is_set():
        _noticed.set()
        raise KeyboardInterrupt


def _guard(launcher: ProcessId, wake_up: int) -> None:
    reason = _await_reason(launcher, wake_up)
    _reasons.append(reason)
    _decided.set()
    since = time.monotonic()
    _write("mark", reason, _MARK_S)
    main = threading.main_thread().ident
    if not _noticed.is_set() and main is not None:
        signal.pthread_kill(main, signal.SIGTERM)
    while time.monotonic() < since + (_IN_ORDER_S if _noticed.is_set() else _NOTICE_S):
        time.sleep(_POLL_S)
    _write("close", reason, since + _END_S - time.monotonic())
    with contextlib.suppress(OSError):
        os.write(2, f"observatory: this rank was ended: {reason}\n".encode())
    os._exit(_INTERRUPTED)


def _await_reason(launcher: ProcessId, wake_up: int) -> str:
    """Wait until this rank has to end; why."""
    waiting = [wake_up]
    if launcher.alive is not None:
        with contextlib.suppress(AttributeError, OSError):  # without it, the next look finds out
            waiting.append(os.pidfd_open(launcher.pid))
    while True:
        ready, _, _ = select.select(waiting, [], [], _POLL_S)
        signals = (
            [number for number in os.read(wake_up, 64) if number in _SIGNALS] if wake_up in ready else []
        )
        if signals:
            time.sleep(_SETTLE_S)
        if launcher.alive is False:  # None: not known
            return f"its launcher, process {launcher.pid}, is gone"
        if signals:
            return f"interrupted by {signal.Signals(signals[0]).name}"


def _write(what: Literal["mark", "close"], reason: str, limit_s: float) -> None:
    """Mark or close all shards, for a limited time."""

    def act() -> None:
        for shard in tuple(SHARDS):
            with contextlib.suppress(Exception):  # each for itself; the process ends in any case
                (shard.mark if what == "mark" else shard.close)(reason)

    thread = threading.Thread(target=act, name="observatory-guard-writes", daemon=True)
    thread.start()
    thread.join(limit_s)

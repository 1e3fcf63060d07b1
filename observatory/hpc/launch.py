"""Starting ranks on this machine, and ending them all when one fails.

The ranks find torchrun's variables in their environment, so that a program needs only one convention.
This process keeps their rendezvous, on the loopback interface: it outlives any rank, so that the remaining
ones can determine which rank is missing. Processes are ended one by one, by their id.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from observatory.errors import ExchangeError
from observatory.host.children import python_code
from observatory.host.ranks import LOCAL_RUN

_POLL_S = 0.05
_END_S = 5.0
_TAIL_BYTES = 4096
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
#: How long ranks have to end by themselves when this process was killed.
_ORPHANED_S = 15.0

#: Kills the processes whose numbers it was given, one a line, if they run so long after its input was closed.
_KEEPER = """
import os, signal, sys, time
def started(pid):
    try:
        with open(f"/proc/{pid}/stat", errors="replace") as file:
            state, *rest = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else rest[18]
ranks = [(int(line), started(int(line))) for line in iter(sys.stdin.readline, "")]
deadline = time.monotonic() + float(sys.argv[1])
def running():
    return [pid for pid, start in ranks if start is not None and started(pid) == start]
while running() and time.monotonic() < deadline:
    time.sleep(0.1)
for pid in running():
    os.kill(pid, signal.SIGKILL)
"""


@dataclass(slots=True)
class _Rank:
    """A started process."""

    rank: int
    process: subprocess.Popen[bytes]
    log: Path | None

    def last_words(self) -> str:
        """The last line that the rank wrote; empty when it wrote nothing."""
        if self.log is None:
            return "its message is above"
        with self.log.open("rb") as handle:
            handle.seek(max(0, self.log.stat().st_size - _TAIL_BYTES))
            lines = [line.strip() for line in handle.read().decode(errors="replace").splitlines()]
        written = [line for line in lines if line]
        return written[-1][:500] if written else ""


def rank_environment(rank: int, world: int, *, port: int, run_id: str) -> dict[str, str]:
    """The variables of one local rank, as torchrun would set them."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": run_id,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def start_local_ranks(
    argv: Sequence[str],
    world: int,
    *,
    timeout_s: float | None = None,
    grace_s: float = 15.0,
    environment: Mapping[str, str] = os.environ,
    started: Callable[[Sequence[int]], None] | None = None,
) -> None:
    """Run a program on P local ranks and wait for all of them.

    Rank 0 writes to this process's output; what the others write is kept until all is well, and the last
    line of the one that failed first is part of the error.

    Args:
        argv: the program and its arguments, the same for all ranks.
        world: number of ranks, P.
        timeout_s: the longest the whole may take; None for as long as it takes.
        grace_s: how long the other ranks have to end by themselves after one has failed.
        environment: what the ranks inherit.
        started: called with the process ids by rank, once all are started.

    Raises:
        ExchangeError: a rank failed, was killed, or the time was up; names the rank.
        KeyboardInterrupt: as it came; the ranks were interrupted too, and had ``grace_s`` to end.
    """
    if world < 1:
        raise ExchangeError(f"{world} ranks cannot be started", expected="1 or more")
    with tempfile.TemporaryDirectory(prefix="observatory-ranks-") as folder, meeting_point() as port:
        ranks: list[_Rank] = []
        keeper = _start_keeper()
        assert keeper.stdin is not None
        try:
            run_id = f"{LOCAL_RUN}{uuid.uuid4().hex[:8]}"
            for rank in range(world):
                variables = {**environment, **rank_environment(rank, world, port=port, run_id=run_id)}
                ranks += [_start(argv, rank, variables, Path(folder))]
                keeper.stdin.write(f"{ranks[-1].process.pid}\n".encode())
                keeper.stdin.flush()
            if started is not None:
                started([rank.process.pid for rank in ranks])
            try:
                failed = _await(ranks, timeout_s)
            except KeyboardInterrupt:
                # They get one signal, from here: a second one would interrupt what they still write.
                for running in ranks:
                    running.process.send_signal(signal.SIGINT)
                    running.process.send_signal(signal.SIGCONT)  # also to one that is stopped
                _await_all(ranks, grace_s)
                raise
            if failed is not None:
                _await_all(ranks, grace_s)
                raise ExchangeError(_failure_words(failed, ranks, world))
            late = [rank.rank for rank in ranks if rank.process.poll() is None]
            if late:
                raise ExchangeError(
                    f"{_ranks(late)} of {world} did not end within {timeout_s:g} s and was ended",
                    remedy="see where it waits, or allow more time",
                )
        finally:
            _end(ranks)
            keeper.communicate()


@contextlib.contextmanager
def meeting_point() -> Iterator[int]:
    """Keep the store where ranks sign in, on the loopback interface; its port."""
    from torch._C._distributed_c10d import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield store.port
    del store


def _start_keeper() -> subprocess.Popen[bytes]:
    """Start the process that ends the ranks when this one was killed and they do not notice."""
    return subprocess.Popen(
        python_code(_KEEPER, str(_ORPHANED_S)),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # whoever kills our process group does not mean it
    )


def _start(argv: Sequence[str], rank: int, environment: dict[str, str], folder: Path) -> _Rank:
    world = int(environment["WORLD_SIZE"])
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world)))
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if loopback:
        environment.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
    log = None if rank == 0 else folder / f"rank-{rank}.log"
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
    launcher = os.getpid()

    def die_with_parent() -> None:
        if prctl is not None:
            prctl(_DIE_WITH_PARENT, signal.SIGTERM)
            if os.getppid() != launcher:  # it died before that
                os._exit(1)

    with contextlib.ExitStack() as stack:
        output = None if log is None else stack.enter_context(log.open("wb"))
        process = subprocess.Popen(
            list(argv),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            process_group=0,  # Ctrl-C reaches them through this process
            preexec_fn=die_with_parent,  # noqa: PLW1509 - no Python thread runs at this point
        )
    return _Rank(rank, process, log)


def _await(ranks: Sequence[_Rank], timeout_s: float | None) -> _Rank | None:
    """The rank that failed first; None when all ended well or the time is up."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        codes = [rank.process.poll() for rank in ranks]
        failed = [rank for rank, code in zip(ranks, codes, strict=True) if code]
        if failed:
            # One that was killed could not say so: it is the cause, those with messages the effect.
            return min(failed, key=lambda rank: (rank.process.returncode > 0, rank.rank))
        if None not in codes or (deadline is not None and time.monotonic() > deadline):
            return None
        time.sleep(_POLL_S)


def _await_all(ranks: Sequence[_Rank], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline and any(rank.process.poll() is None for rank in ranks):
        time.sleep(_POLL_S)


def _end(ranks: Sequence[_Rank]) -> None:
    """End what still runs: asked first, then killed."""
    for rank in ranks:
        if rank.process.poll() is None:
            rank.process.terminate()
            rank.process.send_signal(signal.SIGCONT)
    _await_all(ranks, _END_S)
    for rank in ranks:
        if rank.process.poll() is None:
            rank.process.kill()
        rank.process.wait()


def _failure_words(failed: _Rank, ranks: Sequence[_Rank], world: int) -> str:
    if failed.process.returncode > 0 and not failed.last_words():
        # An error that all ranks have in common is printed by one of them.
        failed = next(
            (rank for rank in ranks if (rank.process.poll() or 0) > 0 and rank.last_words()), failed
        )
    code = failed.process.returncode
    if code < 0:
        what = f"was killed by signal {-code} ({signal.Signals(-code).name})"
    else:
        what = f"failed with exit code {code}: {failed.last_words() or 'it wrote nothing'}"
    running = [rank.rank for rank in ranks if rank.process.poll() is None]
    others = [rank.rank for rank in ranks if rank is not failed and rank.process.poll()]
    rest = [f"{_ranks(others)} ended with errors after it"] if others else []
    rest += [f"{_ranks(running)} did not end and was killed"] if running else []
    return f"rank {failed.rank} of {world} {what}" + "".join(f"; {text}" for text in rest)


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(str(rank) for rank in ranks)}"

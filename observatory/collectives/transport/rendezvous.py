"""How ranks of torch.distributed find each other, and who is missing when they do not.

A key-value store is kept at ``MASTER_ADDR:MASTER_PORT`` by the launcher (torchrun,
``observatory.hpc.launch``) or by rank
0. Every rank signs in there before anything is exchanged, and signs off when it leaves, so that a rank that
times out can say for whom. Whether the place can be reached at all is tried with a plain socket first:
torch's own client takes twice the time it is given and prints pages.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, TCPStore  # torch.distributed does not declare them

from observatory.errors import ExchangeError
from observatory.host.ranks import RankOf

_POLL_S = 0.02
_RETRY_S = 0.2
_SCONTROL_S = 10.0
#: Below the ports that systems hand out by themselves.
_FIRST_PORT = 20000
_PORTS = 12000
#: All ranks open their transports in the same order.
_numbers = itertools.count()
_NODE_ADDRESS = re.compile(r"\bNodeAddr=(\S+)")


def meeting_point(where: RankOf, environment: Mapping[str, str]) -> tuple[str, int]:
    """Address and port where the ranks meet.

    From ``MASTER_ADDR`` and ``MASTER_PORT``; in a step of ``srun`` the first node of the step and a port that
    follows from the job's number.

    Raises:
        ExchangeError: neither is there, or the port is not a number.
    """
    host, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    if _is_task_of_step(where, environment):
        host = host or _first_node(environment.get("SLURM_STEP_NODELIST", ""))
        job = int(environment.get("SLURM_JOB_ID", "0")) * 31 + int(environment.get("SLURM_STEP_ID", "0"))
        port = port or str(_FIRST_PORT + job % _PORTS)
    if not host or not port or not port.isdecimal():
        raise ExchangeError(
            f"{where.world} ranks started by {where.launcher} do not know where to meet: MASTER_ADDR is "
            f"{host}, MASTER_PORT is {port}; export both, or use the mpi backend (pip install mpi4py)"
        )
    return host, int(port)


def _is_task_of_step(where: RankOf, environment: Mapping[str, str]) -> bool:
    """Whether this rank is a task of ``srun``, also where PMI says so too."""
    of_slurm = (environment.get("SLURM_PROCID"), environment.get("SLURM_STEP_NUM_TASKS"))
    return where.launcher == "srun" or of_slurm == (str(where.rank), str(where.world))


def _first_node(nodes: str) -> str:
    """First name of a Slurm host list: ``n[03-7,9],m1`` -> ``n03``, ``r[1-2]n[4-5]`` -> ``r1n4``."""
    match = re.match(r"(?:[^\[,]|\[[^\]]*\])+", nodes)
    return "" if match is None else re.sub(r"\[(\w*)[^\]]*\]", r"\1", match[0])


def _address(host: str, environment: Mapping[str, str]) -> str:
    """The name itself where it can be resolved; for a node of Slurm that cannot, what Slurm calls it by."""
    with contextlib.suppress(OSError):
        socket.getaddrinfo(host, None)
        return host
    if host != _first_node(environment.get("SLURM_STEP_NODELIST", "")):
        return host
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(
            ["scontrol", "--oneliner", "show", "node", host],
            capture_output=True,
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=_SCONTROL_S,
        )
        match = _NODE_ADDRESS.search(answer.stdout.decode(errors="replace"))
        if match is not None:
            return match[1]
    return host


class Rendezvous:
    """The list of ranks that are there.

    Attributes:
        store: the store, for the process group.
        meeting_host: name or address of the host where the store is.
        hosts: names of the hosts that ranks have signed in from.
    """

    def __init__(self, where: RankOf, environment: Mapping[str, str], *, timeout_s: float) -> None:
        """Sign in and wait for the others.

        Raises:
            ExchangeError: the store cannot be reached, or ranks do not join in time; names them.
        """
        self._where = where
        host, port = meeting_point(where, environment)
        self.meeting_host = host = _address(host, environment)
        self._place = f"{host}:{port}"
        kept_elsewhere = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        keeps = where.rank == 0 and not kept_elsewhere
        deadline = time.monotonic() + timeout_s
        if not keeps:
            self._reach(host, port, deadline, "the launcher" if kept_elsewhere else "rank 0", timeout_s)
        try:
            kept = TCPStore(
                host,
                port,
                is_master=keeps,
                timeout=timedelta(seconds=timeout_s),
                wait_for_workers=False,
            )
        except RuntimeError as error:
            what = "cannot keep the list of ranks" if keeps else "does not understand what answers"
            raise ExchangeError(
                f"rank {where.rank} of {where.world} {what} at {self._place}: {_first(error)}; see whether "
                "another program has this port, and export MASTER_ADDR and MASTER_PORT to choose the place"
            ) from error
        attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
        # What an earlier transport of these processes has left in the store is not for this one.
        self.store = PrefixStore(f"observatory-{attempt}-{next(_numbers)}", kept)
        self.store.set(f"joined/{where.rank}", socket.gethostname())
        missing = self._missing(max(deadline - time.monotonic(), _RETRY_S))
        if missing:
            self.leave(f"{_ranks(missing)} did not join in time")
            raise ExchangeError(
                f"{_ranks(missing)} of {where.world} did not join at {self._place} within {timeout_s:g} s; "
                "see what became of them, and whether all were started with the same number of ranks"
            )
        named = (self.store.get(f"joined/{rank}") for rank in range(where.world))
        self.hosts = frozenset(name.decode(errors="replace") for name in named)

    def leave(self, error: str | None) -> None:
        """Sign off; the store may be gone by now."""
        with contextlib.suppress(RuntimeError):
            self.store.set(f"left/{self._where.rank}", error or "it had finished")

    def explain_joining(self, reason: BaseException) -> ExchangeError:
        """The error of ranks that have all signed in and then cannot connect to each other."""
        left = [rank for rank in range(self._where.world) if self._has("left", rank)]
        reasons = [f"{_ranks([rank])} had left ({self._last_words(rank)})" for rank in left]
        who = "; ".join(reasons[:4]) or (
            "all have signed in, so one has died since, or the network interface is the wrong one: export "
            "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME to name the one that joins the hosts"
        )
        return ExchangeError(
            f"rank {self._where.rank} of {self._where.world} on host {socket.gethostname()} cannot connect "
            f"to the others ({_first(reason)}); {who}"
        )

    def explain(
        self, what: str, reason: BaseException, *, members: Sequence[int], grace_s: float
    ) -> ExchangeError:
        """The error of an exchange that did not come about.

        Members that wait like this rank sign up within ``grace_s``; who does not has died, hangs, or left.
        Ranks of other groups may not be affected yet, so they are not asked.
        """
        try:
            self.store.set(f"waiting/{self._where.rank}", what)
            silent, gone = self._absent(members, grace_s)
        except RuntimeError:
            silent, gone = [], {0: f"it kept the list of ranks at {self._place}, which is gone"}
        reasons: dict[str, list[int]] = {}
        for rank, text in gone.items():
            reasons.setdefault(text, []).append(rank)
        parts = [f"{_ranks(ranks)} had left ({text})" for text, ranks in reasons.items()]
        if silent:
            parts.append(f"no answer from {_ranks(silent)}")
        who = "; ".join(parts) or (
            "all ranks answer, so the network between them is at fault, or slower than the time it is given"
        )
        return ExchangeError(
            f"rank {self._where.rank} of {self._where.world} timed out in {what}: {who}; see the output "
            f"of the ranks named ({_first(reason)})"
        )

    def _absent(self, members: Sequence[int], grace_s: float) -> tuple[list[int], dict[int, str]]:
        """Members that neither wait nor have left by the end of the time, and the errors of those that left.

        One that timed out as well and then left counts only where no other rank is missing: its last error
        names the ranks that it missed.

        Raises:
            RuntimeError: the store does not answer at all.
        """
        deadline = time.monotonic() + grace_s
        silent, gone = self._look(members)
        with contextlib.suppress(RuntimeError):  # what was seen last counts
            while silent and time.monotonic() < deadline:
                time.sleep(_POLL_S)
                silent, gone = self._look(members)
            if not silent and not gone:
                gone = {rank: self._last_words(rank) for rank in members if self._has("left", rank)}
        return silent, gone

    def _look(self, members: Sequence[int]) -> tuple[list[int], dict[int, str]]:
        absent = [rank for rank in members if not self._has("waiting", rank)]
        gone = {rank: self._last_words(rank) for rank in absent if self._has("left", rank)}
        return [rank for rank in absent if rank not in gone], gone

    def _has(self, key: str, rank: int) -> bool:
        return bool(self.store.check([f"{key}/{rank}"]))

    def _last_words(self, rank: int) -> str:
        return str(self.store.get(f"left/{rank}").decode(errors="replace"))

    def _reach(self, host: str, port: int, deadline: float, keeper: str, timeout_s: float) -> None:
        """Wait until a store listens at the meeting point.

        Raises:
            ExchangeError: none does by the deadline.
        """
        while True:
            left_s = deadline - time.monotonic()
            try:
                socket.create_connection((host, port), timeout=max(left_s, _RETRY_S)).close()
                return
            except OSError as error:
                if left_s > _RETRY_S:
                    time.sleep(_RETRY_S)
                    continue
                raise ExchangeError(
                    f"rank {self._where.rank} of {self._where.world} does not reach {keeper} at "
                    f"{self._place} within {timeout_s:g} s ({error.strerror or error}); see whether "
                    f"{keeper} runs and the address is right, or export MASTER_ADDR and MASTER_PORT"
                ) from error

    def _missing(self, timeout_s: float) -> list[int]:
        """Ranks that have not signed in by the end of the time."""
        deadline = time.monotonic() + timeout_s
        missing = list(range(self._where.world))
        while True:
            try:
                missing = [rank for rank in missing if not self._has("joined", rank)]
            except RuntimeError:
                return missing
            if not missing or time.monotonic() >= deadline:
                return missing
            time.sleep(_POLL_S)


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(str(rank) for rank in ranks)}"


def _first(error: BaseException) -> str:
    """The first sentence of a message of torch, without the place in its source and its advice."""
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return re.sub(r"^\[[^\]]*\]\s*", "", line).partition(". ")[0][:200]

"""How ranks of torch.distributed find each other, and who is missing when they do not.

A key-value store is kept at ``MASTER_ADDR:MASTER_PORT`` by the launcher (torchrun, ``hpc.launch``) or by rank
0. Every rank signs in there before anything is exchanged, and signs off when it leaves, so that a rank that
waits in vain can say for whom.
"""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Mapping
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, TCPStore  # torch.distributed does not declare them

from observatory.errors import ExchangeError
from observatory.ranks import RankOf

__all__ = ["Attendance", "meeting_point"]

_POLL_S = 0.02
_FIRST_PORT = 20000
_PORTS = 20000


def meeting_point(where: RankOf, environment: Mapping[str, str]) -> tuple[str, int]:
    """Address and port where the ranks meet.

    From ``MASTER_ADDR`` and ``MASTER_PORT``; under ``srun`` the first node of the step and a port that
    follows from the job's number.

    Raises:
        ExchangeError: neither is there, or the port is not a number.
    """
    host, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    if where.launcher == "srun":
        host = host or _first_host(environment.get("SLURM_STEP_NODELIST", ""))
        job = int(environment.get("SLURM_JOB_ID", "0")) * 31 + int(environment.get("SLURM_STEP_ID", "0"))
        port = port or str(_FIRST_PORT + job % _PORTS)
    if not host or not port or not port.isdecimal():
        raise ExchangeError(
            f"{where.world} ranks started by {where.launcher} do not know where to meet: MASTER_ADDR is "
            f"{host}, MASTER_PORT is {port}; export both, or use the mpi backend (pip install mpi4py)"
        )
    return host, int(port)


def _first_host(nodes: str) -> str:
    """First name of a Slurm host list: ``n[03-7,9],m1`` -> ``n03``."""
    match = re.match(r"([^\[,]+)(?:\[(\w+))?", nodes)
    return "" if match is None else match[1] + (match[2] or "")


class Attendance:
    """The list of ranks that are there.

    Attributes:
        store: the store, for the process group.
    """

    def __init__(self, where: RankOf, environment: Mapping[str, str], *, timeout_s: float) -> None:
        """Sign in and wait for the others.

        Raises:
            ExchangeError: the store cannot be reached, or ranks do not join in time; names them.
        """
        self._where = where
        host, port = meeting_point(where, environment)
        self._place = f"{host}:{port}"
        kept_elsewhere = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            kept = TCPStore(
                host,
                port,
                is_master=where.rank == 0 and not kept_elsewhere,
                timeout=timedelta(seconds=timeout_s),
                wait_for_workers=False,
            )
        except RuntimeError as error:
            keeper = "the launcher" if kept_elsewhere else "rank 0"
            raise ExchangeError(
                f"rank {where.rank} of {where.world} does not reach {keeper} at {self._place} within "
                f"{timeout_s:g} s; see whether {keeper} runs and whether the port is free ({_first(error)})"
            ) from error
        attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = PrefixStore(f"observatory-{attempt}", kept)
        self.store.set(f"joined/{where.rank}", socket.gethostname())
        missing = self._wait_for("joined", timeout_s)
        if missing:
            self.leave(f"{_ranks(missing)} did not join in time")
            raise ExchangeError(
                f"{_ranks(missing)} of {where.world} did not join at {self._place} within {timeout_s:g} s; "
                "see what became of them, and whether all were started with the same number of ranks"
            )

    def leave(self, error: str | None) -> None:
        """Sign off; the store may be gone by now."""
        with contextlib.suppress(RuntimeError):
            self.store.set(f"left/{self._where.rank}", error or "it had finished")

    def explain(self, what: str, reason: BaseException, *, grace_s: float) -> ExchangeError:
        """The error of an exchange that did not come about.

        Ranks that wait like this one sign up within ``grace_s``; who does not has died, hangs, or left.
        """
        absent: list[int] = []
        left: dict[int, str] = {}
        try:
            self.store.set(f"waiting/{self._where.rank}", what)
            absent = self._wait_for("waiting", grace_s)
            for rank in absent:
                if self.store.check([f"left/{rank}"]):
                    left[rank] = self.store.get(f"left/{rank}").decode(errors="replace")
        except RuntimeError:
            if not absent:
                absent = [0]
                left = {0: f"it kept the list of ranks at {self._place}, which is gone"}
        reasons: dict[str, list[int]] = {}
        for rank, text in left.items():
            reasons.setdefault(text, []).append(rank)
        told = [f"{_ranks(ranks)} had left ({text})" for text, ranks in reasons.items()]
        silent = [rank for rank in absent if rank not in left]
        if silent:
            told.append(f"no answer from {_ranks(silent)}")
        who = "; ".join(told) or "all ranks answer, so the network between them is at fault"
        return ExchangeError(
            f"rank {self._where.rank} of {self._where.world} waited in vain in {what}: {who}; see the output "
            f"of the ranks named ({_first(reason)})"
        )

    def _wait_for(self, key: str, timeout_s: float) -> list[int]:
        """Ranks that have not written this key by the end of the time."""
        deadline = time.monotonic() + timeout_s
        missing = list(range(self._where.world))
        while True:
            try:
                missing = [rank for rank in missing if not self.store.check([f"{key}/{rank}"])]
            except RuntimeError:
                if time.monotonic() < deadline and key == "waiting":
                    raise
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

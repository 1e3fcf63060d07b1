"""What a profile asks of a shared file system: files, bytes and calls of each rank, by strace.

    python benchmarks/file_operations.py [--ep 1 2 4] [--steps 40 400] [--flush-seconds 2]

Protocol: ``observatory profile tiny-gqa --ep P`` runs on P ranks, each under ``strace -f``, twice: for the
first number of steps with no flush before its end, and for the second with one every `--flush-seconds`. Calls
on the run's directory are counted by kind, those on other files (Python, packages, the model) apart:

    start     of the short run, until the first part of a table is begun
    end       the rest of the short run, in which each table writes one part
    a flush   (calls of the long run - calls of the short run) / flushes of the long run before its end

A flush is one of the routing table; each writes whatever has gathered in any table. A call on an open file
counts where the file lies in the directory; reads, seeks and writes are no metadata, and of writes the bytes
are added. Files are those that are left of the short and the long run. Prints one JSON document, with rank 0
and the mean of the other ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

_KINDS = {
    "stat": (
        "stat",
        "lstat",
        "newfstatat",
        "statx",
        "access",
        "faccessat",
        "faccessat2",
        "fstat",
        "readlink",
    ),
    "list": ("getdents64",),
    "make folder": ("mkdir", "mkdirat"),
    "rename": ("rename", "renameat", "renameat2"),
    "remove": ("unlink", "unlinkat", "rmdir"),
    "sync": ("fsync", "fdatasync"),
    "close": ("close",),
}
_KIND_OF = {call: kind for kind, calls in _KINDS.items() for call in calls}
_TRACED = "trace=%file,close,fstat,getdents64,fsync,fdatasync,write,pwrite64"
_CALL = re.compile(r"\d+ +(\w+)\((.*)")
_SIZE = re.compile(r", (\d+)(?:, \d+)?(?:\)| <unfinished)")
#: Kept in memory by the kernel: nothing of a shared file system.
_NOWHERE = ("/proc", "/sys", "/dev")


@dataclass
class Traced:
    """One rank of one run.

    Attributes:
        start: calls on the run's directory, by kind, until the first part is begun.
        rest: calls on it from then on.
        elsewhere: calls on other files.
        flushes: parts of the routing table that were written, or written again.
        written: bytes written into the directory.
        files: files that are left of this rank.
    """

    start: Counter[str] = field(default_factory=Counter)
    rest: Counter[str] = field(default_factory=Counter)
    elsewhere: Counter[str] = field(default_factory=Counter)
    flushes: int = 0
    written: int = 0
    files: int = 0

    @property
    def calls(self) -> Counter[str]:
        """All calls on the run's directory."""
        return self.start + self.rest


def read_trace(lines: Iterable[str], run: Path) -> Traced:
    """What a rank did, line by line."""
    rank = Traced()
    now = rank.start
    for line in lines:
        match = _CALL.match(line)
        if match is None:  # a call that goes on, a signal, an exit
            continue
        call, arguments = match.groups()
        mine = str(run) in arguments
        if mine and ".parquet" in arguments:
            now = rank.rest
        if call in ("write", "pwrite64"):
            size = _SIZE.search(arguments)
            if mine and size is not None:
                rank.written += int(size[1])
            continue
        if call in ("open", "openat", "creat"):
            kind = "create" if "O_CREAT" in arguments else "open"
        else:
            kind = _KIND_OF.get(call, call)
        if mine:
            now[kind] += 1
            rank.flushes += kind == "rename" and f"{run}/routing/" in arguments
        elif kind != "close" and not _is_nowhere(arguments):
            rank.elsewhere[kind] += 1
    return rank


def _is_nowhere(arguments: str) -> bool:
    path = re.search(r'["<](/[^">]*)', arguments)
    return path is not None and path[1].startswith(_NOWHERE)


def profile(folder: Path, ranks: int, steps: int, flush_s: float) -> list[Traced]:
    """One run, rank by rank."""
    folder.mkdir()
    run = folder / "run"
    command = [
        sys.executable, "-m", "observatory", "profile", "tiny-gqa", "--data", "mock", "--batch-size", "1",
        "--sequence-length", "16", "--power", "off", "--ep", str(ranks), "--steps", str(steps),
        "--flush-seconds", str(flush_s), "--out", str(run),
    ]  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(ranks):
        place = {
            "RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1,
        }  # fmt: skip
        environment = {
            **os.environ,
            **({name: str(value) for name, value in place.items()} if ranks > 1 else {}),
        }
        tracer = ["strace", "-f", "-y", "-qq", "-s", "0", "--seccomp-bpf", "-e", _TRACED]
        started.append(subprocess.Popen([*tracer, "-o", f"{folder}/trace.{rank}", *command], env=environment))
    codes = [process.wait() for process in started]
    if any(codes):
        raise SystemExit("a rank failed")
    found = []
    for rank in range(ranks):
        with (folder / f"trace.{rank}").open(encoding="utf-8", errors="replace") as lines:
            traced = read_trace(lines, run)
        parts = run.glob(f"*/rank-{rank:05d}*/*")
        traced.files = len([*parts, *run.glob(f"ranks/rank-{rank:05d}.json")])
        found.append(traced)
    return found


def counted(ranks: int, steps: tuple[int, int], flush_s: float) -> dict[str, object]:
    """Start, end and one flush with so many ranks."""
    with tempfile.TemporaryDirectory() as place:
        short = profile(Path(place, "short"), ranks, steps[0], 3600.0)
        long = profile(Path(place, "long"), ranks, steps[1], flush_s)
    document: dict[str, object] = {"ranks": ranks}
    for name, chosen in (("rank 0", slice(0, 1)), ("other ranks", slice(1, None))):
        few, many = short[chosen], long[chosen]
        if not few:
            continue
        flushes = sum(rank.flushes for rank in many) - sum(rank.flushes for rank in few)
        more = Counter(_sum(rank.calls for rank in many))
        more.subtract(_sum(rank.calls for rank in few))
        more_bytes = sum(rank.written for rank in many) - sum(rank.written for rank in few)
        document[name] = {
            "start": _mean(_sum(rank.start for rank in few), len(few)),
            "end": _mean(_sum(rank.rest for rank in few), len(few)),
            "bytes at start and end": sum(rank.written for rank in few) // len(few),
            "files": [sum(rank.files for rank in some) / len(some) for some in (few, many)],
            "flushes": flushes / len(few),
            "a flush": _mean(more, flushes),
            "bytes of 1,000 steps": round(1000 * more_bytes / len(few) / (steps[1] - steps[0])),
            "calls on other files": _mean(_sum(rank.elsewhere for rank in few), len(few)),
        }
    return document


def _sum(counters: Iterable[Counter[str]]) -> Counter[str]:
    return sum(counters, Counter())


def _mean(calls: Counter[str], count: int) -> dict[str, float]:
    means = {kind: round(number / count, 1) for kind, number in sorted(calls.items()) if number}
    return {**means, "sum": round(sum(calls.values()) / count, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ep", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, nargs=2, default=[40, 400])
    parser.add_argument("--flush-seconds", type=float, default=2.0)
    arguments = parser.parse_args()
    if shutil.which("strace") is None:
        parser.error("strace is not installed")
    steps = (arguments.steps[0], arguments.steps[1])
    print(json.dumps([counted(ranks, steps, arguments.flush_seconds) for ranks in arguments.ep], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

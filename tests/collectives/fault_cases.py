"""Faults as users of the command line meet them: ranks of ``observatory profile --ep`` under torchrun.

``python -m tests.collectives.fault_cases OUT.json`` runs every case on forks of one process (imports cost
more than the cases) and tells, for each rank, what it wrote to its standard error and how it ended.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from observatory.cli import main as run_command
from observatory.zoo.models import load_model
from tests.collectives.forked import Forked

#: when a lost rank is given up: long enough for busy machines
LOST_S = 20.0
NEVER_S = 5.0
_LIGHT = ("--data", "mock", "--batch-size", "1", "--sequence-length", "16", "--flush-seconds", "0.3")
_LONG = ("--steps", "2000", "--exchange-timeout-s", str(LOST_S))

Act = Callable[[], None]


def profile(
    out: Path, *options: str, model: str = "tiny-gqa", ep: int = 2, act: Act | None = None
) -> dict[str, Any]:
    """Run the command on this rank; ``act`` happens to it once rows of all ranks are on disk."""
    kept, (reading, writing) = os.dup(2), os.pipe()  # no file: one of the ranks has a full disk
    os.dup2(writing, 2)
    os.close(writing)
    if act is not None:
        threading.Thread(target=once_written, args=(out, ep, act), daemon=True).start()
    code = run_command(["profile", model, "--ep", str(ep), "--out", str(out), *_LIGHT, *options])
    sys.stderr.flush()
    os.dup2(kept, 2)
    with open(reading, encoding="utf-8", errors="replace") as said:
        return {"code": code, "said": said.read()}


def once_written(out: Path, ranks: int, act: Act) -> None:
    while any(
        len(list(out.glob(f"{table}/*/part-000000.parquet"))) < ranks for table in ("routing", "exchange")
    ):
        time.sleep(0.02)
    act()


def fill_disk() -> None:
    """Writing beyond this many bytes of a file fails, like a full disk."""
    sys.dont_write_bytecode = True  # Python keeps files of bytecode that were cut off
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))


def _signal(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def happens(folder: Path, name: str, act: Act, rank: int) -> dict[str, Any]:
    """Something happens to rank 1 of 2 in the middle of a profile."""
    return profile(folder / name, *_LONG, act=act if rank == 1 else None)


def never_joins(folder: Path, rank: int) -> dict[str, Any]:
    """Rank 2 of 4 is somewhere else."""
    if rank == 2:
        time.sleep(4 * NEVER_S)
        return {"code": 0, "said": ""}
    return profile(folder / "never joins", "--exchange-timeout-s", str(NEVER_S), ep=4)


def differ(folder: Path, name: str, options: Sequence[Sequence[str]], rank: int) -> dict[str, Any]:
    """The ranks are given different options."""
    return profile(folder / name, *options[rank])


def another_model(folder: Path, rank: int) -> dict[str, Any]:
    """The ranks are given different models."""
    return profile(folder / "model", model=("tiny-gqa", "tiny-mha")[rank])


def does_not_divide(folder: Path, _rank: int) -> dict[str, Any]:
    return profile(folder / "does not divide", ep=3)


def wrong_ep(folder: Path, _rank: int) -> dict[str, Any]:
    return profile(folder / "wrong ep", ep=4)


def taken(folder: Path, _rank: int) -> dict[str, Any]:
    """Four commands with one place: made; refused, of which it tells; replaced by three steps; kept."""
    out = folder / "taken"
    first = profile(out, "--steps", "1")
    second = profile(out, "--steps", "2")
    third = profile(out, "--steps", "3", "--force")
    fourth = profile(out, "--force", model=str(folder / "no model here"))
    return {"code": [each["code"] for each in (first, second, third, fourth)], "said": second["said"]}


CASES: dict[str, tuple[int, Callable[[Path, int], dict[str, Any]]]] = {
    "never joins": (4, never_joins),
    "dies": (2, lambda folder, rank: happens(folder, "dies", partial(_signal, signal.SIGKILL), rank)),
    "hangs": (2, lambda folder, rank: happens(folder, "hangs", partial(_signal, signal.SIGSTOP), rank)),
    "full disk": (2, lambda folder, rank: happens(folder, "full disk", fill_disk, rank)),
    "steps": (2, lambda folder, rank: differ(folder, "steps", [("--steps", "2"), ("--steps", "3")], rank)),
    "model": (2, another_model),
    "does not divide": (3, does_not_divide),
    "wrong ep": (2, wrong_ep),
    "taken": (2, taken),
}


def main() -> None:
    torch.set_num_threads(1)
    load_model("tiny-gqa")  # imports its modules, once for all forks
    folder = Path(sys.argv[1]).parent
    waiting = {
        name: Forked(CASES[name][0], partial(CASES[name][1], folder)) for name in ("never joins", "hangs")
    }
    outcome = {
        name: Forked(world, partial(work, folder)).collect(timeout_s=200)
        for name, (world, work) in CASES.items()
        if name not in waiting
    }
    outcome |= {name: forked.collect(timeout_s=2 * LOST_S) for name, forked in waiting.items()}
    Path(sys.argv[1]).write_text(json.dumps(outcome))


if __name__ == "__main__":
    main()

"""SIGKILL and SIGSTOP at every point of the code that locks clocks; on the driver that plays GPUs.

    python -m benchmarks.kill_points [--jobs 2] [--every 1] [--only TEXT]

A point is a line of ``observatory/locks/{locking,lease,lease_files,control,watchdog}.py`` as a process
runs it, each line up to three times (tests/locks/killing.py). The owner locks, limits, locks, restores,
unlocks, locks and releases (tests/locks/lock_owner.py). Every point is a run of its own:

    owner starts -> ... -> killed at the point -> its orphans end -> [clocks unlock] -> what the driver holds

The worker is the reaper of orphans, so that it knows when each watchdog ended and leaves no process. Time to
reset: from the owner's death, as its reaper sees it, to the last change that the driver logged. Owners and
``clocks unlock`` are forked from a worker that has imported everything; watchdogs are started as always.

Stops are played by ``benchmarks.stop_points``: a process is stopped at the point until its lease has expired.
They mostly wait, so that four times as many are played at a time.

The exit code is 1 when something stayed locked, or when the lock of a second owner was disturbed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.stop_points import STOPS, StopOutcome, play_stop
from tests.devices.driver import Change
from tests.locks.killing import POINTS, kill_at_point, kill_watchdogs
from tests.locks.test_locking import UUID, Host

CLEAN = {"lock": 0.0, "limit": 700.0}
_SUBREAPER = 36
_ORPHANS_S = 60.0
_STOPS_A_JOB = 4

#: What is killed -> what happens then.
SCENARIOS = {
    "owner": "the watchdog undoes",
    "owner and watchdog at once": "`clocks unlock` undoes, as in a batch system's epilogue",
    "watchdog, owner lives": "the owner refuses further changes, and undoes",
    "owner in the middle, then watchdog": "`clocks unlock` undoes",
    "owner and watchdog, then `clocks unlock`": "the next `clocks unlock` undoes",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one point.

    Attributes:
        scenario: key of ``SCENARIOS``.
        point: the point.
        killed: whether the process came to it.
        changed: at the death of the owner the driver held a lock or a limit of ours.
        undone_by: who made the last change of the driver; None where there was none at all.
        reset_ms: from the death of the owner to that change; None where nothing was changed at it.
        left: what the driver held in the end, where that is not what it held at first.
        files: lease files in the end.
    """

    scenario: str
    point: int
    killed: bool
    changed: bool
    undone_by: str | None
    reset_ms: float | None
    left: dict[str, float] | None
    files: int


class Bench:
    """One driver, and processes that are killed on it."""

    def __init__(self, folder: Path) -> None:
        self.host = Host(folder)
        self.host.leases.mkdir(mode=0o700)  # or the first owner has more points than the others
        self._output = (folder / "output.txt").open("ab")
        self._points_file = folder / "points.txt"
        os.environ[POINTS] = str(self._points_file)
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)

    def points_of(self, scenario: str) -> int:
        """How many points a scenario has."""
        self._play(STOPS.get(scenario, scenario), 0)
        return int(self._points_file.read_text())

    def stop(self, scenario: str, point: int) -> StopOutcome:
        """One point at which a process is stopped."""
        before = len(self.host.driver.changes())
        return play_stop(
            self.host,
            scenario,
            point,
            fork=self._fork,
            reap=self._reap,
            held=lambda: _held_after(self.host.driver.changes()[before:]),
            clean=CLEAN,
        )

    def run(self, scenario: str, point: int) -> Outcome:
        """One point."""
        self._points_file.unlink(missing_ok=True)
        before = len(self.host.driver.changes())
        owner, death_ns, unlockers = self._play(scenario, point)
        changes, state = self.host.driver.changes()[before:], self.host.state()
        held = _held_after([change for change in changes if change.time_ns <= death_ns])
        last = changes[-1] if changes else None
        return Outcome(
            scenario=scenario,
            point=point,
            killed=self._points_file.exists(),
            changed=held != CLEAN,
            undone_by=None if last is None
            else "owner" if last.pid == owner
            else "`clocks unlock`" if last.pid in unlockers else "watchdog",
            reset_ms=(last.time_ns - death_ns) / 1e6 if last is not None and held != CLEAN else None,
            left=None if state == CLEAN else state,
            files=len(self.host.files()),
        )  # fmt: skip

    def _play(self, scenario: str, point: int) -> tuple[int, int, list[int]]:
        """Owner, its time of death, and processes that ran ``clocks unlock``."""
        if scenario == "owner":
            return *self._owner(str(point)), []
        if scenario == "owner and watchdog at once":
            return *self._owner(str(point), "everybody"), [self._unlock(None)]
        if scenario == "watchdog, owner lives":
            return *self._owner("-1", watchdog=point), []
        if scenario == "owner in the middle, then watchdog":
            return *self._owner("middle", watchdog=point), [self._unlock(None)]
        return *self._owner("middle", "everybody"), [self._unlock(point), self._unlock(None)]

    def _owner(self, *arguments: str, watchdog: int | None = None) -> tuple[int, int]:
        """Run an owner to its end, and wait for the watchdog that it leaves; its id and time of death."""
        from tests.locks import lock_owner

        def main() -> int:
            if watchdog is not None:
                kill_watchdogs(watchdog)
            return lock_owner.main([UUID, *arguments])

        result = self._forked(main)
        self._reap()
        return result

    def _reap(self) -> None:
        """Wait for the watchdogs that are left."""
        deadline = time.monotonic() + _ORPHANS_S
        with contextlib.suppress(ChildProcessError):
            while time.monotonic() < deadline:
                if not os.waitpid(-1, os.WNOHANG)[0]:
                    time.sleep(0.005)
            raise TimeoutError(f"a watchdog did not end within {_ORPHANS_S:g} s of its owner's death")

    def _unlock(self, point: int | None) -> int:
        """``observatory clocks unlock``, killed at a point, counted (0), or left alone; its id."""
        from observatory.cli import main as observatory

        def unlock() -> int:
            end = None if point is None else kill_at_point(point)
            code = observatory(["clocks", "unlock"])
            if end is not None:
                end()
            return code

        return self._forked(unlock)[0]

    def _forked(self, function: Callable[[], int]) -> tuple[int, int]:
        """Id and time of death of a process that calls a function."""
        pid = self._fork(function)
        os.waitpid(pid, 0)
        return pid, time.monotonic_ns()

    def _fork(self, function: Callable[[], int]) -> int:
        """Id of a process that calls a function."""
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                for stream in (1, 2):
                    os.dup2(self._output.fileno(), stream)
                code = function()
                sys.stdout.flush()
            except Exception as error:
                os.write(2, f"{type(error).__name__}: {error}\n".encode())
            finally:
                os._exit(code)
        return pid


def _held_after(changes: Sequence[Change]) -> dict[str, float]:
    """Lock and limit after these changes of a driver that held none."""
    held = dict(CLEAN)
    for change in changes:
        if change.code == 0:
            name = "limit" if change.what == "limit" else "lock"
            held[name] = {"lock": change.values[1], "unlock": 0.0, "limit": change.values[0] / 1000}[
                change.what
            ]
    return held


def work(folder: Path, job: int, jobs: int, every: int, scenarios: Sequence[str]) -> None:
    """One worker's share of all points, an outcome a line."""
    bench = Bench(folder)
    for scenario in scenarios:
        points = bench.points_of(scenario)
        for point in range(1 + job * every, points + 1, jobs * every):
            outcome = bench.stop(scenario, point) if scenario in STOPS else bench.run(scenario, point)
            sys.stdout.write(json.dumps(asdict(outcome)) + "\n")
            sys.stdout.flush()


def show(outcomes: Sequence[Outcome]) -> None:
    """Print the table."""
    print(
        "| killed | points | nothing held then | undone by the owner | by the watchdog | by `clocks unlock` "
        "| time to reset, median / max | left locked |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for scenario in SCENARIOS:
        own = [outcome for outcome in outcomes if outcome.scenario == scenario and outcome.killed]
        if not own:
            continue
        living = scenario == "watchdog, owner lives"
        held = [outcome for outcome in own if outcome.changed or (living and outcome.undone_by)]
        by = [
            sum(outcome.undone_by == who for outcome in held)
            for who in ("owner", "watchdog", "`clocks unlock`")
        ]
        times = [outcome.reset_ms for outcome in held if outcome.reset_ms is not None and not living]
        reset = f"{statistics.median(times):.0f} / {max(times):.0f} ms" if times else "-"
        left = sum(outcome.left is not None for outcome in own)
        print(
            f"| {scenario} | {len(own)} | {len(own) - len(held)} | {by[0]} | {by[1]} | {by[2]} "
            f"| {reset} | {left} |"
        )
    missed = sum(not outcome.killed for outcome in outcomes)
    print(f"\n{missed} points were not come to (the process ended by another way before).")
    for outcome in outcomes:
        if outcome.left is not None:
            print(f"* left: {outcome}")


def show_stops(outcomes: Sequence[StopOutcome]) -> None:
    """Print the table of the stops."""
    print(
        "| until the lease has expired | points | held the file lock | undone meanwhile "
        "| a second owner leased | was refused | was disturbed | left locked |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for scenario in STOPS:
        own = [outcome for outcome in outcomes if outcome.scenario == scenario and outcome.stopped]
        if own:
            counts = [
                sum(outcome.alone for outcome in own),
                sum(outcome.undone for outcome in own),
                *(sum(outcome.second == what for outcome in own) for what in ("leased", "refused")),
                sum(outcome.disturbed for outcome in own),
                sum(outcome.left is not None for outcome in own),
            ]
            print(f"| {scenario} | {len(own)} | " + " | ".join(map(str, counts)) + " |")
    print(f"\n{sum(not outcome.stopped for outcome in outcomes)} points were not come to.")
    for outcome in outcomes:
        if outcome.left is not None or outcome.disturbed:
            print(f"* left or disturbed: {outcome}")


def main() -> int:
    """Start the workers, gather and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="points at a time")
    parser.add_argument("--every", type=int, default=1, help="take every so manieth point")
    parser.add_argument("--only", default="", help="scenarios whose name holds this")
    parser.add_argument(
        "--worker", nargs=4, metavar=("FOLDER", "JOB", "JOBS", "KIND"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    scenarios = {
        kind: [name for name in names if options.only in name]
        for kind, names in {"kills": SCENARIOS, "stops": STOPS}.items()
    }
    if options.worker:
        folder, job, jobs, kind = options.worker
        work(Path(folder), int(job), int(jobs), options.every, scenarios[kind])
        return 0
    with tempfile.TemporaryDirectory() as name:
        found = {
            kind: _run_workers(Path(name) / kind, jobs, [*sys.argv[1:], "--worker"], kind)
            for kind, jobs in {"kills": options.jobs, "stops": _STOPS_A_JOB * options.jobs}.items()
            if scenarios[kind]
        }
    kills = [Outcome(**outcome) for outcome in found.get("kills", ())]
    stops = [StopOutcome(**outcome) for outcome in found.get("stops", ())]
    if kills:
        show(kills)
    if stops:
        show_stops(stops)
    bad = any(outcome.left is not None for outcome in (*kills, *stops))
    return int(bad or any(outcome.disturbed for outcome in stops))


def _run_workers(folder: Path, jobs: int, argv: Sequence[str], kind: str) -> list[dict[str, Any]]:
    workers = []
    for job in range(jobs):
        own = folder / f"worker-{job}"
        own.mkdir(parents=True)
        path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
        workers.append(
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.kill_points", *argv, str(own), str(job), str(jobs), kind],
                env={**Host(own).environment, "PYTHONPATH": path},
                stdout=(own / "outcomes.jsonl").open("w"),
            )
        )
    codes = [worker.wait() for worker in workers]
    if any(codes):
        raise SystemExit(f"a worker ended with exit code {max(codes, key=abs)}; its message is above")
    lines = [line for path in folder.glob("*/outcomes.jsonl") for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


if __name__ == "__main__":
    raise SystemExit(main())

"""What becomes of commands to a capture: one thread of each rank reads them, steps obey.

Rank 0 reads what is asked for and decides from which step on it holds, so far ahead that every rank knows of
it by then; the others learn it from the store that their process group met at, or from a file of rank 0 where
there is none. The program's own threads ask no file and no store: at the end of a step they look at a queue.
A rank that learns of a step after it has passed obeys at once, and its run states the steps it captured.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from observatory.errors import ObservatoryError
from observatory.host.ranks import RankOf
from observatory.probes.options import StepOptions
from observatory.probes.step_schedule import StepSchedule
from observatory.probes.store_alignment import default_store
from observatory.run import RunWriter
from observatory.run.control import (
    MOST_HANDLED,
    Action,
    Answer,
    Decision,
    open_control,
    read_decision,
    take_requests,
    write_answer,
    write_decision,
)
from observatory.run.files import one_line
from observatory.run.manifest import SelfMeasured, StepMark

#: Between two looks; ranks without a store look less often, so that all together open so many files a second.
_PERIOD_S = 0.5
_MOST_LOOKS_PER_S = 200
#: A decision is so many looks of the others ahead, and so many steps at most.
_LOOKS_AHEAD = 3
_MOST_STEPS_AHEAD = 10_000
_MOST_MARKS = 1024
#: A share of the time is judged over so long, and counts if it is too large twice in a row: first calls are
#: verified, and caches are cold.
_WINDOW_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OverBudget:
    """Why a capture was ended.

    Attributes:
        step: nothing is captured from it on.
        share: of the program's time that watching took.
        budget: the share that it was to take at most.
    """

    step: int
    share: float
    budget: float


class CaptureControl:
    """Runs from ``open`` to ``close``.

    Args:
        options: which steps are asked for at the start.
        where: this rank.
        writer: of the run.
        steps: how many steps have ended.
        rows: how many rows of routing there are.
        flush: writes what was captured, from any thread.
        cost: what watching has cost so far, from any thread.
    """

    def __init__(
        self,
        options: StepOptions,
        where: RankOf,
        writer: RunWriter,
        *,
        steps: Callable[[], int],
        rows: Callable[[], int],
        flush: Callable[[], None],
        cost: Callable[[], SelfMeasured],
    ) -> None:
        self._options = options
        self._where = where
        self._writer = writer
        self._steps, self._rows, self._flush = steps, rows, flush
        self._schedule = StepSchedule(options)
        self._captured = self._schedule.captured()
        self._decided: deque[Decision] = deque()
        self._last: Decision | None = None
        self._began_s: float | None = None
        self._cost = cost
        self._budget = options.budget if where.rank == 0 else None
        self._last_cost = (0.0, 0.0)
        self._windows_over = 0
        self.over_budget: OverBudget | None = None
        self._is_timed = options.most_s is not None and where.rank == 0
        self._handled: deque[str] = deque(maxlen=MOST_HANDLED)
        self._number = 0
        self._marks = 0
        self._said: Answer | None = None
        self._looks = 0
        self._last_look: tuple[float, int] | None = None
        self._most_steps_per_s = 0.0
        self._board = DecisionBoard(writer.path, writer.manifest.run_id, where)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="observatory-control", daemon=True)

    def open(self) -> None:
        """Take commands from now on; where the run's folder cannot hold them, none are taken."""
        self._writer.set_captured(self._captured)
        options = self._options
        if options.listens or options.most_s is not None or options.budget is not None:
            with contextlib.suppress(OSError, ObservatoryError):
                open_control(self._writer.path)
                self._say()
                self._thread.start()

    def wants(self, step: int) -> bool:
        """Whether a step that is about to begin is captured; on the program's own thread."""
        while self._decided:
            self._obey(self._decided.popleft(), step)
        is_wanted = self._schedule.is_wanted(step)
        if is_wanted and self._began_s is None:
            self._began_s = time.monotonic()
        return is_wanted

    @property
    def has_begun(self) -> bool:
        """Whether a step was to be captured so far."""
        return self._began_s is not None

    def is_over(self, step: int) -> bool:
        """Whether nothing is captured from this step on, for good."""
        return self._schedule.is_over(step)

    def close(self, steps: int) -> None:
        """Take no more commands and state which steps were captured, of so many in all."""
        self._closing.set()
        was_open = self._thread.ident is not None
        if was_open:
            self._thread.join()
        self._captured = self._schedule.captured(steps)
        self._writer.set_captured(self._captured)
        if was_open:
            with contextlib.suppress(ObservatoryError):
                self._say(has_ended=True)

    def _obey(self, decision: Decision, step: int) -> None:
        at = max(decision.step, step)
        if decision.action == "start":
            self._schedule.start(at)
        elif decision.action == "stop":
            self._schedule.stop(at)
        else:
            self._schedule.end(at)
        self._captured = self._schedule.captured()

    def _run(self) -> None:
        while not self._closing.wait(self._board.period_s):
            with contextlib.suppress(ObservatoryError, OSError):  # nothing of ours stops the program
                self._look()

    def _look(self) -> None:
        steps = self._steps()
        self._note_pace(steps)
        if self._where.rank == 0:
            if self._where.world > 1 and self._looks <= _LOOKS_AHEAD:
                return  # the pace of the steps is not known yet
            self._end_in_time(steps)
            self._keep_budget(steps)
            for request in take_requests(self._writer.path):
                self._take(self._decided_on(request.action, steps, request=request.id), name=request.name)
        else:
            while (decision := self._board.read(self._number + 1)) is not None:
                self._take(decision)
        self._writer.set_captured(self._captured)
        self._say()

    def _end_in_time(self, steps: int) -> None:
        began_s, most_s = self._began_s, self._options.most_s
        if not self._is_timed or began_s is None or most_s is None:
            return
        if time.monotonic() - began_s >= most_s:
            self._is_timed = False
            self._take(self._decided_on("end", steps))

    def _keep_budget(self, steps: int) -> None:
        """End the capture where it takes too much of this rank's time."""
        if self._budget is None:
            return
        cost, (before_s, spent_before_s) = self._cost(), self._last_cost
        window_s = cost.captured_s - before_s
        if window_s < _WINDOW_S:
            return
        self._last_cost = (cost.captured_s, cost.spent_s)
        share = (cost.spent_s - spent_before_s) / window_s
        self._windows_over = self._windows_over + 1 if share > self._budget else 0
        if self._windows_over > 1:
            self._windows_over = 0
            decision = self._decided_on("end", steps)
            self.over_budget = OverBudget(step=decision.step, share=share, budget=self._budget)
            self._take(decision)

    def _decided_on(self, action: Action, steps: int, *, request: str | None = None) -> Decision:
        """As rank 0: from which step on all ranks do it, made known to them."""
        decision = Decision(
            number=self._number + 1, request=request, action=action, step=steps + self._steps_ahead()
        )
        if self._where.world > 1:
            self._board.write(decision)
        return decision

    def _note_pace(self, steps: int) -> None:
        now_s, last = time.monotonic(), self._last_look
        if last is not None and now_s > last[0]:
            self._most_steps_per_s = max(self._most_steps_per_s, (steps - last[1]) / (now_s - last[0]))
        self._looks += 1
        self._last_look = (now_s, steps)

    def _steps_ahead(self) -> int:
        """So many that the other ranks know of a decision by then, at the quickest pace so far."""
        if self._where.world == 1:
            return 1
        ahead_s = _LOOKS_AHEAD * self._board.others_period_s
        return min(2 + math.ceil(self._most_steps_per_s * ahead_s), _MOST_STEPS_AHEAD)

    def _take(self, decision: Decision, *, name: str | None = None) -> None:
        """Do what was decided, or leave it to the program's thread where it is about steps."""
        self._number = decision.number
        if decision.action in ("start", "stop", "end"):
            self._decided.append(decision)
            self._last = decision
        elif decision.action == "flush":
            self._flush()
        elif decision.action == "mark" and self._where.rank == 0 and self._marks < _MOST_MARKS:
            self._marks += 1
            self._writer.add_mark(
                StepMark(
                    name=one_line(name or "mark", 200),
                    step=self._steps(),
                    time_ns=time.monotonic_ns(),
                    unix_s=time.time(),
                )
            )
        if decision.request is not None:
            self._handled.append(decision.request)

    def _say(self, *, has_ended: bool = False) -> None:
        """Write the rank's word, where it is another than the last but for the time and the counts."""
        steps = self._steps()
        is_open = self._captured is None or any(
            item.first_step <= steps and (item.end_step is None or steps < item.end_step)
            for item in self._captured
        )
        coming = self._last if self._last is not None and self._last.step > steps else None
        answer = Answer(
            rank=self._where.rank,
            host=one_line(socket.gethostname(), 255),
            pid=os.getpid(),
            state="ended" if has_ended else "capturing" if is_open else "stopped",
            steps=steps,
            rows=self._rows(),
            marks=self._marks,
            handled=tuple(self._handled),
            next_action=coming.action if coming else None,
            next_step=coming.step if coming else None,
            unix_s=time.time(),
        )
        said = self._said
        varying = {"unix_s", "steps", "rows"}
        if said is None or said.model_dump(exclude=varying) != answer.model_dump(exclude=varying):
            write_answer(self._writer.path, answer)
            self._said = answer


class DecisionBoard:
    """Where rank 0 leaves its decisions for the other ranks.

    Args:
        run: the run directory.
        run_id: its id.
        where: this rank.

    Attributes:
        period_s: between two looks of this rank.
        others_period_s: between two looks of ranks other than 0.
    """

    def __init__(self, run: Path, run_id: str, where: RankOf) -> None:
        self._run = run
        self._name = f"observatory-control/{run_id}"
        store = default_store() if where.world > 1 else None
        self._store: Any | None = None
        if store is not None:
            with contextlib.suppress(
                RuntimeError
            ):  # a connection of our own, as another thread may wait on it
                self._store = store.clone() if hasattr(store, "clone") else store
        files_s = max(_PERIOD_S, where.world / _MOST_LOOKS_PER_S)
        self.others_period_s = files_s if self._store is None else _PERIOD_S
        self.period_s = _PERIOD_S if where.rank == 0 else self.others_period_s

    def write(self, decision: Decision) -> None:
        """As rank 0.

        Raises:
            RunError: there is neither a store nor can the file be written.
        """
        write_decision(self._run, decision)
        if self._store is not None:
            with contextlib.suppress(RuntimeError):
                self._store.set(f"{self._name}/{decision.number}", decision.model_dump_json())

    def read(self, number: int) -> Decision | None:
        """The decision of this number; None before there is one."""
        store, key = self._store, f"{self._name}/{number}"
        if store is None:
            return read_decision(self._run, number)
        try:
            return Decision.model_validate_json(store.get(key)) if store.check([key]) else None
        except (RuntimeError, pydantic.ValidationError):  # the program has left its process group
            self._store = None
            return None

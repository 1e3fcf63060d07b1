"""Commands to a capture that runs: ask, wait for the ranks' words, state them."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from observatory.errors import RunError
from observatory.run.control import Action, Answer, Request, answering_ranks, ask, read_answer, withdraw
from observatory.run.files import RANKS_FOLDER, one_line, rank_folder
from observatory.run.manifest import StepMark
from observatory.run.manifest_files import read_manifest, read_rank_status

#: Between two looks for the answers.
_LOOK_S = 0.05
_LONGEST_NAME = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class RankWord:
    """What a rank says of itself.

    Attributes:
        answer: its last word.
        has_answered: whether it knows of this command.
        age_s: how old the last sign of life of the rank is.
    """

    answer: Answer
    has_answered: bool
    age_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Controlled:
    """What became of a command.

    Attributes:
        run: the run directory.
        action: what was asked for.
        name: of the mark.
        was_capturing: whether rank 0 captured before.
        ranks: every rank that takes commands; rank 0 has answered.
        marks: all marks of the run.
    """

    run: Path
    action: Action
    name: str | None
    was_capturing: bool
    ranks: tuple[RankWord, ...]
    marks: tuple[StepMark, ...]

    @property
    def first(self) -> Answer:
        """The word of rank 0."""
        return self.ranks[0].answer

    def document(self) -> dict[str, Any]:
        """For JSON; the keys are described in docs/json.md."""
        return {
            "run": str(self.run),
            "action": self.action,
            "name": self.name,
            "ranks": [
                {
                    **word.answer.model_dump(exclude={"handled", "unix_s"}),
                    "has_answered": word.has_answered,
                    "age_s": round(word.age_s, 3),
                }
                for word in self.ranks
            ],
            "marks": [mark.model_dump() for mark in self.marks],
        }


def control_run(run: Path, action: Action, *, name: str | None = None, wait_s: float) -> Controlled:
    """Have a running capture do something.

    Args:
        run: the run directory.
        action: what.
        name: of a mark.
        wait_s: how long to wait for the ranks' answers.

    Raises:
        RunError: no such run, it has ended, it takes no commands, or its first rank does not answer.
        RunFormatError: its manifest is damaged.
    """
    if action == "mark":
        _check_name(name)
    before = _first_word(run)
    request = ask(run, action, name)
    end_s = time.monotonic() + wait_s
    while not _knows(read_answer(run, 0), request):
        if time.monotonic() >= end_s or not _may_live(before):
            withdraw(run, request)
            if not _knows(read_answer(run, 0), request):
                raise _silent(run, before, wait_s)
        time.sleep(_LOOK_S)
    waiting = [rank for rank in answering_ranks(run) if rank > 0]
    while waiting and time.monotonic() < end_s:
        waiting = [rank for rank in waiting if not _knows(read_answer(run, rank), request)]
        time.sleep(_LOOK_S if waiting else 0.0)
    status = read_rank_status(run, 0)
    if action == "mark" and (status is None or all(mark.name != name for mark in status.marks)):
        raise RunError(f"run {run} keeps no more marks")
    return Controlled(
        run=run,
        action=action,
        name=name,
        was_capturing=before.state == "capturing" or before.next_action == "start",
        ranks=tuple(_words(run, request)),
        marks=() if status is None else status.marks,
    )


def _check_name(name: str | None) -> None:
    if name is None or not name.strip() or name != one_line(name, _LONGEST_NAME):
        raise RunError(
            f"a mark of the name {ascii(name)[:60]} cannot be kept",
            expected=f"1 to {_LONGEST_NAME} characters on one line",
        )


def _first_word(run: Path) -> Answer:
    """The last word of rank 0 of a run that takes commands.

    Raises:
        RunError: it takes none.
    """
    manifest = read_manifest(run)
    answer = read_answer(run, 0)
    if manifest.state != "running" or (answer is not None and answer.state == "ended"):
        raise RunError(f"run {run} has ended and takes no commands", remedy=f"see observatory routing {run}")
    if answer is None:
        raise RunError(
            f"run {run} takes no commands: neither `observatory run` nor a callback of a trainer makes it"
        )
    if not _may_live(answer):
        raise _ended_unclosed(run, answer)
    return answer


def _knows(answer: Answer | None, request: Request) -> bool:
    return answer is not None and request.id in answer.handled


def _may_live(answer: Answer) -> bool:
    """Whether the rank's process lives, as far as this host can see."""
    if answer.host != one_line(socket.gethostname(), 255):
        return True
    try:
        os.kill(answer.pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


def _ended_unclosed(run: Path, answer: Answer) -> RunError:
    return RunError(
        f"run {run} takes no commands: process {answer.pid}, its rank {answer.rank}, ended without closing it"
    )


def _silent(run: Path, answer: Answer, wait_s: float) -> RunError:
    if not _may_live(answer):
        return _ended_unclosed(run, answer)
    return RunError(
        f"run {run} has not answered within {wait_s:g} s: process {answer.pid} on {answer.host}, its rank 0, "
        f"was last heard of {age_words(_age_s(run, answer))} ago; it was killed or hangs"
    )


def outcome_sentence(done: Controlled) -> str:
    """What became of a command, in words; not of ``status``."""
    first = done.first
    coming = first.next_action == done.action
    if done.action == "start" and done.was_capturing and first.state == "capturing":
        return f"the capture was running already, and goes on; step {first.steps} is in progress"
    if done.action == "stop" and not done.was_capturing:
        return f"nothing was being captured; step {first.steps} is in progress"
    if done.action in ("start", "stop"):
        verb = f"{done.action}s" if coming else {"start": "has started", "stop": "has stopped"}[done.action]
        when = f" with step {first.next_step}" if coming else ""
        return f"the capture {verb}{when}; step {first.steps} is in progress"
    if done.action == "mark":
        return f"marked in step {done.marks[-1].step if done.marks else first.steps}: {done.name}"
    rows = sum(word.answer.rows for word in done.ranks)
    return f"what was captured is on disk: {rows} rows of routing up to step {first.steps}"


def age_words(age_s: float) -> str:
    """A time in the unit that reads best."""
    for size_s, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if age_s >= 2 * size_s:
            return f"{age_s / size_s:.0f} {unit}"
    return f"{age_s:.0f} s"


def _words(run: Path, request: Request) -> Iterator[RankWord]:
    for rank in answering_ranks(run):
        answer = read_answer(run, rank)
        if answer is not None:
            yield RankWord(answer=answer, has_answered=_knows(answer, request), age_s=_age_s(run, answer))


def _age_s(run: Path, answer: Answer) -> float:
    """Since the rank last wrote anything."""
    stem = rank_folder(answer.rank)
    last_s = answer.unix_s
    for path in (run / RANKS_FOLDER / f"{stem}.json", *(run / "routing" / stem).glob("part-*.parquet")):
        with contextlib.suppress(OSError):
            last_s = max(last_s, path.stat().st_mtime)
    return max(0.0, time.time() - last_s)

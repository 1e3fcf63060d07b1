"""Commands to a capture that runs, through files of its run directory.

    <run>/control/requests/<time>-<id>.json   what was asked for; removed once it is read
    <run>/control/decision-NNNNNN.json        what rank 0 made of it, for ranks that share no store with it
    <run>/control/rank-NNNNN.json             the last word of each rank

Every file appears whole, under its final name. Ranks look at most twice a second, from a thread of their own.
"""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path
from typing import Annotated, Literal, TypeVar, get_args

import pydantic
from pydantic import Field

from observatory.errors import RunError
from observatory.run.files import (
    CONTROL_FOLDER,
    one_line,
    os_reason,
    plain_entries,
    rank_folder,
    rank_number,
    read_json,
)
from observatory.run.records import Count, Moment, Record, Text

Action = Literal["start", "stop", "end", "mark", "flush", "status"]
#: What people may ask for; the end comes with a limit of time.
ACTIONS: tuple[Action, ...] = tuple(action for action in get_args(Action) if action != "end")

_REQUESTS = "requests"
#: Requests that are read at once, and that may wait.
_MOST_REQUESTS = 256
#: Requests that an answer names.
MOST_HANDLED = 32

_Id = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
_Read = TypeVar("_Read", bound=Record)


class Request(Record):
    """Something that was asked of a capture.

    Attributes:
        id: names it in the answers.
        action: what.
        name: of a mark.
        unix_s: when.
    """

    id: _Id
    action: Action
    name: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    unix_s: Moment


class Decision(Record):
    """What rank 0 made of a request: the same for all ranks.

    Attributes:
        number: counted from 1.
        request: the request; None where there was none.
        action: what is done.
        step: start, stop and end: the first step that it is about.
    """

    number: Annotated[int, Field(ge=1, lt=10**6)]
    request: _Id | None = None
    action: Action
    step: Count = 0


class Answer(Record):
    """The last word of a rank.

    Attributes:
        rank: the rank.
        host: its host.
        pid: its process there.
        state: whether the step in progress may be captured; ``ended`` once nothing follows.
        steps: steps that have ended, captured or not.
        rows: rows of routing that were captured so far.
        marks: marks so far.
        handled: the requests that it knows of, the newest last.
        next_action: start, stop or end that comes at ``next_step``; None where none is decided.
        next_step: see ``next_action``.
        unix_s: when it was written.
    """

    rank: Count
    host: Text
    pid: Annotated[int, Field(ge=1, lt=2**31)]
    state: Literal["capturing", "stopped", "ended"]
    steps: Count
    rows: Count = 0
    marks: Count = 0
    handled: Annotated[tuple[_Id, ...], Field(max_length=MOST_HANDLED)] = ()
    next_action: Action | None = None
    next_step: Count | None = None
    unix_s: Moment


def open_control(run: Path) -> None:
    """Make the folders, as a rank of the run.

    Raises:
        OSError: they cannot be made.
    """
    (run / CONTROL_FOLDER / _REQUESTS).mkdir(parents=True, exist_ok=True)


def ask(run: Path, action: Action, name: str | None = None) -> Request:
    """Ask something of a capture.

    Raises:
        RunError: nothing can be written there, or too much waits already.
    """
    folder = run / CONTROL_FOLDER / _REQUESTS
    if len(plain_entries(folder, want_folders=False)[0]) >= _MOST_REQUESTS:
        raise RunError(f"{_MOST_REQUESTS} commands wait in run {run}", remedy=f"remove {folder}")
    request = Request(id=uuid.uuid4().hex, action=action, name=name, unix_s=time.time())
    _write(folder / f"{time.time_ns():020d}-{request.id}.json", request)
    return request


def withdraw(run: Path, request: Request) -> None:
    """Take a request back, if no rank has read it."""
    folder = run / CONTROL_FOLDER / _REQUESTS
    for path in folder.glob(f"*-{request.id}.json"):
        path.unlink(missing_ok=True)


def take_requests(run: Path) -> list[Request]:
    """Read what was asked for, in the order of asking, and remove it; what is no request is removed too.

    Raises:
        OSError: the folder cannot be listed, or a file not removed.
    """
    folder = run / CONTROL_FOLDER / _REQUESTS
    names = sorted(name for name in os.listdir(folder) if name.endswith(".json") and name[0] != ".")
    requests = []
    for name in names[:_MOST_REQUESTS]:
        request = _read(folder / name, Request)
        (folder / name).unlink(missing_ok=True)
        if request is not None:
            requests.append(request)
    return requests


def write_decision(run: Path, decision: Decision) -> None:
    """Leave a decision for the other ranks.

    Raises:
        RunError: it cannot be written.
    """
    _write(_decision_file(run, decision.number), decision)


def read_decision(run: Path, number: int) -> Decision | None:
    """The decision of this number; None before there is one."""
    return _read(_decision_file(run, number), Decision)


def write_answer(run: Path, answer: Answer) -> None:
    """Leave the word of a rank.

    Raises:
        RunError: it cannot be written.
    """
    _write(run / CONTROL_FOLDER / f"{rank_folder(answer.rank)}.json", answer)


def read_answer(run: Path, rank: int) -> Answer | None:
    """The last word of a rank; None before there is one."""
    answer = _read(run / CONTROL_FOLDER / f"{rank_folder(rank)}.json", Answer)
    return answer if answer is not None and answer.rank == rank else None


def answering_ranks(run: Path) -> list[int]:
    """Ranks that have left a word, ascending.

    Raises:
        RunError: the folder cannot be listed.
    """
    names, _ = plain_entries(run / CONTROL_FOLDER, want_folders=False)
    ranks = [rank_number(name.removesuffix(".json")) for name in names if name.endswith(".json")]
    return sorted(rank for rank in ranks if rank is not None)


def _decision_file(run: Path, number: int) -> Path:
    return run / CONTROL_FOLDER / f"decision-{number:06d}.json"


def _write(path: Path, record: Record) -> None:
    """Whole, under its name, but not synced: commands are of no use after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(record.model_dump_json() + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise RunError(f"{one_line(path, 200)} cannot be written: {os_reason(error)}") from error


def _read(path: Path, kind: type[_Read]) -> _Read | None:
    try:
        return kind.model_validate(read_json(path, path.name))
    except (RunError, pydantic.ValidationError, RecursionError):
        return None

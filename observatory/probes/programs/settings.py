"""What ``observatory run`` and the processes under it exchange: one file of settings, one note per watch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from observatory.probes.options import StepOptions
from observatory.probes.programs.words import ProgramCode
from observatory.reasons import Reason

#: Environment variable that holds the path of the settings.
SETTINGS = "OBSERVATORY_PROGRAM"
#: Environment variable that names the run directory of a vLLM server which ``observatory run`` did not start.
VLLM = "OBSERVATORY_VLLM"
_MOST_NOTES = 4096
_LONGEST_NOTE = 100_000


class ProgramSettings(BaseModel):
    """How the models of a program are watched.

    Attributes:
        out: run directory of the first model; those of further ones are numbered.
        run_id: start of the ids of the runs, the same for all ranks.
        power: as `PowerOptions.power`.
        exchanges: as `ExchangeOptions.exchanges`.
        first_step: steps before it are not captured.
        end_step: steps from it on are not captured; None: all are.
        every: of the steps from the first on, one in so many is captured.
        most_s: the capture ends so many seconds after its first step; None: no limit.
        budget: as `StepOptions.budget`.
        stopped: nothing is captured before a command starts it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    out: Path
    run_id: str = Field(min_length=1, max_length=64)
    power: bool | None = None
    exchanges: bool | None = None
    first_step: int = Field(default=0, ge=0)
    end_step: int | None = Field(default=None, ge=1)
    every: int = Field(default=1, ge=1)
    most_s: float | None = Field(default=None, gt=0)
    budget: float | None = Field(default=None, gt=0)
    stopped: bool = False

    @property
    def steps(self) -> StepOptions:
        """Which steps are captured; commands are taken."""
        return StepOptions(
            first=self.first_step,
            end=self.end_step,
            every=self.every,
            most_s=self.most_s,
            budget=self.budget,
            stopped=self.stopped,
            listens=True,
        )

    @classmethod
    def read(cls) -> Self:
        """Those that the environment points to.

        Raises:
            OSError: the file cannot be read.
            ValidationError: it is damaged.
        """
        return cls.model_validate_json(Path(os.environ[SETTINGS]).read_bytes())

    @classmethod
    def of_engine(cls, run_id: str) -> Self:
        """Those of ``observatory run``, or else of the engine's own variable.

        Args:
            run_id: start of the ids of the runs, where ``observatory run`` gives none.

        Raises:
            OSError: the file cannot be read.
            ValidationError: it is damaged.
        """
        return cls.read() if os.environ.get(SETTINGS) else cls(out=Path(os.environ[VLLM]), run_id=run_id)


class Note(BaseModel):
    """What became of one model of one process.

    Attributes:
        run: run directory that it was captured to; None where it was not.
        rank: rank of the process.
        reason: why it was not captured, or not to its end.
    """

    run: str | None = None
    rank: int = 0
    reason: dict[str, JsonValue] | None = None

    def write(self, name: str) -> None:
        """Leave the note for ``observatory run``; where that is not possible it is lost."""
        if not os.environ.get(SETTINGS):
            return
        try:
            folder = Path(os.environ[SETTINGS]).parent
            (folder / f"note-{os.getpid()}-{name}.json").write_text(self.model_dump_json())
        except OSError:
            pass

    @property
    def cause(self) -> Reason | None:
        """The reason, as other rooms take it."""
        if self.reason is None:
            return None
        values = dict(self.reason)
        return Reason(ProgramCode(str(values.pop("code"))), values)


def read_notes(folder: Path) -> Iterator[Note]:
    """The notes of all processes; what is no note is passed over."""
    for path in sorted(folder.glob("note-*.json"))[:_MOST_NOTES]:
        try:
            if path.stat().st_size <= _LONGEST_NOTE:
                note = Note.model_validate(json.loads(path.read_text(encoding="utf-8")))
                assert note.cause is None or note.cause.code
                yield note
        except (OSError, ValueError, KeyError, ValidationError):
            continue

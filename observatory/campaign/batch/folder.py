"""A campaign's directory: what was submitted, and what became of it. The folders are the truth.

    campaign.json          the campaign, the site and all points, as submitted last
    jobs/<job>.json        one file for each submitted job: its points, in the order of its elements
    scripts/<name>.sh      what was submitted
    logs/<job>.log         what jobs wrote
    points/<point>/command what each rank of a point runs
    points/<point>/try-N/  attempt N: `job`, `out/` (what it wrote), `ended` (missing while it runs)
    points/<point>/result/ the attempt that succeeded, renamed; a point that has it is never run again

Nothing here locks: an attempt is claimed by making its folder, and results appear by renaming.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from observatory.campaign.batch.campaign_file import CampaignFile, Point
from observatory.campaign.run_folders import is_complete, is_whole
from observatory.errors import BatchError, BenchmarkError
from observatory.hpc.site import Site
from observatory.run.bounded import MAX_DOCUMENT_BYTES, first_problem, parse_json, read_at_most
from observatory.run.documents.bench import load_bench
from observatory.run.documents.printed import printed_document
from observatory.run.documents.writing import write_json

_MOST_STATE_BYTES = 4096
_MOST_JOBS = 10_000
_MOST_ATTEMPTS = 1000
_TAIL_BYTES = 16 << 10
_JOB = re.compile(r"[A-Za-z0-9][A-Za-z0-9._\[\]-]{0,99}", re.ASCII)
_ENDED = re.compile(r"([a-z][a-z-]{0,31}) (-?\d{1,6})", re.ASCII)
_EXIT_OF_RANK = re.compile(r"srun: error: \S+: tasks? [0-9,-]+: Exited with exit code")
COLLECT = "collect"


class PointStatus(StrEnum):
    """Where a point stands."""

    DONE = "done"
    #: It has a result that cannot be read, or that is not complete.
    DAMAGED = "damaged"
    RUNNING = "running"
    QUEUED = "queued"
    FAILED = "failed"
    #: Its wall time ended first.
    OUT_OF_TIME = "out-of-time"
    #: Cancelled or preempted.
    TERMINATED = "terminated"
    #: Its job is gone without a word: killed, or its node died.
    LOST = "lost"
    #: It was started, and no scheduler says whether it still runs.
    STARTED = "started"
    #: It was not started, and no scheduler says whether it is in the queue.
    UNKNOWN = "unknown"
    #: It was never started, and is not in the queue.
    MISSING = "missing"


#: A point that waits or runs; everything else that is not done can be submitted again.
ACTIVE = (PointStatus.RUNNING, PointStatus.QUEUED)


class SubmittedJob(BaseModel):
    """A job that was submitted.

    Attributes:
        job_id: of the array, or of the job.
        name: of its script.
        points: names of its points, by element; empty for a job without.
        submitted_unix_s: when.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    job_id: Annotated[str, Field(pattern=_JOB.pattern)]
    name: Annotated[str, Field(max_length=255)]
    points: Annotated[tuple[str, ...], Field(max_length=65536)] = ()
    submitted_unix_s: Annotated[float, Field(ge=0)]

    def elements(self) -> Iterable[tuple[str, str]]:
        """Job id of each element, and its point."""
        return ((f"{self.job_id}_{index}", point) for index, point in enumerate(self.points))


class SavedCampaign(BaseModel):
    """A campaign as it was submitted last."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    name: Annotated[str, Field(max_length=48)]
    submitted_unix_s: Annotated[float, Field(ge=0)]
    campaign: CampaignFile
    site: Site
    points: Annotated[tuple[Point, ...], Field(max_length=20_001)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One attempt at a point.

    Attributes:
        folder: its directory.
        number: counted from 1; None of the one that succeeded.
        job: job that made it; None where it does not say.
        began_unix_s: when it began, by the clock of the file system.
        ended: how it ended, such as ``failed``; None while it runs, or where it died.
        exit_code: of its command; None where ``ended`` is.
    """

    folder: Path
    number: int | None
    job: str | None
    began_unix_s: float
    ended: str | None
    exit_code: int | None

    @property
    def out(self) -> Path:
        """What its command wrote."""
        return self.folder / "out"


@dataclass(frozen=True, slots=True)
class CampaignFolder:
    """The directory of a campaign; see the module for what is in it."""

    path: Path

    def script(self, name: str) -> Path:
        """The batch script of a name."""
        return self.path / "scripts" / f"{name}.sh"

    def point(self, name: str) -> Path:
        """The folder of a point."""
        return self.path / "points" / name

    def log(self, job: str) -> Path:
        """What a job, or an element of an array, wrote."""
        return self.path / "logs" / f"{job}.log"

    def load(self) -> SavedCampaign:
        """The campaign.

        Raises:
            BatchError: the directory holds none, or its ``campaign.json`` is damaged.
        """
        path = self.path / "campaign.json"
        try:
            content = read_at_most(path, MAX_DOCUMENT_BYTES)
            return SavedCampaign.model_validate(parse_json(content or b""))
        except (FileNotFoundError, NotADirectoryError):
            raise BatchError(
                f"{self.path} holds no campaign",
                expected="a directory that `observatory submit` made",
                remedy="submit a campaign first",
            ) from None
        except (OSError, ValueError) as error:
            problem = first_problem(error)
        raise BatchError(
            f"{path} is damaged ({problem})", remedy="submit the campaign again: finished points are kept"
        )

    def save(self, name: str, campaign: CampaignFile, site: Site, points: Iterable[Point]) -> None:
        """Write ``campaign.json``."""
        document: dict[str, Any] = {
            "name": name,
            "submitted_unix_s": time.time(),
            "campaign": campaign.model_dump(mode="json"),
            "site": site.model_dump(mode="json"),
            "points": [point.model_dump(mode="json") for point in points],
        }
        write_json(self.path / "campaign.json", printed_document("campaign", document))

    def jobs(self) -> list[SubmittedJob]:
        """Submitted jobs, the first ones first; files that are none are left out."""
        found = []
        try:
            paths = sorted((self.path / "jobs").glob("*.json"))[:_MOST_JOBS]
        except OSError:
            return []
        for path in paths:
            try:
                content = read_at_most(path, MAX_DOCUMENT_BYTES)
                found.append(SubmittedJob.model_validate(parse_json(content or b"")))
            except (OSError, ValueError):
                continue
        return sorted(found, key=lambda job: job.submitted_unix_s)

    def add_job(self, job: SubmittedJob) -> None:
        """Remember a job."""
        write_json(self.path / "jobs" / f"{job.job_id}.json", job.model_dump(mode="json"))

    def attempts(self, point: str) -> list[Attempt]:
        """Attempts at a point in order; one that succeeded stands at the end."""
        folder = self.point(point)
        found = []
        for number in range(1, _MOST_ATTEMPTS):
            if not (folder / f"try-{number}").is_dir():
                break
            found.append(_attempt(folder / f"try-{number}", number))
        if (folder / "result").is_dir():
            found.append(_attempt(folder / "result", None))
        return found

    def last_lines(self, job: str, count: int = 3) -> list[str]:
        """The last lines that a job wrote, without those in which srun counts exit codes of ranks."""
        try:
            with self.log(job).open("rb") as handle:
                handle.seek(0, 2)
                handle.seek(max(0, handle.tell() - _TAIL_BYTES))
                text = handle.read(_TAIL_BYTES).decode("utf-8", "replace")
        except OSError:
            return []
        lines = ("".join(c if c.isprintable() else " " for c in line).strip() for line in text.splitlines())
        return [line[:500] for line in lines if line and _EXIT_OF_RANK.match(line) is None][-count:]


def result_status(point: Point, attempt: Attempt, *, is_thorough: bool) -> PointStatus:
    """Whether the result of a point is one.

    Args:
        point: the point.
        attempt: the one that succeeded.
        is_thorough: whether to look into the tables of its run, not only for whether it was closed in order.
    """
    run = attempt.out / "run"
    is_valid = attempt.out.is_dir()
    if point.kind == "profile":
        is_valid = is_complete(run) and not (is_thorough and not is_whole(run))
    elif point.kind == "fabric":
        is_valid = _is_benchmark(attempt.out / "bench.json")
    return PointStatus.DONE if is_valid else PointStatus.DAMAGED


def _is_benchmark(path: Path) -> bool:
    try:
        load_bench(path)
    except BenchmarkError:
        return False
    return True


def _attempt(folder: Path, number: int | None) -> Attempt:
    job = _word(folder / "job")
    began_unix_s = 0.0
    for path in (folder / "job", folder):
        with contextlib.suppress(OSError):
            began_unix_s = path.stat().st_mtime
            break
    match = _ENDED.fullmatch(_word(folder / "ended"))
    return Attempt(
        folder=folder,
        number=number,
        job=job if _JOB.fullmatch(job) else None,
        began_unix_s=began_unix_s,
        ended=match[1] if match else None,
        exit_code=int(match[2]) if match else None,
    )


def _word(path: Path) -> str:
    try:
        return (read_at_most(path, _MOST_STATE_BYTES) or b"").decode("utf-8", "replace").strip()
    except OSError:
        return ""


def elements_of(jobs: Iterable[SubmittedJob]) -> dict[str, list[str]]:
    """Job ids of the elements of each point, the latest last."""
    found: dict[str, list[str]] = {}
    for job in jobs:
        for element, point in job.elements():
            found.setdefault(point, []).append(element)
    return found

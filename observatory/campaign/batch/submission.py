"""Submitting a campaign: what is not done and not queued becomes arrays of batch jobs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from observatory.campaign.batch.campaign_file import CampaignFile, Point, campaign_points
from observatory.campaign.batch.folder import (
    ACTIVE,
    COLLECT,
    CampaignFolder,
    PointStatus,
    SubmittedJob,
)
from observatory.campaign.batch.state import CampaignState, PointState, campaign_state
from observatory.campaign.preflight import check_job
from observatory.errors import BatchError
from observatory.hpc import slurm
from observatory.hpc.scripts import JobScript, command_script, job_script
from observatory.hpc.site import Site
from observatory.run.documents.writing import write_text

Only = Literal["failed", "missing"]
_FAILED = (PointStatus.FAILED, PointStatus.OUT_OF_TIME, PointStatus.TERMINATED, PointStatus.LOST)
_MISSING = (PointStatus.MISSING, PointStatus.DAMAGED)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedJob:
    """A job that is to be submitted.

    Attributes:
        name: of its script.
        points: its points, by element; empty for the one that collects.
        text: its script.
        waits: which jobs have to end first: none, the ``fabric``'s, or ``all``.
    """

    name: str
    points: tuple[Point, ...]
    text: str
    waits: Literal["none", "fabric", "all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What is to be submitted, and what is not.

    Attributes:
        folder: the campaign's directory.
        name: of the campaign.
        points: all points.
        jobs: jobs to submit, in order.
        kept: points that are done.
        active: points that wait or run.
        left: points that ``--only`` leaves out.
        added, dropped: points that the campaign gained and lost since it was submitted last; they are None
            where it never was.
    """

    folder: CampaignFolder
    name: str
    campaign: CampaignFile
    site: Site
    points: tuple[Point, ...]
    jobs: tuple[PlannedJob, ...]
    kept: int
    active: int
    left: int
    added: int | None
    dropped: int | None


def plan_submission(
    campaign: CampaignFile,
    site: Site,
    folder: CampaignFolder,
    *,
    name: str,
    only: Only | None = None,
    array_limit: int | None = None,
) -> Submission:
    """Decide what is submitted; nothing is written.

    Args:
        campaign: the campaign.
        site: where it runs.
        folder: its directory, which may hold an earlier submission.
        name: of the campaign where its file states none.
        only: of what is not done, only what ``failed`` or was never run (``missing``).
        array_limit: elements of an array that run at once; None: as the site has it.

    Raises:
        BatchError: something else is in the place of the directory, a point cannot run at this site, or the
            scheduler does not answer although jobs were submitted.
    """
    name = campaign.name or name
    points = campaign_points(campaign)
    before = _submitted_before(folder)
    states = {} if before is None else {state.point.name: state for state in before.points}
    fresh = [point for point in points if point.name not in states]
    again = [states[point.name] for point in points if point.name in states]
    chosen = {point.name for point in fresh} if only != "failed" else set()
    chosen |= {state.point.name for state in again if _is_chosen(state, only)}
    wanted = [point for point in points if point.name in chosen]
    if site.container is None:
        _check(wanted)
    limit = array_limit if array_limit is not None else site.batch.array_limit
    jobs = tuple(_planned(campaign, site, folder, name, wanted, array_limit=limit))
    return Submission(
        folder=folder,
        name=name,
        campaign=campaign,
        site=site,
        points=points,
        jobs=jobs,
        kept=sum(state.status is PointStatus.DONE for state in again),
        active=sum(state.status in ACTIVE for state in again),
        left=len(points) - len(wanted) - sum(state.status in (PointStatus.DONE, *ACTIVE) for state in again),
        added=None if before is None else len(fresh),
        dropped=None if before is None else len(set(states) - {point.name for point in points}),
    )


def submit(submission: Submission, *, submitted: Callable[[PlannedJob, str], None]) -> list[str]:
    """Write the campaign's directory and submit its jobs.

    Args:
        submission: what to submit.
        submitted: called with each job and its id, as soon as it is in the queue.

    Returns:
        Ids of the jobs.

    Raises:
        BatchError: the directory cannot be written, or the scheduler refuses a job; those before it stay.
    """
    folder, site = submission.folder, submission.site
    _write(submission)
    if site.scheduler != "slurm":
        return []
    ids: list[str] = []
    fabric: list[str] = []
    for job in submission.jobs:
        after = {"none": [], "fabric": fabric, "all": ids}[job.waits]
        job_id = slurm.submit(folder.script(job.name), after=after)
        folder.add_job(
            SubmittedJob(
                job_id=job_id,
                name=job.name,
                points=tuple(point.name for point in job.points),
                submitted_unix_s=time.time(),
            )
        )
        ids.append(job_id)
        if any(point.kind == "fabric" for point in job.points):
            fabric.append(job_id)
        submitted(job, job_id)
    return ids


def _submitted_before(folder: CampaignFolder) -> CampaignState | None:
    """The state of an earlier submission; None where there is none.

    Raises:
        BatchError: something else is in the place of the directory, or nothing is known of what runs.
    """
    path = folder.path
    if path.exists() and not path.is_dir():
        raise BatchError(f"{path} is a file", remedy="name a directory for the campaign with --out")
    if not (path / "campaign.json").exists():
        if path.is_dir() and any(path.iterdir()) and not (path / "points").is_dir():
            raise BatchError(
                f"{path} is not empty and holds no campaign", remedy="name another directory with --out"
            )
        return None
    state = campaign_state(folder)
    if state.saved.site.scheduler == "slurm" and state.jobs and state.queue.source is None:
        raise BatchError(
            f"what already runs of this campaign is not known: {state.queue.problem}",
            remedy="run it again when the scheduler answers",
        )
    return state


def _is_chosen(state: PointState, only: Only | None) -> bool:
    if only == "failed":
        return state.status in _FAILED
    if only == "missing":
        return state.status in _MISSING
    return state.status in (*_FAILED, *_MISSING)


def _check(points: Sequence[Point]) -> None:
    """Refuse profiles that cannot be, where their model is seen from here; libraries may be missing here."""
    from importlib.util import find_spec

    if find_spec("torch") is None or find_spec("transformers") is None:
        return
    seen = set()
    for point in points:
        if point.job is not None and (point.model, point.data, point.ranks) not in seen:
            seen.add((point.model, point.data, point.ranks))
            check_job(point.job)


def _planned(
    campaign: CampaignFile,
    site: Site,
    folder: CampaignFolder,
    name: str,
    points: Sequence[Point],
    *,
    array_limit: int | None,
) -> Iterable[PlannedJob]:
    groups: dict[tuple[object, ...], list[Point]] = {}
    for point in points:
        key = (point.kind == "fabric", point.ranks, point.clock_mhz, point.resumes, point.measures_power)
        groups.setdefault(key, []).append(point)
    time_limit = campaign.time or site.batch.time
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    numbers = iter(range(1, 1 << 30))
    for members in groups.values():
        first = members[0]
        for start in range(0, len(members), site.batch.max_array):
            part = tuple(members[start : start + site.batch.max_array])
            script = f"{name}-{first.kind}-{next(numbers)}-{stamp}"
            text = job_script(
                site,
                JobScript(
                    name=f"{name}-{first.kind}",
                    folder=folder.path,
                    points=tuple(point.name for point in part),
                    tasks=first.ranks,
                    time=time_limit,
                    exclusive=site.node.exclusive == "always"
                    or (site.node.exclusive == "power" and first.measures_power),
                    clock_mhz=first.clock_mhz,
                    resumes=first.resumes,
                    array_limit=array_limit,
                ),
            )
            yield PlannedJob(
                name=script, points=part, text=text, waits="none" if first.kind == "fabric" else "fabric"
            )
    if points and campaign.report:
        argv = ("observatory", "collect", str(folder.path), "--report", str(folder.path / "report.html"))
        text = job_script(
            site, JobScript(name=f"{name}-{COLLECT}", folder=folder.path, command=argv, time=time_limit)
        )
        yield PlannedJob(name=f"{name}-{COLLECT}-{stamp}", points=(), text=text, waits="all")


def _write(submission: Submission) -> None:
    folder, site = submission.folder, submission.site
    try:
        for part in ("jobs", "scripts", "logs", "points"):
            (folder.path / part).mkdir(parents=True, exist_ok=True)
        for job in submission.jobs:
            for point in job.points:
                place = folder.point(point.name)
                place.mkdir(exist_ok=True)
                if (place / "result").is_dir():  # damaged, or it would not be submitted
                    (place / "result").rename(place / f"damaged-{time.time_ns()}")
                text = command_script(site, point.argv, folder.path, about=point.about)
                write_text(place / "command", text)
            write_text(folder.script(job.name), job.text)
        folder.save(submission.name, submission.campaign, site, submission.points)
    except OSError as error:
        raise BatchError(
            f"the campaign's directory {folder.path} cannot be written ({error.strerror})",
            remedy="make room, or choose another --out",
        ) from error


def default_folder(campaign_path: Path, out: Path | None) -> CampaignFolder:
    """Where a campaign lives: ``--out``, else a folder of the file's name next to it."""
    path = campaign_path.with_suffix("") if out is None else out
    if out is None and path == campaign_path:
        path = campaign_path.with_name(f"{campaign_path.name}-campaign")
    return CampaignFolder(path.resolve())

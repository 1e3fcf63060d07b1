"""Submitting a campaign: what is not done and not queued becomes arrays of batch jobs."""

from __future__ import annotations

import secrets
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
    result_status,
)
from observatory.campaign.batch.state import PointState, active_jobs, points_state
from observatory.campaign.naming import slug
from observatory.campaign.preflight import check_job
from observatory.errors import BatchError
from observatory.hpc import slurm
from observatory.hpc.scripts import JobScript, command_script, job_script
from observatory.hpc.site import Site
from observatory.run.documents.writing import write_text

Only = Literal["failed", "missing"]
_FAILED = (PointStatus.FAILED, PointStatus.OUT_OF_TIME, PointStatus.TERMINATED, PointStatus.LOST)
#: Where no scheduler is asked, points that are unknown; where it does not answer, nothing is submitted.
_MISSING = (PointStatus.MISSING, PointStatus.DAMAGED, PointStatus.UNKNOWN)


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
        queued: jobs of earlier submissions that wait or run.
        queued_fabric: those of them that measure the network.
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
    queued: tuple[str, ...]
    queued_fabric: tuple[str, ...]


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
    name = campaign.name or slug(name)
    points = campaign_points(campaign)
    before = _names_before(folder)
    jobs_before, queue, states = points_state(folder, site, campaign, points, is_thorough=True)
    if site.scheduler == "slurm" and queue.problem is not None:
        raise BatchError(
            f"what already runs of this campaign is not known: {queue.problem}",
            remedy="run it again when the scheduler answers",
        )
    queued = active_jobs(queue)
    active = [job for job in jobs_before if job.job_id in queued]
    wanted = [state.point for state in states if _is_chosen(state, only)]
    if site.container is None:
        _check(wanted)
    limit = array_limit if array_limit is not None else site.batch.array_limit
    jobs = [*_planned(campaign, site, folder, name, wanted, array_limit=limit)]
    is_collected = any(not job.points for job in active)
    if campaign.report and (wanted or (active and not is_collected)):
        jobs.append(_collecting(campaign, site, folder, name))
    fabric = {point.name for point in points if point.kind == "fabric"}
    return Submission(
        folder=folder,
        name=name,
        campaign=campaign,
        site=site,
        points=points,
        jobs=tuple(jobs),
        kept=sum(state.status is PointStatus.DONE for state in states),
        active=sum(state.status in ACTIVE for state in states),
        left=sum(state.status not in (PointStatus.DONE, *ACTIVE) for state in states) - len(wanted),
        added=None if before is None else len({point.name for point in points} - before),
        dropped=None if before is None else len(before - {point.name for point in points}),
        queued=tuple(queued),
        queued_fabric=tuple(job.job_id for job in active if fabric.intersection(job.points)),
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
    fabric = list(submission.queued_fabric)
    for job in submission.jobs:
        after = {"none": [], "fabric": fabric, "all": [*submission.queued, *ids]}[job.waits]
        job_id = slurm.submit(folder.script(job.name), after=after)
        record = SubmittedJob(
            job_id=job_id,
            name=job.name,
            points=tuple(point.name for point in job.points),
            submitted_unix_s=time.time(),
        )
        try:
            folder.add_job(record)
        except OSError as error:
            raise BatchError(
                f"job {job_id} is in the queue, but {folder.path / 'jobs'} cannot be written "
                f"({error.strerror})",
                remedy=f"cancel it with scancel {job_id}, make room, and run the same command again",
            ) from error
        ids.append(job_id)
        if any(point.kind == "fabric" for point in job.points):
            fabric.append(job_id)
        submitted(job, job_id)
    return ids


def _names_before(folder: CampaignFolder) -> set[str] | None:
    """Points of the campaign as it was submitted last; None where it never was, or its record is damaged.

    Raises:
        BatchError: something else is in the place of the directory.
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
    try:
        return {point.name for point in folder.load().points}
    except BatchError:  # it is written anew; results and jobs are in files of their own
        return None


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
    stamp = _stamp()
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


def _collecting(campaign: CampaignFile, site: Site, folder: CampaignFolder, name: str) -> PlannedJob:
    """The job at the end, which writes the summary and the report."""
    argv = ("observatory", "collect", str(folder.path), "--report", str(folder.path / "report.html"))
    script = JobScript(
        name=f"{name}-{COLLECT}", folder=folder.path, command=argv, time=campaign.time or site.batch.time
    )
    text = job_script(site, script)
    return PlannedJob(name=f"{name}-{COLLECT}-{_stamp()}", points=(), text=text, waits="all")


def _stamp() -> str:
    """Distinguishes the scripts of a submission, also from those of another at the same time."""
    return f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"


def _write(submission: Submission) -> None:
    folder, site = submission.folder, submission.site
    try:
        for part in ("jobs", "scripts", "logs", "points"):
            (folder.path / part).mkdir(parents=True, exist_ok=True)
        for job in submission.jobs:
            for point in job.points:
                place = folder.point(point.name)
                place.mkdir(exist_ok=True)
                attempts = folder.attempts(point.name)
                # Looked at again: an earlier job may have brought the result since.
                if (
                    attempts
                    and attempts[-1].number is None
                    and result_status(point, attempts[-1], is_thorough=True) is PointStatus.DAMAGED
                ):
                    attempts[-1].folder.rename(place / f"damaged-{time.time_ns()}")
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

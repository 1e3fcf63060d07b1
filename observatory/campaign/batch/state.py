"""Where a campaign stands: its folders first, one question to the scheduler for what they cannot know."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from observatory.campaign.batch.campaign_file import CampaignFile, Point
from observatory.campaign.batch.folder import (
    Attempt,
    CampaignFolder,
    PointStatus,
    SavedCampaign,
    SubmittedJob,
    elements_of,
    result_status,
)
from observatory.campaign.run_folders import find_runs
from observatory.hpc import slurm
from observatory.hpc.scripts import seconds
from observatory.hpc.site import Site
from observatory.hpc.slurm import JobState, QueueAnswer
from observatory.run.documents.printed import printed_document

_ENDINGS = {
    "failed": PointStatus.FAILED,
    "out-of-time": PointStatus.OUT_OF_TIME,
    "terminated": PointStatus.TERMINATED,
}
#: How the scheduler names the end of a job that could not say itself how it ended.
_SCHEDULER_ENDINGS = {
    "TIMEOUT": PointStatus.OUT_OF_TIME,
    "DEADLINE": PointStatus.OUT_OF_TIME,
    "CANCELLED": PointStatus.TERMINATED,
    "PREEMPTED": PointStatus.TERMINATED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PointState:
    """Where a point stands.

    Attributes:
        point: the point.
        status: where it stands.
        attempts: attempts at it, the last one last.
        job: the job that this is about; None where it was never submitted.
        scheduled: what the scheduler reports of that job; None where it does not know it.
    """

    point: Point
    status: PointStatus
    attempts: tuple[Attempt, ...]
    job: str | None
    scheduled: JobState | None

    @property
    def exit_code(self) -> int | None:
        """Of the command of the last attempt; else of its job."""
        if self.attempts and self.attempts[-1].exit_code is not None:
            return self.attempts[-1].exit_code
        return None if self.scheduled is None else self.scheduled.exit_code


@dataclass(frozen=True, slots=True, kw_only=True)
class CampaignState:
    """Where a campaign stands.

    Attributes:
        folder: its directory.
        saved: what was submitted.
        jobs: submitted jobs.
        queue: the scheduler's answer.
        points: its points, in order.
        further: points of earlier submissions that the campaign no longer has; they are kept.
    """

    folder: CampaignFolder
    saved: SavedCampaign
    jobs: tuple[SubmittedJob, ...]
    queue: QueueAnswer
    points: tuple[PointState, ...]
    further: int

    @property
    def counts(self) -> Mapping[PointStatus, int]:
        """Points by status."""
        return Counter(state.status for state in self.points)

    def of(self, *statuses: PointStatus) -> list[PointState]:
        """Points of these statuses."""
        return [state for state in self.points if state.status in statuses]

    @property
    def runs(self) -> Mapping[str, Sequence[Path]]:
        """Run directories of points that are done, by point: of profiles, and what commands have made."""
        found = {}
        for state in self.of(PointStatus.DONE):
            out = state.attempts[-1].out
            if state.point.kind == "profile":
                found[state.point.name] = [out / "run"]
            elif state.point.kind == "command" and (runs := find_runs(out)):
                found[state.point.name] = runs
        return found

    @property
    def is_unanswered(self) -> bool:
        """Whether a scheduler was asked and did not answer in full."""
        return self.saved.site.scheduler == "slurm" and self.queue.problem is not None


def active_jobs(queue: QueueAnswer) -> list[str]:
    """Ids of jobs that wait or run, also of those that were submitted by hand and run a point."""
    active = (name.partition("_")[0] for name, state in queue.states.items() if state.active)
    return [*dict.fromkeys(active)]


def campaign_state(folder: CampaignFolder) -> CampaignState:
    """Read the folders, and ask the scheduler once.

    Raises:
        BatchError: the directory holds no campaign.
    """
    saved = folder.load()
    jobs, queue, points = points_state(folder, saved.site, saved.campaign, saved.points)
    names = {point.name for point in saved.points}
    further = sum(1 for name in elements_of(jobs) if name not in names)
    return CampaignState(folder=folder, saved=saved, jobs=jobs, queue=queue, points=points, further=further)


def points_state(
    folder: CampaignFolder,
    site: Site,
    campaign: CampaignFile,
    points: Sequence[Point],
    *,
    is_thorough: bool = False,
) -> tuple[tuple[SubmittedJob, ...], QueueAnswer, tuple[PointState, ...]]:
    """The submitted jobs, the scheduler's answer about them, and where these points stand.

    ``is_thorough``: whether to look into the tables of finished runs.
    """
    jobs = tuple(folder.jobs())
    # Read before the question: a job that ends in between is then found in the folders next time.
    attempts = {point.name: folder.attempts(point.name) for point in points}
    is_asked = site.scheduler == "slurm"
    elements = elements_of(jobs)
    for name, found in attempts.items():  # a job that was submitted by hand is known by the attempt it made
        last = found[-1] if found else None
        if last is not None and last.number is not None and last.job is not None:
            elements.setdefault(name, [])
            elements[name] += [] if last.job in elements[name] else [last.job]
    ids = dict.fromkeys(job.job_id for job in jobs)
    ids |= dict.fromkeys(job.partition("_")[0] for names in elements.values() for job in names)
    queue = slurm.ask([*ids]) if is_asked else _NO_QUESTION
    # Where no scheduler is asked, an attempt that is older than its wall time has ended.
    gone_before = None if is_asked else time.time() - seconds(campaign.time or site.batch.time) - _END_S
    states = [
        _state(
            point,
            attempts[point.name],
            elements.get(point.name, []),
            queue,
            gone_before,
            is_thorough=is_thorough,
        )
        for point in points
    ]
    return jobs, queue, tuple(states)


_NO_QUESTION = QueueAnswer(source=None, states={}, problem="only Slurm is asked")
#: What a job takes to end once its wall time is over, and what clocks of machines differ by, at most.
_END_S = 900.0


def _state(
    point: Point,
    attempts: Sequence[Attempt],
    elements: Sequence[str],
    queue: QueueAnswer,
    gone_before_unix_s: float | None,
    *,
    is_thorough: bool,
) -> PointState:
    """Where a point stands.

    Args:
        point: the point.
        attempts: at it.
        elements: jobs that were submitted for it, the latest last.
        queue: what the scheduler reports.
        gone_before_unix_s: attempts that began earlier have ended; None where the scheduler is asked.
        is_thorough: whether to look into the tables of a finished run.
    """

    def state(status: PointStatus, job: str | None) -> PointState:
        scheduled = None if job is None else queue.states.get(job)
        return PointState(point=point, status=status, attempts=tuple(attempts), job=job, scheduled=scheduled)

    last = attempts[-1] if attempts else None
    if last is not None and last.number is None:
        return state(result_status(point, last, is_thorough=is_thorough), last.job)
    active = [name for name in elements if name in queue.states and queue.states[name].active]
    if last is not None and last.ended is None:
        known = None if last.job is None else queue.states.get(last.job)
        if known is not None and known.active:
            return state(PointStatus.QUEUED if known.waits else PointStatus.RUNNING, last.job)
        if active:
            return state(PointStatus.QUEUED, active[-1])
        if known is None and queue.problem is not None:
            is_gone = gone_before_unix_s is not None and last.began_unix_s < gone_before_unix_s
            return state(PointStatus.LOST if is_gone else PointStatus.STARTED, last.job)
        named = None if known is None else _SCHEDULER_ENDINGS.get(known.state)
        return state(named or PointStatus.LOST, last.job)
    if active:
        return state(PointStatus.QUEUED, active[-1])
    later = _later(elements, last)
    waits = later[-1] not in queue.states if later else last is None and gone_before_unix_s is not None
    if waits and queue.problem is not None:
        return state(PointStatus.UNKNOWN, later[-1] if later else None)
    if last is not None:
        status = _ENDINGS.get(last.ended or "", PointStatus.FAILED)
        known = None if last.job is None else queue.states.get(last.job)
        if status is PointStatus.TERMINATED and known is not None:  # a script cannot know by whom it is ended
            status = _SCHEDULER_ENDINGS.get(known.state, status)
        return state(status, last.job)
    ended = elements[-1] if elements else None
    known = None if ended is None else queue.states.get(ended)
    if known is None or known.state == "COMPLETED":
        return state(PointStatus.MISSING, ended)
    return state(_SCHEDULER_ENDINGS.get(known.state, PointStatus.FAILED), ended)


def _later(elements: Sequence[str], last: Attempt | None) -> Sequence[str]:
    """Jobs that were submitted for a point after the one that made its last attempt."""
    if last is None or last.job is None:
        return elements
    return elements[elements.index(last.job) + 1 :]


def state_document(state: CampaignState) -> dict[str, Any]:
    """The state for ``--json``."""
    site = state.saved.site
    active = set(active_jobs(state.queue))
    return printed_document(
        "jobs",
        {
            "campaign": state.saved.name,
            "scheduler": site.scheduler,
            "directory": str(state.folder.path),
            "source": state.queue.source,
            "problem": state.queue.problem,
            "counts": {status.value: count for status, count in state.counts.items()},
            "no_longer_part": state.further,
            "jobs": [
                {
                    "job_id": job.job_id,
                    "name": job.name,
                    "points": len(job.points),
                    "submitted_unix_s": job.submitted_unix_s,
                    "active": job.job_id in active,
                    "monitor": site.monitor_link(job.job_id),
                }
                for job in state.jobs
            ],
            "points": [
                {
                    "name": each.point.name,
                    "about": each.point.about,
                    "kind": each.point.kind,
                    "state": each.status.value,
                    "attempts": len(each.attempts),
                    "job": each.job,
                    "scheduler_state": None if each.scheduled is None else each.scheduled.state,
                    "waits_for": None if each.scheduled is None else each.scheduled.reason,
                    "nodes": None if each.scheduled is None else each.scheduled.nodes,
                    "exit_code": each.exit_code,
                    "log": None if each.job is None else str(state.folder.log(each.job)),
                    "last_lines": _failed_lines(state, each),
                }
                for each in state.points
            ],
        },
    )


def _failed_lines(state: CampaignState, each: PointState) -> list[str]:
    quiet = (PointStatus.DONE, PointStatus.QUEUED, PointStatus.MISSING, PointStatus.UNKNOWN)
    if each.job is None or each.status in quiet:
        return []
    return state.folder.last_lines(each.job)

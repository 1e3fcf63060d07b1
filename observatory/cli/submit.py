"""``observatory submit``: a campaign as batch jobs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from observatory.cli.options import OUTPUT

if TYPE_CHECKING:
    from observatory.campaign.batch.submission import Submission


class OnlyPoints(StrEnum):
    """Which points are submitted."""

    FAILED = "failed"
    MISSING = "missing"


def submit(
    campaign: Annotated[
        Path, typer.Argument(metavar="CAMPAIGN", help="Campaign file (TOML), see docs/hpc.md.")
    ],
    site: Annotated[
        Path, typer.Option("--site", metavar="TOML", help="Site file; `site init` writes one to edit.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            rich_help_panel=OUTPUT,
            help="The campaign's directory; by default next to the file, by its name.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the scripts; write and submit nothing.")
    ] = False,
    only: Annotated[
        OnlyPoints | None,
        typer.Option(help="Of what is not done: what failed, or what was never run."),
    ] = None,
    array_limit: Annotated[
        int | None, typer.Option(min=1, metavar="K", help="Elements of an array that run at once.")
    ] = None,
) -> None:
    """Submit what of a campaign is neither done nor queued, one array element for each point."""
    from observatory.campaign.batch.campaign_file import load_campaign
    from observatory.campaign.batch.submission import (
        PlannedJob,
        default_folder,
        plan_submission,
    )
    from observatory.campaign.batch.submission import (
        submit as submit_jobs,
    )
    from observatory.cli.output import print_lines, say
    from observatory.hpc.site import load_site

    folder = default_folder(campaign, out)
    submission = plan_submission(
        load_campaign(campaign),
        load_site(site),
        folder,
        name=campaign.stem,
        only=None if only is None else only.value,
        array_limit=array_limit,
    )
    if dry_run:
        for job in submission.jobs:
            print_lines([f"# scripts/{job.name}.sh", *job.text.splitlines(), ""])
        say(_summary(submission, "would be submitted"))
        return

    def submitted(job: PlannedJob, job_id: str) -> None:
        link = submission.site.monitor_link(job_id)
        count = f"{len(job.points)} points" if job.points else "collects the results"
        say(f"job {job_id}: {job.name}, {count}{'' if link is None else f', {link}'}")

    ids = submit_jobs(submission, submitted=submitted)
    say(_summary(submission, "submitted" if ids or not submission.jobs else "written"))
    if submission.jobs and not ids:
        command = {"pbs": "qsub", "lsf": "bsub <"}[submission.site.scheduler]
        say(f"{submission.site.scheduler} jobs are submitted by hand, in this order:")
        print_lines([f"{command} {folder.script(job.name)}" for job in submission.jobs])
        return
    say(f"next: observatory jobs {folder.path}")


def _summary(submission: Submission, what: str) -> str:
    points = sum(len(job.points) for job in submission.jobs)
    parts = [f"{points} of {len(submission.points)} points {what}"]
    if submission.kept:
        parts.append(f"{submission.kept} done already")
    if submission.active:
        parts.append(f"{submission.active} in the queue")
    if submission.left:
        parts.append(f"{submission.left} left out by --only")
    if submission.added:
        parts.append(f"{submission.added} new since the last submission")
    if submission.dropped:
        parts.append(f"{submission.dropped} no longer part of the campaign, their results are kept")
    return ", ".join(parts)

"""``observatory jobs`` and ``observatory cancel``: where a campaign stands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from observatory.cli.options import CsvOption, JsonOption, WideOption
from observatory.errors import WaitInterruptedError

if TYPE_CHECKING:
    from observatory.campaign.batch.state import CampaignState

CampaignArgument = Annotated[
    Path, typer.Argument(metavar="DIR", help="The campaign's directory, as `submit` printed it.")
]
#: Schedulers of shared machines are not asked more often.
_LEAST_PERIOD_S = 10.0


def jobs(
    directory: CampaignArgument,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until no point is queued or runs.")] = False,
    period_s: Annotated[
        float,
        typer.Option(
            "--period", min=_LEAST_PERIOD_S, metavar="SECONDS", help="With --wait: time between looks."
        ),
    ] = 30.0,
    csv: CsvOption = False,
    wide: WideOption = False,
    json: JsonOption = False,
) -> None:
    """Show where each point of a campaign stands; exit code 0 when all are done, 3 when some are not."""
    from observatory.campaign.batch.folder import CampaignFolder, PointStatus
    from observatory.campaign.batch.state import campaign_state, state_document
    from observatory.campaign.batch.words import jobs_sentences, jobs_table
    from observatory.cli.output import print_data, print_table, print_text

    folder = CampaignFolder(directory.resolve())
    state = campaign_state(folder)
    if wait:
        try:
            state = _waited(state, period_s)
        except KeyboardInterrupt:
            raise WaitInterruptedError(
                "waiting was interrupted, the jobs go on",
                remedy=f"end them with observatory cancel {directory}",
            ) from None
    document: dict[str, Any] = state_document(state)
    table = jobs_table(document)
    if not print_data(document, [table], json=json, csv=csv):
        print_table(table, wide=wide)
        print_text(["", *jobs_sentences(document)])
    if len(state.of(PointStatus.DONE)) < len(state.points):
        raise typer.Exit(3)


def _waited(state: CampaignState, period_s: float) -> CampaignState:
    """The state once no point waits or runs; changes are stated as they come, and a silent scheduler once."""
    import time

    from observatory.campaign.batch.folder import ACTIVE, PointStatus
    from observatory.campaign.batch.state import campaign_state
    from observatory.cli.output import say

    counts, is_unanswered = "", False
    while state.of(*ACTIVE, PointStatus.STARTED, PointStatus.UNKNOWN):
        if state.is_unanswered != is_unanswered:
            is_unanswered = state.is_unanswered
            say(f"waiting on: {state.queue.problem}" if is_unanswered else "the scheduler answers again")
        if _counts(state) != counts and not is_unanswered:
            counts = _counts(state)
            say(counts)
        time.sleep(period_s)
        state = campaign_state(state.folder)
    return state


def _counts(state: CampaignState) -> str:
    return ", ".join(f"{count} {status.value}" for status, count in sorted(state.counts.items()))


def cancel(directory: CampaignArgument) -> None:
    """Cancel the jobs of a campaign; what was captured stays, and can be submitted again."""
    from observatory.campaign.batch.collection import cancel_campaign
    from observatory.campaign.batch.folder import ACTIVE, CampaignFolder
    from observatory.cli.output import say

    cancelled, before = cancel_campaign(CampaignFolder(directory.resolve()))
    if not cancelled:
        say("no job of this campaign waits or runs")
        return
    say(f"{len(cancelled)} jobs cancelled, with {len(before.of(*ACTIVE))} points; finished points are kept")
    say(f"next: observatory jobs {directory}")

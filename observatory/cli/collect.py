"""``observatory collect``: what of a campaign is finished, as one summary and report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from observatory.cli.jobs import CampaignArgument
from observatory.cli.options import OUTPUT, CsvOption, JsonOption, TableOption, WideOption


def collect(
    directory: CampaignArgument,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", rich_help_panel=OUTPUT, help="Report to write, in the place of an earlier one."
        ),
    ] = None,
    csv: CsvOption = False,
    table: TableOption = None,
    wide: WideOption = False,
    json: JsonOption = False,
) -> None:
    """Join the finished points of a campaign and state its gaps; also while jobs still run."""
    from observatory.campaign.batch.collection import collect as collect_points
    from observatory.campaign.batch.collection import collection_document
    from observatory.campaign.batch.folder import CampaignFolder
    from observatory.campaign.batch.summary import condition_table
    from observatory.campaign.batch.words import collection_sentences, collection_table
    from observatory.cli.output import print_data, print_tables, print_text, say

    collected = collect_points(CampaignFolder(directory.resolve()), report=report)
    document = collection_document(collected)
    tables = [condition_table(document["conditions"]), collection_table(document)]
    if not print_data(document, tables, json=json, csv=csv, table=table):
        print_tables([shown for shown in tables if shown.rows], wide=wide)
        print_text(collection_sentences(document))
    if collected.report is not None:
        say(f"report written to {collected.report}")

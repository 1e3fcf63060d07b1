"""``observatory scan``: what another EP degree or placement would do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from observatory.cli.options import (
    OUTPUT,
    RANKS,
    CsvOption,
    GpusPerNodeOption,
    JsonOption,
    RowBytesOption,
    RunArgument,
    WideOption,
    parse_ep,
    parse_placement,
)

ScanEpOption = Annotated[
    str | None,
    typer.Option(
        "--ep",
        metavar="N,...",
        rich_help_panel=RANKS,
        help="EP degrees, separated by commas; by default those of 4, 8, 16, 32 that divide the experts.",
    ),
]

ScanPlacementOption = Annotated[
    list[str] | None,
    typer.Option(
        "--placement",
        metavar="NAME|FILE",
        rich_help_panel=RANKS,
        help="linear, round-robin, recorded, auto, or a placement file (JSON); repeat it to compare several.",
    ),
]


def scan(
    run: RunArgument,
    ep: ScanEpOption = None,
    gpus_per_node: GpusPerNodeOption = 4,
    placement: ScanPlacementOption = None,
    traffic: Annotated[
        bool,
        typer.Option(
            "--traffic",
            rich_help_panel=OUTPUT,
            help="With --json: add the traffic matrix of each row, in assignments.",
        ),
    ] = False,
    network: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel="Prediction",
            help="Network model of `fit`: also predict dispatch and combine times.",
        ),
    ] = None,
    algorithm: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            rich_help_panel="Prediction",
            help="Exchange algorithm to predict: flat, hierarchical, or gather.",
        ),
    ] = "flat",
    row_bytes: RowBytesOption = None,
    wide: WideOption = False,
    csv: CsvOption = False,
    json: JsonOption = False,
) -> None:
    """Re-map the captured loads to other EP degrees and placements."""
    from observatory.advice.conclusions import conclude_scan, conclusion_document
    from observatory.analysis.network.layouts import (
        ScanRequest,
        doubt_sentences,
        scan_document,
        scan_sentences,
        scan_tables,
    )
    from observatory.cli.output import print_conclusion, print_data, print_tables, say
    from observatory.errors import BenchmarkError
    from observatory.run import open_run

    if traffic and not json:
        raise BenchmarkError("--traffic adds matrices to the document of --json; give both")
    if network is None and (algorithm != "flat" or row_bytes is not None):
        raise BenchmarkError("--algorithm and --row-bytes are about predicted times; give --network as well")
    opened = open_run(run)
    request = ScanRequest(
        ep=None if ep is None else parse_ep(ep),
        gpus_per_node=gpus_per_node,
        placements=tuple(parse_placement(name) for name in dict.fromkeys(placement or ["auto"])),
        algorithm=algorithm,
        bytes_per_row=row_bytes,
    )
    model = None
    if network is not None:
        from observatory.analysis.network.network import load_network

        model = load_network(network)
    document = scan_document(opened, request, model=model, traffic=traffic)
    conclusion = conclude_scan(document, run)
    document["conclusion"] = conclusion_document(conclusion)
    tables = scan_tables(document)
    for note in document["problems"]:
        say(f"note: {note}")
    if print_data(document, tables, json=json, csv=csv):
        return
    print_tables(tables, wide=wide)
    for sentence in scan_sentences(document):
        say(sentence)
    for sentence in doubt_sentences(document, model, algorithm) if model is not None else ():
        say(sentence)
    print_conclusion(conclusion)

"""``observatory advise``: which change of an expert-parallel set-up is worth making, in seconds of a step."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from observatory.cli.options import OUTPUT, RANKS, CsvOption, ForceOption, JsonOption, WideOption

_MODELS = "What predicts times"


def advise(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run directories.")],
    ranks: Annotated[
        int | None,
        typer.Option(
            "--ranks",
            min=2,
            max=65536,
            rich_help_panel=RANKS,
            help="Expert-parallel ranks of today; by default those of the run.",
        ),
    ] = None,
    gpus_per_node: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65536,
            rich_help_panel=RANKS,
            help="Ranks of a node; by default those of the run, or 8.",
        ),
    ] = None,
    other_ranks: Annotated[
        str | None,
        typer.Option(
            "--other-ranks",
            metavar="N,...",
            rich_help_panel=RANKS,
            help="Other numbers of ranks to compare; by default half and double.",
        ),
    ] = None,
    topology: Annotated[
        Path | None,
        typer.Option(
            metavar="TOML", rich_help_panel=RANKS, help="The set-up of today as a file (docs/advise.md)."
        ),
    ] = None,
    network: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_MODELS,
            help="Network model of `fit`; by default one of the run's own exchanges.",
        ),
    ] = None,
    experts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_MODELS,
            help="Result of `bench experts`; by default expert times of the run itself.",
        ),
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|TOML",
            rich_help_panel=_MODELS,
            help="Published rates of a device for expert times, such as h100-sxm, or a file of such rates.",
        ),
    ] = None,
    clocks: Annotated[
        Path | None,
        typer.Option(metavar="FILE", rich_help_panel=_MODELS, help="Clock model of `clocks fit`."),
    ] = None,
    horizon_steps: Annotated[
        int,
        typer.Option(min=1, max=1 << 40, help="Steps within which a change has to pay for what it costs."),
    ] = 10_000,
    phase: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only this phase; by default all with enough steps.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", rich_help_panel=OUTPUT, help="Also write the JSON document."),
    ] = None,
    force: ForceOption = False,
    wide: WideOption = False,
    csv: CsvOption = False,
    json: JsonOption = False,
) -> None:
    """Compare every known change of an expert-parallel set-up on captured steps."""
    from observatory.advice.conclusions import conclude_advice, conclusion_document
    from observatory.advice.mitigations.advise import advise_run
    from observatory.advice.mitigations.document import (
        advice_document,
        advice_tables,
        doubt_sentences,
        missing_sentences,
    )
    from observatory.advice.mitigations.models import exchange_model, expert_cost, setup_of
    from observatory.analysis.frequency.model_file import load_clock_model
    from observatory.campaign.benchmark import check_out
    from observatory.cli.options import parse_ep
    from observatory.cli.output import print_conclusion, print_data, print_tables, say
    from observatory.errors import AdviceError
    from observatory.run import open_run
    from observatory.run.documents.writing import write_json
    from observatory.run.manifest import PHASES

    if phase not in (None, *PHASES):
        raise AdviceError(f"--phase {phase!r} is not known; expected one of {', '.join(PHASES)}")
    if experts is not None and hardware is not None:
        raise AdviceError("--experts and --hardware both give expert times; give one of them")
    if out is not None:
        check_out(out, force=force)
    clock_model = None if clocks is None else load_clock_model(clocks)
    others = () if other_ranks is None else parse_ep(other_ranks, "--other-ranks")
    advices = []
    for path in runs:
        run = open_run(path)
        exchanges, source = exchange_model(run, network)
        advice = advise_run(
            run,
            setup_of(run, topology, ranks=ranks, gpus_per_node=gpus_per_node),
            experts=expert_cost(run, experts, hardware),
            network=exchanges,
            network_source=source,
            clocks=clock_model,
            horizon_steps=horizon_steps,
            ranks=others,
            phase=phase,
        )
        advices.append((str(path), advice, run.problems))
    document = advice_document(advices)
    conclusion = conclude_advice(document)
    document["conclusion"] = conclusion_document(conclusion)
    tables = advice_tables(document)
    for item in document["runs"]:
        for problem in item["problems"]:
            say(f"note: {problem}")
    is_printed = print_data(document, tables, json=json, csv=csv)
    if out is not None:
        write_json(out, document)
    if is_printed:
        return
    print_tables(tables, wide=wide)
    for sentence in (*doubt_sentences(document), *missing_sentences(document)):
        say(sentence)
    print_conclusion(conclusion)
    if out is not None:
        say(f"advice written to {out}")

"""``observatory reuse``: energy of prefill against the cached fraction of the prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from observatory.cli.options import (
    DATA,
    TIMING,
    CsvOption,
    DtypeOption,
    ForceOption,
    JsonOption,
    ModelArgument,
    ResultOption,
    WideOption,
)

SeedOption = Annotated[
    int, typer.Option("--seed", min=0, help="Seed of the random order and of the bootstrap.")
]


def measure(
    model: ModelArgument,
    device: Annotated[
        str, typer.Option(metavar="NAME", help="Power device: GPU UUID, PCI bus id, or rapl:DOMAIN.")
    ],
    out: ResultOption,
    prompt_tokens: Annotated[
        int, typer.Option(min=2, max=1 << 20, rich_help_panel=DATA, help="Tokens of a prompt.")
    ] = 4096,
    fractions: Annotated[
        str,
        typer.Option(
            metavar="X,...", rich_help_panel=DATA, help="Cached fractions: 0 is a miss, 1 an exact hit."
        ),
    ] = "0,0.25,0.5,0.75,1",
    batch_size: Annotated[
        int, typer.Option(min=1, max=65536, rich_help_panel=DATA, help="Prompts prefilled together.")
    ] = 1,
    repeats: Annotated[
        int, typer.Option(min=1, max=1000, rich_help_panel=TIMING, help="Windows of each fraction.")
    ] = 4,
    window_s: Annotated[
        float, typer.Option(min=0.5, max=3600, rich_help_panel=TIMING, help="Length of a window.")
    ] = 5.0,
    settle_s: Annotated[
        float, typer.Option(min=0.0, max=600, rich_help_panel=TIMING, help="Time to run before each window.")
    ] = 0.5,
    torch_device: Annotated[
        str, typer.Option(metavar="NAME", rich_help_panel=DATA, help="Torch device of the model.")
    ] = "cuda",
    dtype: DtypeOption = None,
    seed: SeedOption = 0,
    force: ForceOption = False,
    wide: WideOption = False,
    csv: CsvOption = False,
    json: JsonOption = False,
) -> None:
    """Prefill the rest of a prompt behind a cached part of it, over and over, and measure the energy.

    The device must be the one that the model computes on, which is checked where torch reports its GPU. The
    device is only read.
    """
    from observatory.campaign.benchmark import check_out
    from observatory.campaign.prefix_cache import (
        ReuseJob,
        cached_prefills,
        check_same_device,
        parse_fractions,
        run_reuse,
    )
    from observatory.campaign.preflight import check_model
    from observatory.campaign.ranks import refuse_ranks
    from observatory.campaign.workloads import TEXT
    from observatory.cli.output import counting, say
    from observatory.host.provenance import command_line

    refuse_ranks("reuse measure", each_node=True)
    check_out(out, force=force)
    parsed = parse_fractions(fractions, prompt_tokens=prompt_tokens)
    check_model(
        model,
        device=torch_device,
        dtype=dtype,
        data=TEXT,
        positions=prompt_tokens,
        lower="--prompt-tokens",
    )
    note = check_same_device(device, torch_device)
    job = ReuseJob(
        model=model,
        device=device,
        prompt_tokens=prompt_tokens,
        batch_size=batch_size,
        repeats=repeats,
        window_s=window_s,
        settle_s=settle_s,
        seed=seed,
        note=note,
    )
    with (
        cached_prefills(
            model,
            fractions=parsed,
            prompt_tokens=prompt_tokens,
            batch_size=batch_size,
            device=torch_device,
            dtype=dtype,
        ) as workloads,
        counting("reuse") as progress,
    ):
        measured = run_reuse(job, workloads, out, overwrite=force, argv=command_line(), progress=progress)
    for note in measured.notes:
        say(f"note: {note}")
    show(out, seed=seed, wide=wide, csv=csv, json=json)
    say(f"measurements written to {out}")


def show(
    measurements: Annotated[
        Path, typer.Argument(metavar="FILE", help="Result of `observatory reuse measure`.")
    ],
    seed: SeedOption = 0,
    wide: WideOption = False,
    csv: CsvOption = False,
    json: JsonOption = False,
) -> None:
    """Show the energy of a prefill against the cached fraction, with intervals, and what a hit saves."""
    from observatory.advice.conclusions import conclude_reuse, conclusion_document
    from observatory.analysis.energy.document import reuse_document, reuse_sentences, reuse_tables
    from observatory.cli.output import print_conclusion, print_data, print_tables, say
    from observatory.run.documents.prefix_cache import load_reuse

    measured = load_reuse(measurements)
    document = reuse_document(measured, seed=seed)
    conclusion = conclude_reuse(document, measurements)
    document["conclusion"] = conclusion_document(conclusion)
    tables = reuse_tables(document["reuse"], measured)
    if print_data(document, tables, json=json, csv=csv):
        return
    print_tables(tables, wide=wide)
    for sentence in reuse_sentences(document["reuse"]):
        say(sentence)
    print_conclusion(conclusion)

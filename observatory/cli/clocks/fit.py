"""``observatory clocks fit``: time and energy against the SM clock, from sweeps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from observatory.cli.options import OUTPUT, CsvOption, ForceOption, JsonOption, WideOption


def fit(
    sweeps: Annotated[
        list[Path], typer.Argument(metavar="FILE", help="Results of `clocks sweep`, of one device.")
    ],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="FILE", rich_help_panel=OUTPUT, help="Clock model (JSON) to write."),
    ],
    bootstrap: Annotated[int, typer.Option(min=20, max=2000, help="Samples of the curves.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    force: ForceOption = False,
    wide: WideOption = False,
    csv: CsvOption = False,
    json: JsonOption = False,
) -> None:
    """Fit the time and energy of each phase against the SM clock."""
    from observatory.advice.conclusions import conclude_clocks, conclusion_document
    from observatory.advice.frequency import recommend_clocks
    from observatory.analysis.frequency import fit_clocks
    from observatory.analysis.frequency.tables import model_table
    from observatory.campaign.benchmark import check_out
    from observatory.cli.output import print_conclusion, print_data, print_table, print_text, say
    from observatory.host.provenance import command_line
    from observatory.run.documents.clock_sweep import load_sweep
    from observatory.run.documents.printed import printed_document
    from observatory.run.documents.writing import write_text

    check_out(out, force=force)
    model = fit_clocks(
        [load_sweep(path) for path in sweeps],
        sources=[path.name for path in sweeps],
        argv=command_line(),
        bootstrap=bootstrap,
        seed=seed,
    )
    write_text(out, model.model_dump_json(indent=1))
    document = printed_document(
        "clock_model",
        model.model_dump(mode="json", exclude={"series": {"__all__": {"samples_B", "settings"}}}),
    )
    conclusion = conclude_clocks(recommend_clocks(model).model_dump(mode="json"), out)
    document["conclusion"] = conclusion_document(conclusion)
    table = model_table(model)
    if print_data(document, [table], json=json, csv=csv):
        return
    print_table(table, wide=wide)
    for series in model.series:
        print_text(f"{series.title}: {item.kind}: {item.text}" for item in series.confounds)
        for item in series.left_out:
            say(f"{series.title}: {item.points} points left out: {item.reason}")
    for note in model.notes:
        say(note)
    print_conclusion(conclusion)
    say(f"clock model written to {out}")

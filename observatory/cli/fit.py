"""``observatory fit``: a network model from benchmark results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from observatory.cli.options import OUTPUT, CsvOption, ForceOption, JsonOption, TableOption, WideOption

#: Exit code: the model is written, but its verdict is that it is not to be relied on.
NOT_VALID = 3


def fit(
    results: Annotated[list[Path], typer.Argument(metavar="RESULT", help="Results of `bench` or `replay`.")],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="FILE", rich_help_panel=OUTPUT, help="Network model (JSON) to write."),
    ],
    check: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Also predict this result, which is not fitted; may be repeated."),
    ] = None,
    bootstrap: Annotated[int, typer.Option(min=0, max=10_000, help="Bootstrap samples over matrices.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Seed of folds and bootstrap.")] = 0,
    force: ForceOption = False,
    wide: WideOption = False,
    csv: CsvOption = False,
    table: TableOption = None,
    json: JsonOption = False,
) -> None:
    """Fit latency, bandwidth and slower ranks; the form is chosen on held-out matrices."""
    from observatory.advice.conclusions import conclude_fit, conclusion_document
    from observatory.analysis.network.checking import check_predictions, error_summary, not_fitted
    from observatory.analysis.network.documents import fit_document, fit_tables
    from observatory.analysis.network.fitting import fit_network
    from observatory.analysis.network.words import misfit_sentence, verdict_sentence
    from observatory.campaign.benchmark import check_out
    from observatory.cli.output import print_conclusion, print_data, print_tables, say, say_cores
    from observatory.host.provenance import command_line
    from observatory.run.documents.bench import load_bench
    from observatory.run.documents.writing import frame_records, write_text

    check_out(out, force=force)
    fitted = [load_bench(path) for path in results]
    unseen = [(path, not_fitted(load_bench(path), fitted, name=path.name)) for path in check or []]
    model = fit_network(
        fitted,
        sources=[path.name for path in results],
        argv=command_line(),
        bootstrap=bootstrap,
        seed=seed,
    )
    checked = [
        {"result": path.name, **row}
        for path, result in unseen
        for row in frame_records(error_summary(check_predictions(model, result)))
    ]
    valid = all(item.verdict is not None and item.verdict.code == "valid" for item in model.fits)
    say_cores(model.short_of_cores)
    for note in model.notes:
        say(f"note: {note}")
    write_text(out, model.model_dump_json(indent=1))
    document = fit_document(model, checked)
    conclusion = conclude_fit(document, out)
    document["conclusion"] = conclusion_document(conclusion)
    tables = fit_tables(document)
    if print_data(document, tables, json=json, csv=csv, table=table):
        raise typer.Exit(0 if valid else NOT_VALID)
    print_tables(tables, wide=wide)
    for item in model.fits:
        if not item.held_out_ranks:
            numbers = ", ".join(map(str, item.domain.ranks))
            say(
                f"{item.algorithm} was measured on {numbers} ranks; measure three numbers of ranks to learn "
                "how well others are predicted"
            )
        say(f"verdict: {verdict_sentence(item, model.backend)}")
        for misfit in item.misfits:
            say(f"  {misfit_sentence(misfit)}")
    print_conclusion(conclusion)
    say(f"network model written to {out}; next: observatory scan RUN --network {out}")
    raise typer.Exit(0 if valid else NOT_VALID)

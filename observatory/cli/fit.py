"""``observatory fit``: a network model from benchmark results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from observatory.cli.options import ForceOption, JsonOption

#: Exit code: the model is written, but its verdict is that it is not to be relied on.
NOT_VALID = 3


def fit(
    results: Annotated[list[Path], typer.Argument(help="Results of bench or replay.")],
    out: Annotated[Path, typer.Option("--out", help="Network model (JSON) to write.")],
    check: Annotated[
        list[Path] | None, typer.Option(help="Also predict these results, which the fit does not see.")
    ] = None,
    bootstrap: Annotated[int, typer.Option(min=0, max=10_000, help="Bootstrap samples over matrices.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Seed of folds and bootstrap.")] = 0,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Fit latency, bandwidth, per-message cost and contention; the form is chosen on held-out matrices."""
    from observatory.analysis.network.checking import check_predictions, error_summary, not_fitted
    from observatory.analysis.network.fitting import fit_network
    from observatory.analysis.network.wording import misfit_sentence, verdict_sentence
    from observatory.campaign.benchmark import check_out
    from observatory.cli.output import print_json, print_table, say, say_cores
    from observatory.host.provenance import command_line
    from observatory.run.documents.bench import load_bench
    from observatory.run.documents.writing import frame_records, write_text
    from observatory.run.usable_cores import share_document

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
        (path, row)
        for path, result in unseen
        for row in frame_records(error_summary(check_predictions(model, result)))
    ]
    valid = all(item.verdict is not None and item.verdict.code == "valid" for item in model.fits)
    say_cores(model.short_of_cores)
    for note in model.notes:
        say(f"note: {note}")
    write_text(out, model.model_dump_json(indent=1))
    if json:
        print_json(
            {
                "backend": model.backend,
                "notes": list(model.notes),
                "short_of_cores": [share_document(share) for share in model.short_of_cores],
                "fits": [
                    item.model_dump(mode="json", exclude={"samples_BF", "ratio_Q"}) for item in model.fits
                ],
                "checked": [{"result": path.name, **row} for path, row in checked],
            }
        )
        raise typer.Exit(0 if valid else NOT_VALID)
    for item in model.fits:
        print_table(
            ["form", "parameters", "median error", "p90", "other ranks", "chosen"],
            [
                [score.form, score.parameters, score.median_error, score.p90_error, score.other_ranks_error,
                 score.form == item.form]
                for score in item.scores
            ],
            title=f"{item.algorithm} over {model.backend}: {item.cases} matrices, {item.sharing}",
        )  # fmt: skip
        if item.held_out_ranks:
            print_table(
                ["ranks left out", "median error", "p90", "predicted / measured"],
                [
                    [own.ranks, own.median_error, own.p90_error, own.median_ratio]
                    for own in item.held_out_ranks
                ],
                title=f"{item.form}: what it gets wrong on a number of ranks that its fit did not see",
            )
        else:
            numbers = ", ".join(map(str, item.domain.ranks))
            say(
                f"{item.algorithm} was measured on {numbers} ranks; three numbers of ranks would tell how "
                "well others are predicted"
            )
        print_table(
            ["term", "us per unit", "90 %", "GB/s", "why not"],
            [
                [
                    part.term,
                    None if part.us_per_unit is None else f"{part.us_per_unit:.4g}",
                    None if part.low_us is None else f"{part.low_us:.4g}-{part.high_us:.4g}",
                    None if part.gb_per_s is None else f"{part.gb_per_s:.4g}",
                    part.reason or "",
                ]
                for part in item.coefficients
            ],
        )
    if checked:
        print_table(
            ["result", "algorithm", "pattern", "exchanges", "median error", "p90", "bias", "in interval",
             "through misfits"],
            [
                [path.name, *(row[name] for name in ("algorithm", "pattern", "exchanges", "median_error",
                                                     "p90_error", "median_ratio", "inside_interval",
                                                     "through_misfits"))]
                for path, row in checked
            ],
            title="predicted against measured, not in the fit",
        )  # fmt: skip
    for item in model.fits:
        say(f"verdict: {verdict_sentence(item, model.backend)}")
        for misfit in item.misfits:
            say(f"  {misfit_sentence(misfit)}")
    say(f"network model written to {out}; next: observatory scan RUN --network {out}")
    raise typer.Exit(0 if valid else NOT_VALID)

"""``observatory clocks fit``: time and energy against the SM clock, from sweeps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from observatory.cli.options import ForceOption, JsonOption

if TYPE_CHECKING:
    from observatory.analysis.frequency.model_file import ClockEstimate, SeriesFit


def fit(
    sweeps: Annotated[list[Path], typer.Argument(help="Results of clocks sweep, of one device.")],
    out: Annotated[Path, typer.Option("--out", help="Clock model (JSON) to write.")],
    bootstrap: Annotated[int, typer.Option(min=0, max=2000, help="Bootstrap samples over clocks.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of folds and bootstrap.")] = 0,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Fit the time and energy of each phase; the form is chosen on clocks that were held out."""
    from observatory.analysis.frequency import fit_clocks
    from observatory.campaign.benchmark import check_out
    from observatory.cli.output import print_json, print_lines, print_table, say
    from observatory.host.provenance import command_line
    from observatory.run.documents.clock_sweep import load_sweep
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
    if json:
        print_json(model.model_dump(mode="json", exclude={"series": {"__all__": {"samples_B", "settings"}}}))
        return
    print_table(
        [
            "series",
            "clocks",
            "points",
            "time",
            "error",
            "power",
            "error",
            "f_crit MHz",
            "f_energy MHz",
            "optimum MHz",
        ],
        [_row(series) for series in model.series],
        title=f"{model.device.name or 'device'}: forms chosen on held-out clocks, error rms of ln",
    )
    for series in model.series:
        print_lines(f"{series.title}: {item.kind}: {item.text}" for item in series.confounds)
        for item in series.left_out:
            say(f"{series.title}: {item.points} points left out: {item.reason}")
    for note in model.notes:
        say(note)
    say(f"clock model written to {out}; next: observatory clocks recommend {out}")


def _row(series: SeriesFit) -> list[object]:
    power = series.power
    return [
        series.title,
        series.clocks,
        series.points,
        series.time.form,
        _error(series.time.form, series),
        power.form if power else series.no_power,
        _error(power.form, series) if power else None,
        _clock(series.critical),
        _clock(series.compute_optimum),
        _clock(series.optimum),
    ]


def _error(form: str, series: SeriesFit) -> str | None:
    scores = (*series.time.scores, *(series.power.scores if series.power else ()))
    return next((f"{100 * score.rms_error:.2f} %" for score in scores if score.form == form), None)


def _clock(estimate: ClockEstimate) -> str | None:
    if estimate.mhz is None:
        return None
    words = "" if estimate.relation == "at" else f"{estimate.relation} "
    spread = (
        ""
        if estimate.low_mhz in (None, estimate.high_mhz)
        else f" ({estimate.low_mhz:.0f}-{estimate.high_mhz:.0f})"
    )
    return f"{words}{estimate.mhz:.0f}{spread}"

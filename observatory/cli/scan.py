"""``observatory scan``: what another EP degree or placement would do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from observatory.cli.options import (
    GpusPerNodeOption,
    JsonOption,
    RowBytesOption,
    parse_ep,
    parse_placement,
)

if TYPE_CHECKING:
    import pandas as pd

    from observatory.analysis.network.network import NetworkModel
    from observatory.run import Run

_USUAL_DEGREES = (4, 8, 16, 32)
ScanEpOption = Annotated[
    str | None,
    typer.Option(
        "--ep",
        help="EP degrees, separated by commas; without it those of 4, 8, 16, 32 that divide the experts.",
    ),
]

ScanPlacementOption = Annotated[
    list[str] | None,
    typer.Option(
        "--placement",
        help="linear, round-robin, recorded, auto, or a placement file (JSON); give several to compare them.",
    ),
]

_COLUMNS = {
    "ep": "EP",
    "placement": "placement",
    "layer": "layer",
    "phase": "phase",
    "expert_max_over_mean": "expert max/mean",
    "rank_max_over_mean": "rank max/mean",
    "rank_max_over_mean_step_p50": "per step: median",
    "rank_max_over_mean_step_p90": "p90",
    "cross_rank_fraction": "cross rank",
    "cross_node_fraction": "cross node",
}

_TIME_COLUMNS = {
    "dispatch_us": "dispatch us",
    "dispatch_interval": "90 %",
    "combine_us": "combine us",
    "combine_interval": "90 %",
}


def scan(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    ep: ScanEpOption = None,
    gpus_per_node: GpusPerNodeOption = 4,
    placement: ScanPlacementOption = None,
    traffic: Annotated[
        bool, typer.Option("--traffic", help="With --json: add each row's traffic matrix in assignments.")
    ] = False,
    network: Annotated[
        Path | None, typer.Option(help="Network model of `fit`: also predict dispatch and combine times.")
    ] = None,
    algorithm: Annotated[
        str, typer.Option(help="Exchange to predict: flat, hierarchical or gather.")
    ] = "flat",
    row_bytes: RowBytesOption = None,
    json: JsonOption = False,
) -> None:
    """Re-map the captured loads to other EP degrees and placements."""
    from observatory.analysis.network.network import load_network
    from observatory.analysis.network.telling import compare_layouts
    from observatory.cli.output import print_json, print_table, say
    from observatory.errors import BenchmarkError
    from observatory.run import open_run
    from observatory.run.documents.writing import frame_records
    from observatory.run.gaps import gap_document

    if traffic and not json:
        raise BenchmarkError("--traffic adds matrices to the document of --json; give both")
    if network is None and (algorithm != "flat" or row_bytes is not None):
        raise BenchmarkError("--algorithm and --row-bytes are about predicted times; give --network as well")
    opened = open_run(run)
    model = None if network is None else load_network(network)
    asked = _Asked(
        ep=None if ep is None else parse_ep(ep),
        gpus_per_node=gpus_per_node,
        placements=tuple(dict.fromkeys(placement or ["auto"])),
        algorithm=algorithm,
        bytes_per_row=row_bytes,
    )
    frame, rule_of, notes = _scanned(opened, asked, model)
    compared = None if model is None else compare_layouts(model.of(algorithm), frame)
    rows = frame_records(frame)
    for note in notes:
        say(f"note: {note}")
    if json:
        if traffic:
            for row in rows:
                row["traffic_assignments"] = _matrix(opened, row, rule_of[row["ep"], row["placement"]])
        print_json(
            {
                "run_id": opened.manifest.run_id,
                "model": opened.manifest.model.name,
                "gpus_per_node": gpus_per_node,
                "problems": notes,
                "gaps": [gap_document(gap) for gap in opened.gaps],
                "rows": rows,
                **({} if model is None else _document(model, algorithm, compared)),
            }
        )
        return
    columns = _COLUMNS if model is None else _COLUMNS | _TIME_COLUMNS
    print_table(
        list(columns.values()),
        [[_cell(row, name) for name in columns] for row in rows],
        title=f"{opened.manifest.model.name}: captured loads re-mapped, {gpus_per_node} ranks per node",
    )
    for sources in sorted({str(row["sources"]) for row in rows}):
        say(f"source ranks: {sources}")
    for name, what in (("extrapolated", "extrapolated at"), ("no_prediction", "no times at")):
        for row in {str(row[name]): row for row in rows if row.get(name)}.values():
            say(f"{what} EP {row['ep']}: {row[name]}")
    if model is not None:
        _say_doubts(model, algorithm, rows, compared)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What to scan: degrees (None: those that fit), ranks per node, placements, and what to predict."""

    ep: tuple[int, ...] | None
    gpus_per_node: int
    placements: tuple[str, ...]
    algorithm: str
    bytes_per_row: int | None


def _scanned(
    opened: Run, asked: _Asked, model: NetworkModel | None
) -> tuple[pd.DataFrame, dict[tuple[int, str], str | Path], list[str]]:
    """Rows of all layouts, the placement of each by degree and name, and what must be known of them.

    Raises:
        PlacementError: two placement files have one name.
    """
    import pandas as pd

    from observatory.analysis.network.scan import scan_times
    from observatory.analysis.parallel.captured import departures
    from observatory.analysis.parallel.scan import scan_run
    from observatory.errors import PlacementError

    frames: list[pd.DataFrame] = []
    rule_of: dict[tuple[int, str], str | Path] = {}
    notes: list[str] = []
    for name in asked.placements:
        rule = parse_placement(name)
        degrees = asked.ep or _fitting(opened, name)
        frame = scan_run(opened, ep_degrees=degrees, gpus_per_node=asked.gpus_per_node, placement=rule)
        for degree in degrees:
            notes += departures(opened, ep=degree, placement=rule)
        if model is not None:
            times = scan_times(
                opened,
                model,
                ep_degrees=degrees,
                gpus_per_node=asked.gpus_per_node,
                placement=rule,
                algorithm=asked.algorithm,
                bytes_per_row=asked.bytes_per_row,
            )
            frame = frame.merge(times, on=["ep", "layer", "phase"], how="left", validate="one_to_one")
        for layout in zip(frame["ep"], frame["placement"], strict=True):
            earlier = rule_of.setdefault(layout, rule)
            if earlier != rule and isinstance(earlier, Path) and isinstance(rule, Path):
                raise PlacementError(f"{earlier} and {rule} have one name; rename one of the files")
        frames.append(frame)
    # "auto" and the name that it stands for are one layout.
    whole = pd.concat(frames, ignore_index=True)
    whole = whole.drop_duplicates(["ep", "placement", "layer", "phase"], ignore_index=True)
    if model is not None:
        notes += _model_notes(model, asked.algorithm)
        predicted = int(whole["predicted_steps"].max()) if len(whole) else 0
        if predicted < (whole["steps"].max() if len(whole) else 0):
            notes.append(f"times are medians over {predicted} steps of each phase, evenly spread")
    return whole, rule_of, list(dict.fromkeys([*opened.problems, *notes]))  # reading finds problems too


def _model_notes(model: NetworkModel, algorithm: str) -> list[str]:
    from observatory.analysis.network.wording import model_notes
    from observatory.run.usable_cores import core_sentence

    notes = [*model.notes, *model_notes(model, algorithm), *map(core_sentence, model.short_of_cores)]
    return [f"the network model: {note}" for note in notes]


def _say_doubts(
    model: NetworkModel, algorithm: str, rows: list[dict[str, Any]], compared: pd.DataFrame | None
) -> None:
    """Which times go through what the model does not describe, and which layouts it does not tell apart."""
    from observatory.analysis.network.wording import comparison_sentence, through_misfits
    from observatory.cli.output import say
    from observatory.run.documents.writing import frame_records

    misfits = model.of(algorithm).misfits
    for degree, met in sorted({(row["ep"], tuple(row["misfits"] or ())) for row in rows}):
        if met:
            say(f"times marked ! at EP {degree} are {through_misfits(misfits, met)}")
    for row in [] if compared is None else frame_records(compared):
        values = {name: row[name] for name in ("ratio", "low", "high", "code")}
        first, second = (f"EP {row[f'{one}_ep']} {row[f'{one}_placement']}" for one in ("first", "second"))
        say(f"{row['phase']}: {comparison_sentence(first, second, **values)}")


def _document(model: NetworkModel, algorithm: str, compared: pd.DataFrame | None) -> dict[str, Any]:
    """What a reader of predicted times must know, in codes and values."""
    from observatory.run.documents.writing import frame_records
    from observatory.run.usable_cores import share_document

    fit = model.of(algorithm)
    return {
        "network": {
            "verdict": None if fit.verdict is None else fit.verdict.model_dump(mode="json"),
            "misfits": [misfit.model_dump(mode="json") for misfit in fit.misfits],
            "short_of_cores": [share_document(share) for share in model.short_of_cores],
        },
        "comparisons": [] if compared is None else frame_records(compared),
    }


def _cell(row: dict[str, Any], name: str) -> object:
    """A value of the row, an interval from its two ends; a time is marked that is outside the measurements
    (*) or through what the model does not describe (!).
    """  # noqa: D205 - one sentence
    role, _, kind = name.partition("_")
    if kind == "interval":
        low, high = row[f"{role}_low_us"], row[f"{role}_high_us"]
        return None if low is None else f"{low:.0f}-{high:.0f}"
    if kind == "us" and row[name] is not None:
        return f"{row[name]:.0f}{' *' if row['extrapolated'] else ''}{' !' if row['misfits'] else ''}"
    return row[name]


def _matrix(run: Run, row: dict[str, Any], placement: str | Path) -> list[list[float]]:
    """Assignments from source rank i to expert rank j, summed over the run."""
    from observatory.analysis.parallel.scan import traffic_matrix

    ep = int(row["ep"])
    pairs = traffic_matrix(run, ep=ep, layer=row["layer"], phase=row["phase"], placement=placement)
    matrix: list[list[float]] = pairs["assignments"].to_numpy().reshape(ep, ep).tolist()
    return matrix


def _fitting(run: Run, placement: str) -> tuple[int, ...]:
    """The degrees to scan when none are given: a file's own, else the usual ones that fit every layer."""
    from observatory.analysis.parallel.placement import load_placement

    rule = parse_placement(placement)
    if rule == "recorded":
        return (run.manifest.topology.ranks,)
    if isinstance(rule, Path):
        file = load_placement(rule)
        return (file.ranks or file.highest_rank + 1,)
    experts = {layer.experts for layer in run.manifest.model.moe_layers}
    fitting = tuple(ep for ep in _USUAL_DEGREES if all(count % ep == 0 for count in experts))
    return fitting or (max(experts, default=1),)

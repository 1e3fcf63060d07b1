"""``observatory scan``: what another EP degree or placement would do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from observatory.cli.options import (
    GpusPerNodeOption,
    JsonOption,
    PlacementOption,
    RowBytesOption,
    parse_ep,
    parse_placement,
)

if TYPE_CHECKING:
    from observatory.store import Run

__all__ = ["scan"]

_USUAL_DEGREES = (4, 8, 16, 32)
ScanEpOption = Annotated[
    str | None,
    typer.Option(
        "--ep",
        help="EP degrees, separated by commas; without it those of 4, 8, 16, 32 that divide the experts.",
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
    placement: PlacementOption = "auto",
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
    from observatory.cli.output import print_json, print_table, say
    from observatory.documents import frame_records
    from observatory.errors import BenchmarkError
    from observatory.parallel.captured import departures
    from observatory.parallel.scan import scan_run
    from observatory.store import open_run
    from observatory.store.gaps import gap_document

    if traffic and not json:
        raise BenchmarkError("--traffic adds matrices to the document of --json; give both")
    if network is None and (algorithm != "flat" or row_bytes is not None):
        raise BenchmarkError("--algorithm and --row-bytes are about predicted times; give --network as well")
    opened = open_run(run)
    degrees = _fitting(opened, placement) if ep is None else parse_ep(ep)
    frame = scan_run(
        opened,
        ep_degrees=degrees,
        gpus_per_node=gpus_per_node,
        placement=parse_placement(placement),
    )
    columns, notes = dict(_COLUMNS), list(opened.problems)
    for degree in degrees:
        notes += departures(opened, ep=degree, placement=parse_placement(placement))
    if network is not None:
        from observatory.cost.network import load_network
        from observatory.cost.scan import scan_times

        model = load_network(network)
        notes += [f"the network model: {note}" for note in model.notes]
        times = scan_times(
            opened,
            model,
            ep_degrees=degrees,
            gpus_per_node=gpus_per_node,
            placement=parse_placement(placement),
            algorithm=algorithm,
            bytes_per_row=row_bytes,
        )
        frame = frame.merge(times, on=["ep", "layer", "phase"], how="left", validate="one_to_one")
        predicted = int(frame["predicted_steps"].max()) if len(frame) else 0
        if predicted < (frame["steps"].max() if len(frame) else 0):
            notes.append(f"times are medians over {predicted} steps of each phase, evenly spread")
        columns |= _TIME_COLUMNS
    rows = frame_records(frame)
    for note in notes:
        say(f"note: {note}")
    if json:
        if traffic:
            for row in rows:
                row["traffic_assignments"] = _matrix(opened, row, parse_placement(placement))
        print_json(
            {
                "run_id": opened.manifest.run_id,
                "model": opened.manifest.model.name,
                "gpus_per_node": gpus_per_node,
                "problems": notes,
                "gaps": [gap_document(gap) for gap in opened.gaps],
                "rows": rows,
            }
        )
        return
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


def _cell(row: dict[str, Any], name: str) -> object:
    """A value of the row, an interval from its two ends; a time outside the measurements is marked."""
    role, _, kind = name.partition("_")
    if kind == "interval":
        low, high = row[f"{role}_low_us"], row[f"{role}_high_us"]
        return None if low is None else f"{low:.0f}-{high:.0f}"
    if kind == "us" and row[name] is not None:
        return f"{row[name]:.0f}{' *' if row['extrapolated'] else ''}"
    return row[name]


def _matrix(run: Run, row: dict[str, Any], placement: str | Path) -> list[list[float]]:
    """Assignments from source rank i to expert rank j, summed over the run."""
    from observatory.parallel.scan import traffic_matrix

    ep = int(row["ep"])
    pairs = traffic_matrix(run, ep=ep, layer=row["layer"], phase=row["phase"], placement=placement)
    matrix: list[list[float]] = pairs["assignments"].to_numpy().reshape(ep, ep).tolist()
    return matrix


def _fitting(run: Run, placement: str) -> tuple[int, ...]:
    """The degrees to scan when none are given: a file's own, else the usual ones that fit every layer."""
    from observatory.parallel.placement import load_placement

    rule = parse_placement(placement)
    if rule == "recorded":
        return (run.manifest.topology.ranks,)
    if isinstance(rule, Path):
        file = load_placement(rule)
        return (file.ranks or file.highest_rank + 1,)
    experts = {layer.experts for layer in run.manifest.model.moe_layers}
    fitting = tuple(ep for ep in _USUAL_DEGREES if all(count % ep == 0 for count in experts))
    return fitting or (max(experts, default=1),)

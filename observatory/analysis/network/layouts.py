"""The document of ``observatory scan``: what other EP degrees and placements would do, and its table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from observatory.analysis.columns import Column, Table
from observatory.analysis.parallel.captured import departures
from observatory.analysis.parallel.placement import PlacementChoice
from observatory.analysis.parallel.scan import fitting_degrees, scan_run, traffic_matrix
from observatory.errors import PlacementError
from observatory.run.documents.printed import printed_document
from observatory.run.documents.writing import frame_records
from observatory.run.gaps import gap_document
from observatory.text import listing

if TYPE_CHECKING:
    from observatory.analysis.network.network import NetworkModel
    from observatory.run import Run

_LAYOUT = ["ep", "placement", "layer", "phase"]

#: Of `scan_run`.
LAYOUT_COLUMNS = (
    Column(name="ep", title="EP", key=True),
    Column(name="placement", title="placement", text=True, key=True),
    Column(name="layer", title="layer", key=True),
    Column(name="phase", title="phase", text=True, key=True),
    Column(
        name="expert_max_over_mean",
        title="expert max/mean",
        digits=2,
        wide=True,
        legend="busiest expert over the mean, at any degree",
    ),
    Column(
        name="rank_max_over_mean",
        title="rank max/mean",
        digits=2,
        legend="busiest rank over the mean, whole run",
    ),
    Column(
        name="rank_max_over_mean_step_p50",
        title="step median",
        digits=2,
        wide=True,
        legend="the same per step",
    ),
    Column(
        name="rank_max_over_mean_step_p90",
        title="step p90",
        digits=2,
        legend="the same per step, exceeded by one step in ten",
    ),
    Column(name="rank_max_over_mean_step_max", title="worst step", digits=2, wide=True),
    Column(
        name="rank_max_over_mean_floor",
        title="floor",
        digits=2,
        wide=True,
        legend="what uniform routing of as many tokens shows, whole run",
    ),
    Column(
        name="rank_max_over_mean_step_floor",
        title="step floor",
        digits=2,
        wide=True,
        legend="the same per step",
    ),
    Column(
        name="cross_rank_fraction",
        title="cross rank",
        unit="%",
        digits=1,
        legend="assignments that leave their rank",
    ),
    Column(
        name="cross_node_fraction",
        title="cross node",
        unit="%",
        digits=1,
        legend="assignments that leave their node",
    ),
    Column(name="sources", title="source ranks", text=True, wide=True),
)

#: Of `scan_times`, with marks.
TIME_COLUMNS = (
    Column(
        name="dispatch_us",
        title="dispatch",
        unit="us",
        digits=0,
        interval=("dispatch_low_us", "dispatch_high_us"),
    ),
    Column(
        name="combine_us",
        title="combine",
        unit="us",
        digits=0,
        interval=("combine_low_us", "combine_high_us"),
        legend="predicted, with its 90 % interval",
    ),
    Column(
        name="marks",
        title="mark",
        text=True,
        otherwise="",
        legend="* outside the measurements, ! through what the model does not describe",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanRequest:
    """What to scan.

    Attributes:
        ep: degrees; None takes those of 4, 8, 16, 32 that divide the experts, or a placement's own.
        gpus_per_node: ranks per node.
        placements: names or files, in the order of the result.
        algorithm: the exchange to predict.
        bytes_per_row: bytes of one row of activations; None takes them from the run.
    """

    ep: tuple[int, ...] | None = None
    gpus_per_node: int = 4
    placements: tuple[PlacementChoice, ...] = ("auto",)
    algorithm: str = "flat"
    bytes_per_row: int | None = None


def scan_document(
    run: Run, request: ScanRequest, *, model: NetworkModel | None = None, traffic: bool = False
) -> dict[str, Any]:
    """The captured loads under other degrees and placements, as ``--json`` prints them (docs/json.md).

    Args:
        run: an open run.
        request: what to scan.
        model: predicts dispatch and combine times; None leaves them out.
        traffic: add the traffic matrix of each row, in assignments.

    Raises:
        PlacementError: a degree or a file does not fit, or two files have one name.
        LoadError: loads are negative or inconsistent.
        BenchmarkError: the model does not know the algorithm.
        RunError: times are asked for, and the bytes of a row are unknown, or rows fold several steps.
    """
    frame, rule_of, notes = _layouts(run, request, model)
    rows = frame_records(frame)
    if traffic:
        for row in rows:
            row["traffic_assignments"] = _matrix(run, row, rule_of[row["ep"], row["placement"]])
    return printed_document(
        "scan",
        {
            "run_id": run.manifest.run_id,
            "model": run.manifest.model.name,
            "gpus_per_node": request.gpus_per_node,
            "problems": notes,
            "gaps": [gap_document(gap) for gap in run.gaps],
            "rows": rows,
            **({} if model is None else _predictions(model, request.algorithm, frame)),
        },
    )


def scan_tables(document: dict[str, Any]) -> list[Table]:
    """The layouts of a scan document."""
    predicted = "network" in document
    title = f"{document['model']}: captured loads re-mapped, {document['gpus_per_node']} ranks per node"
    columns: tuple[Column, ...] = LAYOUT_COLUMNS
    if predicted:
        kept = ("rank_max_over_mean",)
        columns = tuple(
            column if column.key or column.name in kept else replace(column, wide=True) for column in columns
        )
        columns += TIME_COLUMNS
    return [Table(name="rows", columns=columns, rows=document["rows"], title=title)]


def scan_sentences(document: dict[str, Any]) -> Iterator[str]:
    """What the table does not show: where source ranks come from, what is extrapolated or not predicted."""
    rows = document["rows"]
    for sources in sorted({str(row["sources"]) for row in rows}):
        yield f"source ranks: {sources}"
    for name, what in (("extrapolated", "extrapolated at"), ("no_prediction", "no times at")):
        for row in {str(row[name]): row for row in rows if row.get(name)}.values():
            yield f"{what} EP {row['ep']}: {row[name]}"


def doubt_sentences(document: dict[str, Any], model: NetworkModel, algorithm: str) -> Iterator[str]:
    """Which times go through what the model does not describe, and which layouts it cannot distinguish."""
    from observatory.analysis.network.words import comparison_sentence, through_misfits

    misfits = model.of(algorithm).misfits
    for degree, met in sorted({(row["ep"], tuple(row["misfits"] or ())) for row in document["rows"]}):
        if met:
            yield f"times marked ! at EP {degree} are {through_misfits(misfits, met)}"
    for row in document["comparisons"]:
        values = {name: row[name] for name in ("ratio", "low", "high", "code")}
        first, second = (f"EP {row[f'{one}_ep']} {row[f'{one}_placement']}" for one in ("first", "second"))
        yield f"{row['phase']}: {comparison_sentence(first, second, **values)}"


_Rules = dict[tuple[int, str], PlacementChoice]


def _layouts(
    run: Run, request: ScanRequest, model: NetworkModel | None
) -> tuple[pd.DataFrame, _Rules, list[str]]:
    """Rows of all layouts, the placement of each by degree and name, and notes."""
    frames: list[pd.DataFrame] = []
    rule_of: _Rules = {}
    notes: list[str] = []
    for rule in request.placements:
        degrees = request.ep or fitting_degrees(run.manifest, rule)
        _refuse_misfits(run, degrees, rule)
        frame = scan_run(run, ep_degrees=degrees, gpus_per_node=request.gpus_per_node, placement=rule)
        for degree in degrees:
            notes += departures(run, ep=degree, placement=rule)
        if model is not None:
            frame = _with_times(run, request, model, frame, degrees, rule)
        for layout in zip(frame["ep"], frame["placement"], strict=True):
            earlier = rule_of.setdefault(layout, rule)
            if earlier != rule and isinstance(earlier, Path) and isinstance(rule, Path):
                raise PlacementError(f"{earlier} and {rule} have one name; rename one of the files")
        frames.append(frame)
    # "auto" and the name that it stands for are one layout.
    whole = pd.concat(frames, ignore_index=True).drop_duplicates(_LAYOUT, ignore_index=True)
    if model is not None:
        notes += _model_notes(model, request.algorithm)
        predicted = int(whole["predicted_steps"].max()) if len(whole) else 0
        if predicted < (whole["steps"].max() if len(whole) else 0):
            notes.append(f"times are medians over {predicted} steps of each phase, evenly spread")
    return whole, rule_of, list(dict.fromkeys([*run.problems, *notes]))  # reading finds problems too


def _with_times(
    run: Run,
    request: ScanRequest,
    model: NetworkModel,
    frame: pd.DataFrame,
    degrees: Sequence[int],
    rule: PlacementChoice,
) -> pd.DataFrame:
    from observatory.analysis.network.scan import scan_times

    times = scan_times(
        run,
        model,
        ep_degrees=degrees,
        gpus_per_node=request.gpus_per_node,
        placement=rule,
        algorithm=request.algorithm,
        bytes_per_row=request.bytes_per_row,
    )
    times["marks"] = [
        f"{'*' if extrapolated else ''}{'!' if misfits else ''}"
        for extrapolated, misfits in zip(times["extrapolated"], times["misfits"], strict=True)
    ]
    return frame.merge(times, on=["ep", "layer", "phase"], how="left", validate="one_to_one")


def _model_notes(model: NetworkModel, algorithm: str) -> list[str]:
    from observatory.analysis.network.words import model_notes
    from observatory.run.usable_cores import core_sentence

    notes = [*model.notes, *model_notes(model, algorithm), *map(core_sentence, model.short_of_cores)]
    return [f"the network model: {note}" for note in notes]


def _predictions(model: NetworkModel, algorithm: str, frame: pd.DataFrame) -> dict[str, Any]:
    """What a reader of predicted times must know, in codes and values."""
    from observatory.analysis.network.comparison import compare_layouts
    from observatory.run.usable_cores import share_document

    fit = model.of(algorithm)
    return {
        "network": {
            "verdict": None if fit.verdict is None else fit.verdict.model_dump(mode="json"),
            "misfits": [misfit.model_dump(mode="json") for misfit in fit.misfits],
            "short_of_cores": [share_document(share) for share in model.short_of_cores],
        },
        "comparisons": frame_records(compare_layouts(fit, frame)),
    }


def _matrix(run: Run, row: dict[str, Any], placement: PlacementChoice) -> list[list[float]]:
    """Assignments from source rank i to expert rank j, summed over the run."""
    ep = int(row["ep"])
    pairs = traffic_matrix(run, ep=ep, layer=row["layer"], phase=row["phase"], placement=placement)
    matrix: list[list[float]] = pairs["assignments"].to_numpy().reshape(ep, ep).tolist()
    return matrix


def _refuse_misfits(run: Run, degrees: Sequence[int], rule: PlacementChoice) -> None:
    """Name all degrees that do not divide the experts, where no file places them."""
    if rule not in ("auto", "linear", "round-robin"):
        return
    run_ranks = run.manifest.topology.ranks if rule == "auto" else None
    for experts in sorted({layer.experts for layer in run.manifest.model.moe_layers}):
        misfits = [str(ep) for ep in degrees if ep != run_ranks and experts % ep]
        if misfits:
            fitting = [str(ep) for ep in range(1, experts + 1) if experts % ep == 0]
            raise PlacementError(
                f"EP {listing(misfits, most=8)} {'does' if len(misfits) == 1 else 'do'} not divide "
                f"{experts} experts; degrees that fit: {', '.join(fitting)}"
            )

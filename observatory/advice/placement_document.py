"""The document and the table of ``observatory place``, and the placement file that it writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from observatory.advice.placement import PlacementAdvice
from observatory.advice.placement_problem import layout_file
from observatory.analysis.columns import Column, Table
from observatory.run.documents.printed import printed_document

COLUMNS = (
    Column(name="candidate", title="placement", text=True, key=True),
    Column(name="replicas", title="replicas", legend="copies of experts beyond one of each, in each layer"),
    Column(
        name="promised",
        title="promised",
        digits=3,
        legend="busiest rank over the mean, on the steps that it was made on",
    ),
    Column(
        name="held_out",
        title="held out",
        digits=3,
        interval=("held_out_low", "held_out_high"),
        legend="the same on the steps after them, with its 90 % interval (bootstrap over steps)",
    ),
    Column(name="moved", title="moved", digits=1, legend="experts that ranks have to receive, per layer"),
)
NODES_COLUMN = Column(
    name="nodes_per_token", title="nodes", digits=2, legend="that a token has experts on, of held-out samples"
)

TIME_COLUMN = Column(
    name="step_us", title="step us", digits=1, legend="predicted time of all layers in a held-out step"
)


def placement_document(advice: PlacementAdvice, problems: Sequence[str] = ()) -> dict[str, Any]:
    """The advice as ``--json`` prints it (docs/json.md)."""
    return printed_document(
        "placement",
        {
            "ranks": advice.ranks,
            "objective": advice.rules.objective,
            "dispatch": advice.rules.dispatch,
            "layers": list(advice.layers),
            "problems": list(problems),
            "train_steps": advice.steps[0],
            "held_out_steps": advice.steps[1],
            "bound": advice.bound,
            "floor": advice.floor,
            "gain": advice.gain.value,
            "gain_low": advice.gain.low,
            "gain_high": advice.gain.high,
            "verdict": [reason.document() for reason in advice.verdict],
            "candidates": [
                {
                    "candidate": candidate.name,
                    "replicas": candidate.replicas,
                    "promised": candidate.promised,
                    "held_out": candidate.held_out.value,
                    "held_out_low": candidate.held_out.low,
                    "held_out_high": candidate.held_out.high,
                    "moved": candidate.moved,
                    "nodes_per_token": candidate.nodes_per_token,
                    "step_us": candidate.step_us,
                }
                for candidate in advice.candidates
            ],
        },
    )


def placement_tables(document: dict[str, Any]) -> list[Table]:
    """The candidates of a placement document."""
    bound = "" if document["bound"] is None else f"; lower bound {document['bound']:.3f}"
    floor = "" if document["floor"] is None else f", sampling floor {document['floor']:.3f}"
    counted = ", activated experts" if document["objective"] == "activated" else ""
    title = (
        f"{document['ranks']} ranks{counted}, made on {document['train_steps']} steps, "
        f"{document['held_out_steps']} held out{bound}{floor}"
    )
    has_nodes = any(row["nodes_per_token"] is not None for row in document["candidates"])
    has_times = any(row["step_us"] is not None for row in document["candidates"])
    columns = COLUMNS + (NODES_COLUMN,) * has_nodes + (TIME_COLUMN,) * has_times
    return [Table(name="candidates", columns=columns, rows=document["candidates"], title=title)]


def placement_file(advice: PlacementAdvice, experts: int) -> dict[str, Any]:
    """The chosen layout as a placement file: for every layer and expert the ranks that hold it."""
    return layout_file(advice.chosen.slot_LPK, experts, advice.layers, advice.chosen.share_LPK)

"""``observatory routing``: imbalance per layer and phase."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from observatory.cli.options import JsonOption

_COLUMNS = {
    "layer": "layer",
    "phase": "phase",
    "tokens": "tokens",
    "gini": "Gini",
    "interval": "95 %",
    "gini_floor": "floor",
    "expert_max_over_mean": "max/ mean",
    "expert_max_over_mean_floor": "floor",
    "cv": "CV",
    "half": "half in",
    "idle_experts": "idle",
    "step_gini_p50": "step Gini",
    "step_gini_floor": "floor",
}


def routing(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    bootstrap: Annotated[
        int, typer.Option(min=0, max=100_000, help="Bootstrap samples over steps; 0 for none.")
    ] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
    json: JsonOption = False,
) -> None:
    """Show the imbalance of expert loads per layer and phase, beside its sampling floor."""
    from observatory.analysis.routing import (
        collect_layer_loads,
        layer_metrics,
        local_consistency,
        standing_committee,
    )
    from observatory.cli.output import print_json, print_table, say
    from observatory.errors import RunError
    from observatory.run import open_run
    from observatory.run.documents.writing import frame_records
    from observatory.run.gaps import gap_document

    opened = open_run(run)
    loads = collect_layer_loads(opened)
    rows = [
        {**row, "committee": standing_committee(loads[row["phase"], row["layer"]].load_E)}
        for row in frame_records(layer_metrics(loads, bootstrap=bootstrap, seed=seed))
    ]
    for problem in opened.problems:
        say(f"note: {problem}")
    if not rows:
        raise RunError(f"{run} holds no routing rows: no step was recorded; profile again with at least one")
    if json:
        print_json(
            {
                "run_id": opened.manifest.run_id,
                "model": opened.manifest.model.name,
                "data": opened.manifest.data.condition if opened.manifest.data else None,
                "problems": list(opened.problems),
                "gaps": [gap_document(gap) for gap in opened.gaps],
                "layers": rows,
                "local_consistency": frame_records(local_consistency(opened.token_samples())),
            }
        )
        return
    print_table(
        list(_COLUMNS.values()),
        [
            [{**row, "interval": _interval(row), "half": _size(row)}[name] for name in _COLUMNS]
            for row in rows
        ],
        title=f"{opened.manifest.model.name}: assignments over {_experts(rows)} experts, whole run",
    )
    say("95 %: bootstrap over steps; floor: what uniform routing of as many tokens shows; half in: fewest")
    say("experts that take half of the assignments; definitions in docs/metrics.md")


def _interval(row: dict[str, Any]) -> str | None:
    low, high = row["gini_low"], row["gini_high"]
    return None if low is None or high is None else f"{low:.3f}-{high:.3f}"


def _size(row: dict[str, Any]) -> int | None:
    return None if row["committee"] is None else len(row["committee"])


def _experts(rows: list[dict[str, Any]]) -> str:
    return ", ".join(str(count) for count in sorted({row["experts"] for row in rows}))

"""``observatory routing``: imbalance per layer and phase."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from observatory.cli.options import JsonOption

__all__ = ["routing"]

_COLUMNS = {
    "layer": "layer",
    "phase": "phase",
    "experts": "E",
    "top_k": "K",
    "tokens": "tokens",
    "gini": "Gini",
    "gini_low": "low",
    "gini_high": "high",
    "gini_floor": "floor",
    "expert_max_over_mean": "expert max/mean",
    "expert_max_over_mean_floor": "its floor",
    "cv": "CV",
    "entropy_bits": "entropy (bits)",
    "idle_experts": "idle",
    "step_gini_p50": "median step Gini",
    "step_gini_floor": "step floor",
}


def routing(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    bootstrap: Annotated[int, typer.Option(min=0, help="Bootstrap samples over steps; 0 for none.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    json: JsonOption = False,
) -> None:
    """Show the imbalance of expert loads per layer and phase, beside its sampling floor."""
    from observatory.cli.output import print_json, print_table, say
    from observatory.documents import frame_records
    from observatory.routing.summary import layer_metrics
    from observatory.store import open_run

    opened = open_run(run)
    metrics = layer_metrics(opened, bootstrap=bootstrap, seed=seed)
    rows = frame_records(metrics)
    for problem in opened.problems:
        say(f"note: {problem}")
    if json:
        print_json(
            {
                "run_id": opened.manifest.run_id,
                "model": opened.manifest.model.name,
                "data": opened.manifest.data.condition if opened.manifest.data else None,
                "problems": list(opened.problems),
                "layers": rows,
            }
        )
        return
    print_table(
        list(_COLUMNS.values()),
        [[row[name] for name in _COLUMNS] for row in rows],
        title=f"{opened.manifest.model.name}: imbalance of assignments over experts, whole run "
        f"(low/high: 95 % bootstrap interval over steps)",
    )

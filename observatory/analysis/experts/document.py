"""The document of ``observatory bench experts`` and its tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from observatory.analysis.columns import Column, Table
from observatory.analysis.experts.cost import ExpertCost, FormTrial
from observatory.run.documents.expert_bench import ExpertBench
from observatory.run.documents.printed import printed_document
from observatory.run.usable_cores import share_document, short_of_cores

COEFFICIENT_COLUMNS = (
    Column(name="term", title="term", text=True, key=True),
    Column(name="us_per_unit", title="us per unit", legend="a unit is a call, an expert or a row"),
    Column(name="meaning", title="which means", text=True),
)
FORM_COLUMNS = (
    Column(name="form", title="form", text=True, key=True),
    Column(name="parameters", title="parameters"),
    Column(
        name="mean_error",
        title="mean error",
        unit="%",
        digits=1,
        legend="of predictions of held-out points; it decides",
    ),
    Column(name="median_error", title="median error", unit="%", digits=1),
    Column(name="p90_error", title="p90 error", unit="%", digits=1),
    Column(name="chosen", title="chosen", text=True),
)
POINT_COLUMNS = (
    Column(name="assignments", title="assignments", key=True),
    Column(name="activated", title="activated", key=True, legend="experts with at least one assignment"),
    Column(name="median_us", title="time", unit="us"),
    Column(name="p10_us", title="p10", unit="us", wide=True, legend="of the repeats, as is p90"),
    Column(name="p90_us", title="p90", unit="us"),
    Column(name="predicted_us", title="fitted", unit="us"),
    Column(name="error", title="off by", unit="%", digits=0, signed=True),
)

_TERMS = ("call", "activated expert", "row", "row beyond the knee")


def experts_document(bench: ExpertBench, cost: ExpertCost, trials: Sequence[FormTrial]) -> dict[str, Any]:
    """What a benchmark of experts measured and what was fitted, as ``--json`` prints it (docs/json.md)."""
    content = {
        "model": bench.model,
        "layer": bench.layer,
        "shape": bench.shape.model_dump(mode="json"),
        "experts_here": bench.experts_here,
        "device": bench.device,
        "repeats": len(bench.points[0].us_R),
        "notes": list(bench.notes),
        "short_of_cores": [
            share_document(share) for share in short_of_cores([] if bench.cores is None else [bench.cores])
        ],
        "form": cost.form.name,
        "median_error": cost.median_error,
        "p90_error": cost.p90_error,
        "repeat_noise": repeat_noise(bench),
        "even_rows": even_rows(cost, bench.experts_here),
        "idle_us": cost.idle_s * 1e6,
        "shared_us": None if cost.shared_F is None else [part * 1e6 for part in cost.shared_F],
        "local_us": None if cost.local_F is None else [part * 1e6 for part in cost.local_F],
        "coefficients": _coefficients(cost),
        "forms": [
            {
                "form": trial.form.name,
                "meaning": trial.form.meaning,
                "parameters": trial.parameters,
                "mean_error": trial.error,
                "median_error": float(np.median(trial.error_N)),
                "p90_error": float(np.quantile(trial.error_N, 0.9)),
                "chosen": trial.form.name == cost.form.name,
            }
            for trial in trials
        ],
        "points": [
            {
                "assignments": point.assignments,
                "activated": point.activated,
                "median_us": point.median_us,
                "p10_us": float(np.quantile(point.us_R, 0.1)),
                "p90_us": float(np.quantile(point.us_R, 0.9)),
                "predicted_us": predicted_us,
                "error": predicted_us / point.median_us - 1.0 if point.assignments else 0.0,
            }
            for point in bench.points
            for predicted_us in [1e6 * float(cost.seconds(point.assignments, point.activated))]
        ],
    }
    return printed_document("bench_experts", content)


def experts_tables(document: dict[str, Any]) -> list[Table]:
    """Coefficients, forms and points."""
    shape = document["shape"]
    title = (
        f"{document['experts_here']} of {shape['experts']} experts of hidden {shape['hidden']}, intermediate "
        f"{shape['intermediate']}, {shape['dtype']}, on {document['device']}: median of {document['repeats']}"
    )
    form = f"{document['form']}: {_meaning(document)}"
    noise = document["repeat_noise"]
    forms = "forms of the time" + (
        "" if noise is None else f"; repeats leave a point uncertain by {noise:.1%}".replace("%", " %")
    )
    return [
        Table(name="coefficients", columns=COEFFICIENT_COLUMNS, rows=document["coefficients"], title=form),
        Table(name="forms", columns=FORM_COLUMNS, rows=document["forms"], title=forms),
        Table(name="points", columns=POINT_COLUMNS, rows=document["points"], title=title),
    ]


def even_rows(cost: ExpertCost, experts: int) -> float | None:
    """Assignments at which rows take as long as everything else with all experts activated; None for never.

    With fewer, a rank's time hardly depends on how many assignments it has.
    """
    call_s, expert_s, row_s, _ = cost.coefficient_F
    return None if row_s <= 0 else (call_s + expert_s * experts) / row_s


def repeat_noise(bench: ExpertBench) -> float | None:
    """Median over points of the relative standard error of their median; None with fewer than three repeats.

    A fit cannot be expected to predict points better than they are known.
    """
    if len(bench.points[0].us_R) < 3:
        return None
    errors = []
    for point in bench.points:
        us_R = np.array(point.us_R)
        scatter = np.subtract(*np.quantile(us_R, [0.75, 0.25])) / 1.349
        errors.append(1.253 * scatter / np.sqrt(len(us_R)) / point.median_us)
    return float(np.median(errors))


def _meaning(document: dict[str, Any]) -> str:
    return str(next(form["meaning"] for form in document["forms"] if form["chosen"]))


def _coefficients(cost: ExpertCost) -> list[dict[str, Any]]:
    shape, (_, expert_s, row_s, _) = cost.shape, cost.coefficient_F
    used = (True, cost.form.experts, True, cost.form.knee is not None)
    meanings = [
        "",
        f"{shape.expert_bytes / expert_s / 1e9:.3g} GB/s of its weights" if expert_s > 0 else "",
        f"{shape.flops / row_s / 1e9:.3g} GFLOP/s" if row_s > 0 else "",
        f"added to that of a row, beyond {cost.form.knee} rows",
    ]
    return [
        {"term": term, "us_per_unit": value * 1e6, "meaning": meaning}
        for term, value, meaning, is_used in zip(_TERMS, cost.coefficient_F, meanings, used, strict=True)
        if is_used
    ]

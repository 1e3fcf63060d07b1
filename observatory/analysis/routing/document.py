"""The document of ``observatory routing`` and its table."""

from __future__ import annotations

from typing import Any

from observatory.analysis.columns import Column, Table
from observatory.analysis.routing.committee import standing_committee
from observatory.analysis.routing.loads import collect_layer_loads
from observatory.analysis.routing.locality import local_consistency
from observatory.analysis.routing.summary import layer_metrics
from observatory.errors import RunError
from observatory.run import Run
from observatory.run.documents.printed import printed_document
from observatory.run.documents.writing import frame_records
from observatory.run.gaps import gap_document

#: Of `layer_metrics`, with the standing committee.
LAYER_COLUMNS = (
    Column(name="layer", title="layer", key=True),
    Column(name="phase", title="phase", text=True, key=True),
    Column(name="tokens", title="tokens"),
    Column(
        name="gini",
        title="Gini",
        digits=3,
        interval=("gini_low", "gini_high"),
        legend="0 is even; with its 95 % interval (bootstrap over steps)",
    ),
    Column(
        name="gini_floor",
        title="Gini floor",
        digits=3,
        legend="what uniform routing of as many tokens shows",
    ),
    Column(name="gini_excess", title="excess", digits=3, wide=True, legend="Gini above its floor"),
    Column(name="expert_max_over_mean", title="max/mean", digits=2, legend="busiest expert over the mean"),
    Column(name="expert_max_over_mean_floor", title="max/mean floor", digits=2, wide=True),
    Column(name="cv", title="CV", digits=3, wide=True, legend="standard deviation over mean"),
    Column(name="entropy_bits", title="entropy", unit="bits", digits=2, wide=True),
    Column(
        name="committee_experts",
        title="half in",
        of="experts",
        legend="fewest experts that take half of the assignments",
    ),
    Column(name="idle_experts", title="idle", of="experts", wide=True, legend="experts without a token"),
    Column(name="step_gini_p50", title="step Gini", digits=3, wide=True, legend="median over single steps"),
    Column(name="step_gini_floor", title="step Gini floor", digits=3, wide=True),
)


def routing_document(run: Run, *, bootstrap: int = 200, seed: int = 0) -> dict[str, Any]:
    """Imbalance of every layer in every phase, as ``--json`` prints it (docs/json.md).

    Args:
        run: an open run.
        bootstrap: resamples of the intervals, 0 for none.
        seed: of the resamples.

    Raises:
        RunError: the run holds no routing rows.
        LoadError: loads are negative or inconsistent.
    """
    loads = collect_layer_loads(run)
    rows = []
    for row in frame_records(layer_metrics(loads, bootstrap=bootstrap, seed=seed)):
        committee = standing_committee(loads[row["phase"], row["layer"]].load_E)
        size = None if committee is None else len(committee)
        members = None if committee is None else committee.tolist()
        rows.append({**row, "committee": members, "committee_experts": size})
    if not rows:
        raise RunError(
            f"{run.path} holds no routing rows: no step was recorded; profile again with at least one"
        )
    manifest = run.manifest
    return printed_document(
        "routing",
        {
            "run_id": manifest.run_id,
            "model": manifest.model.name,
            "data": manifest.data.condition if manifest.data else None,
            "problems": list(run.problems),
            "gaps": [gap_document(gap) for gap in run.gaps],
            "layers": rows,
            "local_consistency": frame_records(local_consistency(run.token_samples())),
        },
    )


def routing_tables(document: dict[str, Any]) -> list[Table]:
    """The layers of a routing document."""
    experts = ", ".join(str(count) for count in sorted({row["experts"] for row in document["layers"]}))
    title = f"{document['model']}: assignments over {experts} experts, whole run"
    return [Table(name="layers", columns=LAYER_COLUMNS, rows=document["layers"], title=title)]

"""The document of ``observatory compare`` and its tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from observatory.analysis.columns import Column, Table
from observatory.analysis.compare.comparing import FALSE_DISCOVERY, Comparison, Row
from observatory.analysis.compare.metrics import METRICS
from observatory.analysis.compare.series import LEVEL
from observatory.analysis.compare.subject import Subject
from observatory.analysis.compare.words import CompareCode, sentence
from observatory.reasons import Reason
from observatory.run.documents.printed import printed_document

#: What the columns of differences hold.
LEGEND = (
    "change: with its 95 % interval; same: within noise; perhaps: the interval leaves out 0, as that of one "
    "of so many rows would by chance"
)
#: Layers that a table shows at most, those that changed most.
_MOST_LAYERS = 12
_VERDICTS = {
    "unknown": "not known",
    "not_compared": "not compared",
    "perhaps_higher": "perhaps higher",
    "perhaps_lower": "perhaps lower",
}

DIFFERENCE_COLUMNS = (
    Column(name="name", title="metric", text=True, key=True),
    Column(name="base", title="baseline", digits=None),
    Column(name="other", title="other", digits=None),
    Column(
        name="relative",
        title="change",
        unit="%",
        digits=1,
        signed=True,
        interval=("relative_low", "relative_high"),
    ),
    Column(name="verdict_text", title="verdict", text=True),
    Column(name="adjusted_p", title="adjusted p", wide=True),
    Column(name="paired", title="paired", wide=True, legend="matching steps were compared one by one"),
    Column(name="steps", title="steps", wide=True),
)
LAYER_COLUMNS = (
    DIFFERENCE_COLUMNS[0],
    Column(name="layer", title="layer", key=True, legend="place among the MoE layers, from 0"),
    *DIFFERENCE_COLUMNS[1:],
)


def compare_document(comparisons: Sequence[Comparison], lonely: Sequence[Reason] = ()) -> dict[str, Any]:
    """Subjects compared with a baseline, as ``--json`` prints it (docs/json.md).

    Args:
        comparisons: one for each pair.
        lonely: subjects without a counterpart.
    """
    return printed_document(
        "compare",
        {
            "level": LEVEL,
            "false_discovery": FALSE_DISCOVERY,
            "without_counterpart": [_reason_document(reason) for reason in lonely],
            "comparisons": [
                {
                    "base": subject_document(item.base),
                    "other": subject_document(item.other),
                    "alignment": item.alignment.document(),
                    "confounders": [_reason_document(reason) for reason in item.confounders],
                    "rows": [row_document(row) for row in item.rows],
                    "layers": [row_document(row) for row in item.layers],
                }
                for item in comparisons
            ],
        },
    )


def subject_document(subject: Subject) -> dict[str, Any]:
    """What a subject is."""
    return {
        "name": subject.name,
        "source": subject.source,
        "run_id": subject.run_id,
        "model": subject.model,
        "mixer": subject.mixer,
        "data": subject.condition,
        "started_unix_s": subject.started_unix_s,
        "training_step": subject.training_step,
        "moe_layers": len(subject.experts_L),
        "simulated_device": subject.simulated_device,
        "problems": list(subject.problems),
    }


def row_document(row: Row) -> dict[str, Any]:
    """A row, values in the unit of its metric."""
    difference = row.difference
    values = {
        name: None if difference is None else getattr(difference, name)
        for name in ("difference", "low", "high", "relative", "relative_low", "relative_high", "p")
    }
    return {
        "name": row.key.name,
        "phase": row.key.phase,
        "metric": row.key.metric,
        "unit": METRICS[row.key.metric].unit,
        "layer": row.key.layer,
        "other_layer": row.other_layer,
        "ep": row.key.ep,
        "base": row.base,
        "other": row.other,
        **values,
        "adjusted_p": row.adjusted_p,
        "paired": None if difference is None else difference.paired,
        "steps": None if difference is None else difference.steps,
        "runs": None if difference is None else difference.runs,
        "verdict": row.verdict,
        "reason": None if row.reason is None else _reason_document(row.reason),
    }


def _reason_document(reason: Reason) -> dict[str, Any]:
    return {**reason.document(), "sentence": sentence(reason)}


def compare_tables(item: Mapping[str, Any]) -> list[Table]:
    """Of one comparison the rows of the whole run by phase, and the layers that changed most."""
    tables = []
    for phase in dict.fromkeys(row["phase"] for row in item["rows"]):
        rows = [
            shown_row(row, phase=False)
            for row in item["rows"]
            if row["phase"] == phase and row["difference"] is not None
        ]
        if rows:
            tables.append(
                Table(name=phase, columns=DIFFERENCE_COLUMNS, rows=rows, title=f"{phase}, all layers")
            )
    changed = [row for row in item["layers"] if row["verdict"] in ("higher", "lower")]
    changed.sort(key=lambda row: -abs(row["relative"] or 0.0))
    tested = sum(row["adjusted_p"] is not None for row in item["layers"])
    if changed:
        shown = [shown_row(row) for row in changed[:_MOST_LAYERS]]
        of_most = f", the {len(shown)} that changed most" if len(shown) < len(changed) else ""
        title = f"{len(changed)} of {tested} rows of single layers changed{of_most}"
        tables.append(Table(name="layers", columns=LAYER_COLUMNS, rows=shown, title=title))
    return tables


def heading(item: Mapping[str, Any]) -> list[str]:
    """What is compared."""
    return [f"baseline: {_place(item['base'])}", f"other:    {_place(item['other'])}"]


def compare_csv(document: Mapping[str, Any]) -> list[Table]:
    """Every row of every comparison, and models next to each other, for programs."""
    return [
        Table(
            name=name,
            columns=(),
            rows=[
                {
                    "base_name": item["base"]["name"],
                    "other_name": item["other"]["name"],
                    **row,
                    "reason": (row["reason"] or {}).get("code"),
                }
                for item in document["comparisons"]
                for row in item[name]
            ],
        )
        for name in ("rows", "layers")
    ] + [Table(name=name, columns=(), rows=document[name]) for name in ("architectures", "premises")]


def shown_row(row: Mapping[str, Any], *, phase: bool = True) -> dict[str, Any]:
    """A row with its name and verdict in words."""
    ep = "" if row["ep"] is None else f" EP {row['ep']}"
    is_certain = row["relative_low"] == row["relative_high"]
    return {
        **row,
        **({"relative_low": None, "relative_high": None} if is_certain else {}),
        "name": f"{row['name'] if phase else row['metric']}{ep}",
        "verdict_text": _VERDICTS.get(row["verdict"], row["verdict"]),
    }


def compare_sentences(item: Mapping[str, Any]) -> Iterator[str]:
    """What must be known of one comparison: alignment, confounders, and what is not compared."""
    if item["alignment"]["code"] != CompareCode.LAYERS_ALIKE:
        yield sentence_of(item["alignment"])
    for reason in item["confounders"]:
        yield reason["sentence"]
    refused: dict[str, list[str]] = {}
    for row in item["rows"]:
        if row["reason"] is not None:
            what = "not known" if row["verdict"] == "unknown" else "not compared"
            refused.setdefault(f"{what}, {row['reason']['sentence']}", []).append(row["name"])
    for text, names in refused.items():
        yield f"{', '.join(dict.fromkeys(names))}: {text}"


def sentence_of(reason: Mapping[str, Any]) -> str:
    """A reason of a document in words."""
    values = {name: value for name, value in reason.items() if name not in ("code", "sentence")}
    return sentence(Reason(CompareCode(reason["code"]), values))


def _place(subject: Mapping[str, Any]) -> str:
    model = subject["model"] or "?"
    of = f"{model} on {subject['data']}" if subject["data"] else model
    when = subject["started_unix_s"]
    stamp = "" if when is None else f", {datetime.fromtimestamp(when, UTC):%Y-%m-%d %H:%M} UTC"
    simulated = ", simulated device" if subject["simulated_device"] else ""
    return f"{subject['name']} ({of}{stamp}{simulated})"

"""The document and the table of ``observatory route-fetch RUN``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from observatory.advice.route_fetch import ExpertAdvice
from observatory.analysis.columns import Column, Table
from observatory.analysis.route_fetch.experts import Choice
from observatory.run.documents.printed import printed_document

EXPERT_COLUMNS = (
    Column(name="layer", title="layer", key=True),
    Column(name="fetched", title="fetch", legend="experts whose weights come here in every step"),
    Column(name="kept", title="keep", legend="experts with a copy on every rank"),
    Column(name="saved_us", title="saved", unit="us", digits=0, legend="of a step, on held-out steps"),
    Column(name="busiest_tokens", title="busiest", digits=0, legend="tokens of the busiest expert in a step"),
    Column(name="route_us", title="its tokens", unit="us", digits=0, legend="to move these, and its weights"),
    Column(name="fetch_us", title="its weights", unit="us", digits=0),
    Column(name="experts_fetched", title="experts to fetch", text=True, wide=True),
    Column(name="experts_kept", title="experts to keep", text=True, wide=True),
)


def expert_document(advice: ExpertAdvice, problems: Sequence[str] = ()) -> dict[str, Any]:
    """The advice as ``route-fetch RUN --json`` prints it (docs/json.md)."""
    decisions = advice.decisions
    fetched_LE, kept_LE = (decisions.choice_LE == choice for choice in (Choice.FETCH, Choice.KEEP))
    busiest_L = decisions.tokens_LE.argmax(axis=1)
    return printed_document(
        "route_fetch_experts",
        {
            "grade": advice.constants.grade,
            "source": advice.constants.source,
            "ranks": advice.ranks,
            "placement": advice.placement,
            "train_steps": decisions.steps[0],
            "held_out_steps": decisions.steps[1],
            "today_us": decisions.today_us,
            "chosen_us": decisions.chosen_us,
            "saved_us": decisions.saved_us.value,
            "saved_us_low": decisions.saved_us.low,
            "saved_us_high": decisions.saved_us.high,
            "saved_experts_us": decisions.saved_experts_us,
            "keep_bytes": decisions.keep_bytes,
            "keep_us": decisions.keep_us,
            "break_even_tokens": decisions.break_even_tokens,
            "problems": list(problems),
            "verdict": [reason.document() for reason in advice.verdict],
            "layers": [
                {
                    "layer": layer,
                    "fetched": int(fetched_LE[index].sum()),
                    "kept": int(kept_LE[index].sum()),
                    "saved_us": float(decisions.saved_us_L[index]),
                    "busiest_tokens": float(decisions.tokens_LE[index, busiest_L[index]]),
                    "route_us": float(decisions.route_us_LE[index, busiest_L[index]]),
                    "fetch_us": float(decisions.fetch_us_LE[index, busiest_L[index]]),
                    "experts_fetched": np.flatnonzero(fetched_LE[index]).tolist(),
                    "experts_kept": np.flatnonzero(kept_LE[index]).tolist(),
                }
                for index, layer in enumerate(advice.layers)
            ],
        },
    )


def expert_tables(document: dict[str, Any]) -> list[Table]:
    """A row for each layer."""
    title = (
        f"{document['ranks']} ranks, placement {document['placement']}, chosen on {document['train_steps']} "
        f"steps, {document['held_out_steps']} held out; constants {document['grade']}: {document['source']}"
    )
    return [Table(name="layers", columns=EXPERT_COLUMNS, rows=document["layers"], title=title)]

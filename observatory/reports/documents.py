"""The results of a report's runs as the documents of commands, which a page holds for programs.

They have the rows and the columns that `observatory compare` reads, under the names of docs/json.md.
"""

from __future__ import annotations

from typing import Any

from observatory.reports.frames.report import ReportFrames
from observatory.run.documents.printed import printed_document
from observatory.run.documents.writing import frame_records

_LAYER_COLUMNS = (
    "layer", "phase", "experts", "tokens", "gini", "gini_low", "gini_high", "entropy_bits", "idle_experts",
)  # fmt: skip
_ENERGY_COLUMNS = {
    "phases": ("source_rank", "device_uuid", "phase", "span", "power_mw", "power_low_mw", "power_high_mw"),
    "tokens": ("source_rank", "phase", "mj_per_token", "mj_per_token_low", "mj_per_token_high"),
    "totals": ("phase", "mj_per_token", "mj_per_token_low", "mj_per_token_high"),
}


def run_documents(frames: ReportFrames) -> list[dict[str, Any]]:
    """Routing and energy of each run that has them."""
    documents = []
    for fact in frames.facts:
        about = {
            "run_id": fact.manifest.run_id,
            "model": fact.manifest.model.name,
            "data": fact.manifest.data.condition if fact.manifest.data else None,
        }
        layers = frames.layers[frames.layers["run"] == fact.run] if len(frames.layers) else frames.layers
        if len(layers):
            rows = frame_records(layers[list(_LAYER_COLUMNS)])
            documents.append(printed_document("routing", {**about, "layers": rows}))
        if frames.power is not None and fact.run in frames.power.runs:
            energy = {}
            for name, columns in _ENERGY_COLUMNS.items():
                frame = getattr(frames.power, name)
                known = [column for column in columns if column in frame]
                energy[name] = frame_records(frame[frame["run"] == fact.run][known]) if len(frame) else []
            documents.append(printed_document("energy", {**about, **energy}))
    return documents

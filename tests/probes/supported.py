"""The table of docs/supported-models.md, from a run over every family.

``python -m tests.probes.supported`` prints it.
"""

from __future__ import annotations

import torch

from probes.routing.discover import find_sites
from tests.probes.counting import read_loads
from tests.probes.families import NOT_ROUTED, moe_families, tiny_inputs, tiny_model

NOTES = {
    "deepseek_v4": "first layers route by token id (hash); read alike",
    "doge": "one embedding row per expert",
    "ernie4_5_vl_moe": "text and vision experts are two MoE layers of one block",
    "jetmoe": "mixture of attention and mixture of MLPs, numbered one after the other",
    "llama4": "all experts get all tokens, scaled by scores that are zero where not chosen",
    "longcat_flash": "ids beyond E are zero-computation experts",
    "nllb_moe": "the router's gates are counted; see below",
    "switch_transformers": "one-hot dispatch mask after capacity dropping",
    "zaya": "skipped tokens reach expert 0 with weight zero; not counted",
}


def table() -> list[str]:
    """Markdown lines, one row per family, each row seen in a forward pass."""
    lines = [
        "| family | read from | K | shared | null | experts run as | note |",
        "|---|---|---|---|---|---|---|",
    ]
    for family in moe_families():
        if family in NOT_ROUTED:
            lines.append(f"| {family} | not routed | | | | | {NOT_ROUTED[family]} |")
            continue
        model = tiny_model(family)
        sites = find_sites(model)
        with torch.no_grad(), read_loads(sites) as read:
            model(**tiny_inputs(model))
        assert any(tokens for _, tokens in read.values()), family
        cells = [
            family,
            " and ".join(dict.fromkeys(site.how for site in sites)),
            " or ".join(dict.fromkeys("varies" if s.spec.top_k is None else "fixed" for s in sites)),
            "yes" if any(site.spec.shared_experts for site in sites) else "",
            "yes" if any(site.spec.null_experts for site in sites) else "",
            "eager, grouped_mm" if _has_grouped(model) else "eager",
            NOTES.get(family, ""),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _has_grouped(model: torch.nn.Module) -> bool:
    try:
        model.set_experts_implementation("grouped_mm")
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    print("\n".join(table()))

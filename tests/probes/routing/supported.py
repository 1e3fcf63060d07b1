"""The tables of docs/supported-models.md, from runs over every family and the frameworks that are installed.

``python -m tests.probes.routing.supported`` prints them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch

from observatory.probes.options import Verify
from observatory.probes.routing.discover import find_sites
from observatory.probes.routing.probe import verify_sites
from observatory.probes.routing.sites import RoutingSite
from observatory.probes.routing.words import Witness
from tests.probes.routing.counting import read_loads
from tests.probes.routing.families import NOT_ROUTED, moe_families, tiny_inputs, tiny_model
from tests.probes.routing.framework_cases import installed_frameworks

NOTES = {
    "deepseek_v4": "first layers route by token id (hash); read alike",
    "doge": "one embedding row per expert",
    "ernie4_5_vl_moe": "text and vision experts are two MoE layers of one block",
    "jetmoe": "mixture of attention and mixture of MLPs, numbered one after the other",
    "llama4": "all experts get all tokens, scaled by scores that are zero where not chosen",
    "longcat_flash": "ids beyond E are zero-computation experts",
    "nllb_moe": "experts compute something else than the gates say; see above",
    "switch_transformers": "one-hot dispatch mask after capacity dropping",
    "zaya": "skipped tokens reach expert 0 with weight zero; not counted",
}


def table() -> list[str]:
    """Markdown lines, one row per family, each row seen in a forward pass."""
    lines = [
        "| family | read from | K | shared | null | experts run as | verified by | note |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for family in moe_families():
        if family in NOT_ROUTED:
            lines.append(f"| {family} | not routed | | | | | | {NOT_ROUTED[family]} |")
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
            _verified(model, sites),
            NOTES.get(family, ""),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def framework_table(frameworks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Markdown lines, one row per case of an installed framework."""
    return [
        f"| {name} | {found['how']} | {_in_words(found[w]['by'] for w in ('first', 'intervention'))} "
        f"| {found['against']} |"
        for name, found in frameworks.items()
    ]


def _verified(model: torch.nn.Module, sites: Sequence[RoutingSite]) -> str:
    """The witnesses that confirmed every layer which a text input reaches."""
    by: list[list[str]] = []
    for verify in ("first", "intervention"):
        verdicts, refusal = verify_sites(
            model, sites, lambda: model(**tiny_inputs(model)), verify=cast(Verify, verify)
        )
        if refusal is not None:
            return "refused"
        by.append([verdict.by for verdict in verdicts if verdict.code != Witness.NOT_CALLED])
    return _in_words(by)


def _in_words(by: Iterable[Iterable[str]]) -> str:
    return ", ".join(dict.fromkeys(name for names in by for name in names))


def _has_grouped(model: torch.nn.Module) -> bool:
    try:
        model.set_experts_implementation("grouped_mm")
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    print("\n".join([*framework_table(installed_frameworks()), "", *table()]))

"""``observatory doctor``: what works here, and why not."""

from __future__ import annotations

from typing import Annotated

import typer

from observatory.cli.options import JsonOption

__all__ = ["doctor"]


def doctor(
    model: Annotated[
        str | None, typer.Option("--model", help="Also list the MoE layers found in this model, and how.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """List what works on this machine; with --model, which MoE layers were found and how they are read."""
    from dataclasses import asdict

    from observatory.cli.output import print_json, print_table
    from observatory.diagnosis import capabilities

    found = [] if model else capabilities()
    layers = _layers(model) if model else []
    if json:
        print_json({"capabilities": [asdict(item) for item in found], "layers": layers})
        return
    if model:
        print_table(
            ["layer", "module", "experts", "top-k", "shared", "null", "read from"],
            [list(layer.values()) for layer in layers],
            title=f"MoE layers of {model}",
        )
        return
    print_table(
        ["what", "works", "detail", "how to get it"],
        [[item.name, "yes" if item.works else "no", item.detail, item.remedy or ""] for item in found],
    )


def _layers(model: str) -> list[dict[str, object]]:
    from observatory.zoo.models import load_model
    from probes.routing.discover import find_sites

    return [
        {
            "layer": site.spec.layer,
            "module": site.spec.module,
            "experts": site.spec.experts,
            "top_k": site.spec.top_k,
            "shared_experts": site.spec.shared_experts,
            "null_experts": site.spec.null_experts,
            "how": site.how,
        }
        for site in find_sites(load_model(model).model)
    ]

"""``observatory doctor``: what works here, and why not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from observatory.cli.options import JsonOption

if TYPE_CHECKING:
    from observatory.locks.status import DeviceStatus
    from observatory.probes.routing.sites import RoutingSite
    from observatory.zoo.models import LoadedModel

#: Sequences and tokens of each that a model is verified with.
_TOKENS = (2, 32)
_WITNESSES: tuple[Literal["rows", "intervention"], ...] = ("rows", "intervention")


def doctor(
    model: Annotated[
        str | None, typer.Option("--model", help="Also list the MoE layers found in this model, and how.")
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="With --model: run it on a few tokens, and hold counts against what experts compute.",
        ),
    ] = False,
    json: JsonOption = False,
) -> None:
    """List what works on this machine; with --model, which MoE layers were found and how they are read."""
    from dataclasses import asdict

    from observatory.cli.output import print_json, print_table
    from observatory.errors import ModelError
    from observatory.host.doctor import capabilities
    from observatory.locks.status import device_report

    if verify and not model:
        raise ModelError("--verify is given without a model; expected --model NAME, too")
    found = [] if model else capabilities()
    devices = [] if model else device_report()
    layers, refusal = _layers(model, verify=verify) if model else ([], None)
    if json:
        print_json(
            {
                "capabilities": [asdict(item) for item in found],
                "devices": [device.document() for device in devices],
                "layers": layers,
            }
        )
    elif model:
        _print_layers(model, layers)
    else:
        print_table(
            ["what", "works", "detail", "how to get it"],
            [[item.name, "yes" if item.works else "no", item.detail, item.remedy or ""] for item in found],
        )
        _print_devices(devices)
    if refusal is not None:
        raise ModelError(refusal)


def _print_layers(model: str, layers: list[dict[str, Any]]) -> None:
    """A table of the MoE layers; where they were verified, by what, and the reason where they were not."""
    from observatory.cli.output import print_table

    columns = ["layer", "module", "experts", "top_k", "shared_experts", "null_experts", "how"]
    headings = ["layer", "module", "experts", "top-k", "shared", "null", "read from"]
    rows = [[layer[column] for column in columns] for layer in layers]
    if any("verified" in layer for layer in layers):
        headings += ["verified by", "why not"]
        for row, layer in zip(rows, layers, strict=True):
            by = [verdict["by"] for verdict in layer["verified"] if verdict["by"] != "none"]
            reasons = [verdict["reason"] for verdict in layer["verified"] if verdict["reason"]]
            row += [", ".join(dict.fromkeys(by)) or "nothing", "; ".join(dict.fromkeys(reasons))]
    print_table(headings, rows, title=f"MoE layers of {model}")


def _print_devices(devices: list[DeviceStatus]) -> None:
    """Two tables: the devices that report something, and what is unavailable and why."""
    from observatory.cli.output import print_table
    from observatory.locks.words import outlook_words

    works = [device for device in devices if device.state == "works"]
    if works:
        print_table(
            ["device", "name", "available", "clocks"],
            [
                [
                    device.selector,
                    f"{device.name or device.kind}{f' ({device.detail})' if device.detail else ''}",
                    ", ".join(field.name for field in device.fields if field.state == "works"),
                    "never locked" if device.clocks is None else outlook_words(device.clocks),
                ]
                for device in works
            ],
            title="Power devices",
        )
    rows: dict[tuple[str, str, str, str], list[str]] = {}
    for device in devices:
        name = device.selector or device.name or f"any {device.kind} device"
        if not device.fields:
            rows[name, device.state, device.detail or "", device.remedy or ""] = ["anything"]
        for field in device.fields:
            if field.state != "works":
                key = (name, field.state, field.detail or "", field.remedy or "")
                rows.setdefault(key, []).append(field.name)
    print_table(
        ["device", "unavailable", "state", "why", "how to get it"],
        [[name, ", ".join(names), *rest] for (name, *rest), names in rows.items()],
        title="Unavailable quantities of power devices",
    )


def _layers(model: str, *, verify: bool) -> tuple[list[dict[str, Any]], str | None]:
    """The MoE layers of a model, and why it is refused when it was verified."""
    from observatory.probes.routing.discover import find_sites
    from observatory.zoo.models import load_model

    loaded = load_model(model)
    sites = find_sites(loaded.model)
    layers = [
        {
            "layer": site.spec.layer,
            "module": site.spec.module,
            "experts": site.spec.experts,
            "top_k": site.spec.top_k,
            "shared_experts": site.spec.shared_experts,
            "null_experts": site.spec.null_experts,
            "how": site.how,
        }
        for site in sites
    ]
    return (layers, _verify(loaded, sites, layers)) if verify else (layers, None)


def _verify(
    loaded: LoadedModel, sites: Sequence[RoutingSite], layers: Sequence[dict[str, Any]]
) -> str | None:
    """Add the verdicts of both witnesses to the layers; gives the first refusal."""
    import torch

    from observatory.probes.routing.proof import verify_sites

    generator = torch.Generator().manual_seed(0)
    device = next(loaded.model.parameters()).device
    ids = torch.randint(loaded.vocabulary_size, _TOKENS, generator=generator).to(device)
    for layer in layers:
        layer["verified"] = []
    first_refusal = None
    for witness in _WITNESSES:
        verdicts, refusal = verify_sites(
            loaded.model, sites, lambda: loaded.model(input_ids=ids), verify=witness
        )
        first_refusal = first_refusal or refusal
        for layer, verdict in zip(layers, verdicts, strict=True):
            layer["verified"].append({"by": verdict.by, "reason": verdict.reason})
    return first_refusal

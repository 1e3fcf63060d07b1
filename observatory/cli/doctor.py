"""``observatory doctor``: what works here, and why not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from observatory.cli.options import JsonOption

if TYPE_CHECKING:
    from probes.power.status import DeviceStatus

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
    from probes.power.status import device_report

    found = [] if model else capabilities()
    devices = [] if model else device_report()
    layers = _layers(model) if model else []
    if json:
        print_json(
            {
                "capabilities": [asdict(item) for item in found],
                "devices": [asdict(device) for device in devices],
                "layers": layers,
            }
        )
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
    _print_devices(devices)


def _print_devices(devices: list[DeviceStatus]) -> None:
    """Two tables: the devices that tell something, and what is not told and why."""
    from observatory.cli.output import print_table

    works = [device for device in devices if device.state == "works"]
    if works:
        print_table(
            ["device", "name", "tells", "clocks"],
            [
                [
                    device.selector,
                    f"{device.name or device.kind}{f' ({device.detail})' if device.detail else ''}",
                    ", ".join(field.name for field in device.fields if field.state == "works"),
                    device.clocks or "never locked",
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
        ["device", "does not tell", "state", "why", "how to get it"],
        [[name, ", ".join(names), *rest] for (name, *rest), names in rows.items()],
        title="What power devices do not tell",
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

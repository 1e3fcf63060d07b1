"""``observatory doctor``: what works here, and why not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from observatory.analysis.columns import Column, Table
from observatory.cli.options import JsonOption

if TYPE_CHECKING:
    from observatory.locks.status import DeviceStatus
    from observatory.probes.routing.sites import RoutingSite
    from observatory.zoo.models import LoadedModel

#: Sequences and tokens of each that a model is verified with.
_TOKENS = (2, 32)
_WITNESSES: tuple[Literal["rows", "intervention"], ...] = ("rows", "intervention")


_CAPABILITIES = (
    Column(name="name", title="what", text=True, key=True),
    Column(name="works", title="works", text=True),
    Column(name="detail", title="detail", text=True),
    Column(name="remedy", title="how to get it", text=True, otherwise=""),
)
_DEVICE_COLUMNS = (
    Column(name="device", title="device", text=True, key=True),
    Column(name="name", title="name", text=True),
    Column(name="available", title="available", text=True),
    Column(name="clocks", title="clocks", text=True),
)
_MISSING_COLUMNS = (
    Column(name="device", title="device", text=True, key=True),
    Column(name="unavailable", title="unavailable", text=True),
    Column(name="state", title="state", text=True),
    Column(name="detail", title="why", text=True),
    Column(name="remedy", title="how to get it", text=True, otherwise=""),
)
_LAYER_COLUMNS = (
    Column(name="layer", title="layer", key=True),
    Column(name="module", title="module", text=True, key=True),
    Column(name="experts", title="experts"),
    Column(name="top_k", title="top-k"),
    Column(name="shared_experts", title="shared"),
    Column(name="null_experts", title="null", legend="experts that compute nothing"),
    Column(name="how", title="read from", text=True),
)
_VERIFIED_COLUMNS = (
    Column(name="verified_by", title="verified by", text=True, otherwise="nothing"),
    Column(name="why_not", title="why not", text=True, otherwise=""),
)


def doctor(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="List the MoE layers of this model instead, and how they are read.",
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="With --model: run it on a few tokens and check the counts against what experts compute.",
        ),
    ] = False,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run",
            metavar="RUN",
            help="Show where the ranks of this run ran instead, and what differs between them.",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """List what works on this machine, the MoE layers of a model, or where the ranks of a run ran."""
    from dataclasses import asdict

    from observatory.cli.output import print_json, print_tables
    from observatory.cli.provenance import here_document, here_table, show_run
    from observatory.errors import ModelError
    from observatory.host.doctor import capabilities
    from observatory.locks.status import device_report
    from observatory.run.documents.printed import printed_document
    from observatory.zoo.models import BUNDLED_NAMES

    if verify and not model:
        raise ModelError("--verify is given without a model; expected --model NAME, too")
    if run is not None:
        if model:
            raise ModelError("--run is given with a model", expected="one of --run and --model")
        show_run(run, json=json)
        return
    found = [] if model else capabilities()
    devices = [] if model else device_report()
    layers, refusal = _layers(model, verify=verify) if model else ([], None)
    if json:
        content = {
            "capabilities": [asdict(item) for item in found],
            "devices": [device.document() for device in devices],
            "layers": layers,
            "bundled_models": list(BUNDLED_NAMES),
            "here": None if model else here_document(),
        }
        print_json(printed_document("doctor", content))
    elif model:
        print_tables([_layer_table(model, layers)])
    else:
        rows = [asdict(item) for item in found]
        rows.append(
            {"name": "bundled models", "works": True, "detail": ", ".join(BUNDLED_NAMES), "remedy": None}
        )
        print_tables(
            [
                Table(name="capabilities", columns=_CAPABILITIES, rows=rows),
                *_device_tables(devices),
                here_table(),
            ]
        )
    if refusal is not None:
        raise ModelError(refusal)


def _layer_table(model: str, layers: list[dict[str, Any]]) -> Table:
    """The MoE layers; where they were verified, by what, and the reason where they were not."""
    rows = []
    for layer in layers:
        verdicts = layer.get("verified", [])
        by = dict.fromkeys(verdict["by"] for verdict in verdicts if verdict["by"] != "none")
        reasons = dict.fromkeys(verdict["reason"] for verdict in verdicts if verdict["reason"])
        rows.append({**layer, "verified_by": ", ".join(by) or None, "why_not": "; ".join(reasons) or None})
    verified = any("verified" in layer for layer in layers)
    columns = _LAYER_COLUMNS + _VERIFIED_COLUMNS if verified else _LAYER_COLUMNS
    return Table(name="layers", columns=columns, rows=rows, title=f"MoE layers of {model}")


def _device_tables(devices: list[DeviceStatus]) -> list[Table]:
    """The devices that can be read, and what is not available and why."""
    from observatory.locks.words import outlook_words

    readable = [
        {
            "device": device.selector,
            "name": f"{device.name or device.kind}{f' ({device.detail})' if device.detail else ''}",
            "available": ", ".join(field.name for field in device.fields if field.state == "works"),
            "clocks": "never locked" if device.clocks is None else outlook_words(device.clocks),
        }
        for device in devices
        if device.state == "works"
    ]
    missing: dict[tuple[str, str, str, str], list[str]] = {}
    for device in devices:
        name = device.selector or device.name or f"any {device.kind} device"
        if not device.fields:
            missing[name, device.state, device.detail or "", device.remedy or ""] = ["anything"]
        for field in device.fields:
            if field.state != "works":
                key = (name, field.state, field.detail or "", field.remedy or "")
                missing.setdefault(key, []).append(field.name)
    rows = [
        {"device": name, "unavailable": ", ".join(names), "state": state, "detail": detail, "remedy": remedy}
        for (name, state, detail, remedy), names in missing.items()
    ]
    tables = [
        Table(name="devices", columns=_DEVICE_COLUMNS, rows=readable, title="Power devices"),
        Table(
            name="unavailable",
            columns=_MISSING_COLUMNS,
            rows=rows,
            title="Unavailable quantities of power devices",
        ),
    ]
    return [table for table in tables if table.rows]


def _layers(model: str, *, verify: bool) -> tuple[list[dict[str, Any]], str | None]:
    """The MoE layers of a model, and why it is refused when it was verified."""
    from observatory.campaign.preflight import check_model

    check_model(model, moe=True)
    from observatory.probes.routing.discover import find_sites  # loads torch
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
            "reading": site.reading,
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

    from observatory.probes.routing.probe import verify_sites

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
            layer["verified"].append({"by": verdict.by, "code": verdict.code, "reason": verdict.reason})
    return first_refusal

"""The documents of ``grid`` and ``power``, and the tables of ``grid``, ``power`` and ``quickstart``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from observatory.analysis.columns import Column, Table, short_names
from observatory.run.documents.printed import printed_document

if TYPE_CHECKING:
    from observatory.campaign.grid import CellResult, GridConfig
    from observatory.run.manifest import RankPower

CELL_COLUMNS = (
    Column(name="model", title="model", text=True, key=True),
    Column(name="data", title="data", text=True, key=True),
    Column(name="state", title="state", text=True),
    Column(name="run_name", title="run", text=True),
)

#: Of what the sampler measured before the program began.
SENSOR_COLUMNS = (
    Column(name="label", title="device", text=True, key=True),
    Column(name="device", title="name", text=True),
    Column(name="idle_power_mw", title="idle", unit="W", scale=1e-3, digits=1),
    Column(name="power_update_ms", title="power", unit="ms", legend="update period of the power reading"),
    Column(name="counter_update_ms", title="counter", unit="ms", legend="that of the energy counter"),
    Column(
        name="counter_over_integral",
        title="counter / integral",
        digits=3,
        legend="energy by the counter over integrated power, in the calibration",
    ),
)  # fmt: skip


def grid_document(out: Path, results: Sequence[CellResult]) -> dict[str, Any]:
    """The cells of a grid, as ``--json`` prints them (docs/json.md)."""
    cells = [
        {
            "model": result.cell.job.model,
            "data": result.cell.job.data,
            "run": str(result.run),
            "state": result.state,
            "error": result.error,
        }
        for result in results
    ]
    return printed_document("grid", {"grid": str(out), "cells": cells})


def grid_table(document: dict[str, Any]) -> Table:
    """One row per cell."""
    rows = [{**cell, "run_name": Path(cell["run"]).name} for cell in document["cells"]]
    return Table(name="cells", columns=CELL_COLUMNS, rows=rows)


def power_document(out: Path, status: RankPower, exit_code: int) -> dict[str, Any]:
    """What was sampled, as ``--json`` prints it (docs/json.md)."""
    content = {"run": str(out), "exit_code": exit_code, "power": status.model_dump(mode="json")}
    return printed_document("power", content)


def power_table(status: RankPower) -> Table:
    """One row per device."""
    short = short_names([device.uuid or "" for device in status.sampled])
    rows = []
    for device in status.sampled:
        calibration = status.calibration.get(device.uuid or "")
        fields = calibration.fields if calibration else {}
        rows.append(
            {
                "label": short[device.uuid or ""],
                "device_uuid": device.uuid,
                "device": device.name,
                "idle_power_mw": calibration.idle_power_mw if calibration else None,
                "power_update_ms": fields["power_mw"].update_period_ms if "power_mw" in fields else None,
                "counter_update_ms": fields["energy_mj"].update_period_ms if "energy_mj" in fields else None,
                "counter_over_integral": calibration.counter_over_integral if calibration else None,
            }
        )
    return Table(name="devices", columns=SENSOR_COLUMNS, rows=rows, title="sensors, as calibrated")


def quickstart_table(config: GridConfig, results: Sequence[CellResult]) -> Table:
    """Gini of every model on every data condition, next to its sampling floor."""
    from observatory.analysis.routing.summary import run_summary
    from observatory.run import open_run
    from observatory.run.documents.writing import frame_records

    rows: dict[str, dict[str, Any]] = {model: {"model": model} for model in config.models}
    for result in results:
        phases = frame_records(run_summary(open_run(result.run)))
        prefill = next(row for row in phases if row["phase"] == "prefill")
        rows[result.cell.job.model] |= {
            result.cell.job.data: prefill["gini"],
            "gini_floor": prefill["gini_floor"],
        }
    columns = (
        Column(name="model", title="model", text=True, key=True),
        *(Column(name=data, title=data, digits=3) for data in config.data),
        Column(name="gini_floor", title="floor", digits=3, legend="what uniform routing shows"),
    )
    title = "Gini of assignments over experts (prefill, whole run, mean over layers)"
    return Table(name="models", columns=columns, rows=list(rows.values()), title=title)

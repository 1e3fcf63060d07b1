"""The documents of ``observatory energy`` and ``reuse show``, and their tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from observatory.analysis.columns import Column, Table, short_names
from observatory.analysis.energy.prefix_cache import PUBLISHED_SAVING, PUBLISHED_SOURCE, ReuseFit, fit_reuse
from observatory.analysis.energy.run_energy import energy_summary
from observatory.analysis.energy.words import reason_words
from observatory.devices.aliasing import TOLERATED
from observatory.run.documents.printed import printed_document
from observatory.run.documents.writing import frame_records
from observatory.text import listing

if TYPE_CHECKING:
    from observatory.run import Run
    from observatory.run.documents.prefix_cache import ReuseMeasurements

_FRAMES = ("devices", "phases", "tokens", "totals", "aliasing")
_LONGEST_UUID = 12

#: Of `EnergySummary.devices`, with a short name of the device.
DEVICE_COLUMNS = (
    Column(name="label", title="device", text=True, key=True),
    Column(name="source_rank", title="rank", key=True),
    Column(name="duration_s", title="seconds", digits=1),
    Column(name="energy_mj", title="energy", unit="J", scale=1e-3),
    Column(
        name="error",
        title="+-",
        unit="%",
        digits=1,
        legend="half of the 90 % interval; calibration of the sensor (about 5 %) left out",
    ),
    Column(name="source", title="from", text=True),
    Column(name="power_mw", title="mean power", unit="W", scale=1e-3, digits=1),
    Column(name="idle_power_mw", title="idle power", unit="W", scale=1e-3, digits=1),
    Column(name="idle_source", title="idle from", text=True, wide=True),
    Column(name="counter_mj", title="by counter", unit="J", scale=1e-3, wide=True),
    Column(name="integral_mj", title="by power", unit="J", scale=1e-3, wide=True),
    Column(
        name="disagreement",
        title="counter / power",
        unit="%",
        digits=1,
        legend="how far the energy counter is above integrated power",
    ),
)

#: Of `EnergySummary.phases`, with the place in one word.
PHASE_COLUMNS = (
    Column(name="place", title="phase", text=True, key=True),
    Column(name="source_rank", title="rank", key=True),
    Column(name="seconds", title="seconds", digits=2),
    Column(
        name="power_mw",
        title="power",
        unit="W",
        scale=1e-3,
        digits=1,
        interval=("power_low_mw", "power_high_mw"),
        legend="with its 90 % interval",
    ),
    Column(name="energy_mj", title="energy", unit="J", scale=1e-3),
    Column(name="above_idle_mj", title="above idle", unit="J", scale=1e-3),
    Column(name="idle_mj", title="idle", unit="J", scale=1e-3, wide=True),
    Column(name="method", title="method", text=True),
    Column(name="source", title="source", text=True, wide=True),
)

#: Of `EnergySummary.tokens` and, where the rank is missing, ``totals``.
TOKEN_COLUMNS = (
    Column(name="phase", title="phase", text=True, key=True),
    Column(name="source_rank", title="rank", key=True, otherwise="all"),
    Column(name="tokens", title="tokens"),
    Column(name="kind", title="kind", text=True),
    Column(
        name="mj_per_token",
        title="energy",
        unit="mJ/token",
        digits=3,
        interval=("mj_per_token_low", "mj_per_token_high"),
        legend="of a rank's devices over its own tokens, with its 90 % interval",
    ),
    Column(name="above_idle_mj_per_token", title="above idle", unit="mJ/token", digits=3),
    Column(name="idle_mj_per_token", title="idle", unit="mJ/token", digits=3, wide=True),
)

#: Of the cells of a `fit_reuse`.
REUSE_COLUMNS = (
    Column(name="cell", title="cell", text=True, key=True),
    Column(name="cached_fraction", title="cached", unit="%", digits=1),
    Column(name="windows", title="windows"),
    Column(
        name="prefill_mj",
        title="energy",
        unit="mJ",
        digits=1,
        interval=("low_mj", "high_mj"),
        legend="of one prefill, with its 90 % interval",
    ),
    Column(name="fitted_mj", title="fitted", unit="mJ", digits=1),
    Column(name="saved", title="saved", unit="%", digits=1, legend="of the energy of a miss"),
)


def energy_document(run: Run, *, seed: int = 0, reuse: ReuseMeasurements | None = None) -> dict[str, Any]:
    """Energy of a run, as ``--json`` prints it (docs/json.md).

    Args:
        run: with power samples.
        seed: of the bootstraps.
        reuse: measurements of prefills to add.

    Raises:
        EnergyError: the run holds no power samples, or none that can be read.
    """
    curve = None if reuse is None else fit_reuse(reuse, seed=seed)
    summary = energy_summary(run, seed=seed)
    powers = [status.power for status in run.manifest.ranks if status.power is not None]
    sampling = [note for power in powers for note in power.notes]
    content = {
        "run_id": run.manifest.run_id,
        "model": run.manifest.model.name,
        "problems": list(dict.fromkeys([*run.problems, *sampling, *map(reason_words, summary.problems)])),
        "problem_codes": [problem.document() for problem in summary.problems],
        **{name: frame_records(getattr(summary, name)) for name in _FRAMES},
        **({} if curve is None else {"reuse": _curve_document(curve)}),
    }
    return printed_document("energy", content)


def energy_tables(document: dict[str, Any]) -> list[Table]:
    """Devices, phases and tokens; what is not known of a run has no table."""
    short = short_names([row["device_uuid"] for row in document["devices"]], shortest=_LONGEST_UUID)
    devices = [
        {**row, "label": f"{row['device'] or ''} {short[row['device_uuid']]}".strip()}
        for row in document["devices"]
    ]
    phases = [{**row, "place": place_text(row)} for row in document["phases"]]
    tokens = [*document["tokens"], *({**row, "source_rank": None} for row in document["totals"])]
    title = f"{document['model']}: energy of the run per device"
    tables = [
        Table(name="devices", columns=DEVICE_COLUMNS, rows=devices, title=title),
        Table(name="phases", columns=PHASE_COLUMNS, rows=phases, title="per phase and span"),
        Table(name="tokens", columns=TOKEN_COLUMNS, rows=tokens, title="per token"),
    ]
    return [table for table in tables if table.rows]


def energy_sentences(document: dict[str, Any]) -> Iterator[str]:
    """What must be known of the tables, each sentence once."""
    for row in document["devices"]:
        for text in filter(None, (row["flag"], row["reason"])):
            yield f"{row['device_uuid']}: {text}"
    yield from _together(document["phases"], place_text)
    yield from _together(document["tokens"], lambda row: f"tokens of {row['phase']}")
    for row in document["aliasing"]:
        if row["error"] > TOLERATED:
            yield (
                f"steps of {row['phase']} ({row['step_period_ms']:.1f} ms) move in time with the power "
                f"sensor ({row['update_ms']:.0f} ms): up to {100 * row['error']:.0f} % error of integrated "
                "power; energy by the counter is not affected"
            )


def reuse_document(result: ReuseMeasurements, *, seed: int = 0) -> dict[str, Any]:
    """Energy of prefills against their cached fraction, as ``--json`` prints it (docs/json.md)."""
    about = result.model_dump(mode="json", include={"model", "prompt_tokens", "batch_size", "device"})
    curve = _curve_document(fit_reuse(result, seed=seed))
    return printed_document("reuse", {**about, "notes": list(result.notes), "reuse": curve})


def reuse_tables(curve: dict[str, Any], result: ReuseMeasurements) -> list[Table]:
    """The cells of the curve that a document holds as ``reuse``."""
    title = f"{result.model}: energy of one prefill of {result.prompt_tokens} tokens by cached fraction"
    return [Table(name="cells", columns=REUSE_COLUMNS, rows=curve["cells"], title=title)]


def reuse_sentences(curve: dict[str, Any]) -> Iterator[str]:
    """What an exact hit saves, and which energies are uncertain for the sensor's sake."""
    if curve["saved"] is not None:
        low, high = curve["saved_low"], curve["saved_high"]
        interval = "" if low is None or high is None else f" ({100 * low:.1f} to {100 * high:.1f} %)"
        yield (
            f"an exact hit saves {100 * curve['saved']:.1f} % of a miss's prefill energy here{interval}; "
            f"{curve['published']['source']} states {100 * curve['published']['saved']:.0f} % for its models"
        )
    flagged = [f"{100 * row['cached_fraction']:.1f} %" for row in curve["cells"] if row["flag"]]
    if flagged:
        yield (
            f"energies at a cached fraction of {', '.join(flagged)} are integrated power of prefills in time "
            "with the power sensor; their intervals allow for it"
        )
    if curve["saved_reason"]:
        yield f"saving: {curve['saved_reason']}"


def _curve_document(curve: ReuseFit) -> dict[str, Any]:
    names = ("fixed_mj", "linear_mj", "square_mj", "saved", "saved_low", "saved_high", "saved_flag")
    reason = curve.saved_reason
    return {
        **{name: getattr(curve, name) for name in names},
        "saved_reason": None if reason is None else reason_words(reason),
        "saved_reason_code": None if reason is None else reason.code.value,
        "cells": frame_records(curve.cells),
        "published": {"saved": PUBLISHED_SAVING, "source": PUBLISHED_SOURCE},
    }


def _together(rows: Sequence[dict[str, Any]], name: Callable[[dict[str, Any]], str]) -> Iterator[str]:
    """Flags and reasons of rows, each sentence once, behind the names of all rows that it is about."""
    concerned: dict[str, list[str]] = {}
    for row in rows:
        for text in filter(None, (row["flag"], row["reason"])):
            concerned.setdefault(text, []).append(f"{name(row)} on rank {row['source_rank']}")
    for text, places in concerned.items():
        yield f"{listing(places, joined_by='and')}: {text}"


def place_text(row: Mapping[str, Any]) -> str:
    """Phase, and span where the row is of one."""
    return str(row["phase"]) if row["span"] is None else f"{row['phase']} / {row['span']}"

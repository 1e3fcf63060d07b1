"""Energy of prefill at several cached fractions of the prompt: one JSON document.

Each measurement is one window that repeats the prefill of one prompt length with one part of it already
cached: ``MISS`` has none cached, ``EXACT_HIT`` all, ``PARTIAL`` something between. Counters tick about every
100 ms, so a window brackets many repeats and its energy is divided (arXiv 2605.05696).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from observatory.errors import EnergyError
from observatory.run.documents.versioned import load_document
from observatory.run.manifest import DeviceSpec, EnergyFlag
from observatory.run.provenance import HostSpec
from observatory.run.records import Count, Moment, Record, Text

REUSE_VERSION = "1.1"

ReuseCell = Literal["MISS", "PARTIAL", "EXACT_HIT"]

_Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class ReuseMeasurement(Record):
    """One window of repeated prefills.

    Attributes:
        cell: ``MISS``, ``PARTIAL`` or ``EXACT_HIT``.
        cached_fraction: share of the prompt's tokens whose keys and values were cached: 0, between, 1.
        prefills: prefills in the window.
        duration_s: length of the window.
        energy_mj: energy of the device in the window.
        energy_error: half-width of the 90 % interval of ``energy_mj``, relative; None where not known.
        energy_flag: what must be known of ``energy_mj``, which its error allows for; None for nothing. Since
            1.1.
    """

    cell: ReuseCell
    cached_fraction: Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
    prefills: Annotated[int, Field(ge=1, le=10**9)]
    duration_s: _Positive
    energy_mj: _Positive
    energy_error: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] | None = None
    energy_flag: EnergyFlag | None = None

    @model_validator(mode="after")
    def _cell_fits(self) -> ReuseMeasurement:
        fits = {
            "MISS": self.cached_fraction == 0.0,
            "EXACT_HIT": self.cached_fraction == 1.0,
            "PARTIAL": 0.0 < self.cached_fraction < 1.0,
        }
        if not fits[self.cell]:
            raise ValueError(f"a cached fraction of {self.cached_fraction} is no {self.cell}")
        return self

    @property
    def prefill_mj(self) -> float:
        """Energy of one prefill."""
        return self.energy_mj / self.prefills


class ReuseMeasurements(Record):
    """Measurements of one model, prompt length and device.

    Attributes:
        schema_version: ``major.minor``; readers refuse a newer major.
        created_unix_s: wall-clock label.
        model: name of the model.
        prompt_tokens: length of the prompt; 4096 in arXiv 2605.05696.
        batch_size: prompts prefilled together.
        device: the device.
        idle_power_mw: power without load; None when not reported.
        measurements: the windows.
        git_sha, hosts, software, argv: where and how it was measured.
        notes: what a reader must know.
    """

    schema_version: Annotated[str, Field(pattern=r"^\d{1,6}\.\d{1,6}$")] = REUSE_VERSION
    created_unix_s: Moment
    model: Text
    prompt_tokens: Annotated[int, Field(ge=1, le=10**9)]
    batch_size: Annotated[int, Field(ge=1, le=10**6)] = 1
    device: DeviceSpec
    idle_power_mw: Count | None = None
    measurements: Annotated[tuple[ReuseMeasurement, ...], Field(min_length=1, max_length=100_000)]
    argv: tuple[Text, ...] = ()
    git_sha: Text | None = None
    hosts: tuple[HostSpec, ...] = ()
    software: dict[str, Text] = Field(default_factory=dict)
    notes: tuple[Text, ...] = ()


def load_reuse(path: Path | str) -> ReuseMeasurements:
    """Read and check measurements.

    Raises:
        EnergyError: not readable, too large, of a newer schema, or not what the schema says.
    """
    return load_document(
        ReuseMeasurements,
        path,
        version=REUSE_VERSION,
        what="reuse measurements",
        remedy="docs/energy.md#reuse says what they hold",
        failure=EnergyError,
    )

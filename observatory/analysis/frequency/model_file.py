"""The clock model as a document: what was fitted, from which points, how sure it is, and what confounds it.

Shapes: B samples, K measured clocks, R repeats. Intervals are of 90 %.
"""

from __future__ import annotations

from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from observatory.analysis.frequency.curves import KERNELS
from observatory.errors import ClockError
from observatory.run.documents.clock_sweep import load_sweep
from observatory.run.documents.versioned import load_document
from observatory.run.manifest import DeviceSpec, Phase
from observatory.run.records import Count, Moment, Record, Text

#: Files before 2.0 hold forms of curves that are fitted no more.
CLOCK_MODEL_VERSION = "2.0"

_MOST_SAMPLES = 2000

_Positive = Annotated[float, Field(gt=0.0, lt=1e18, allow_inf_nan=False)]
_NotNegative = Annotated[float, Field(ge=0.0, lt=1e18, allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0.0, le=1.0)]
_Mhz = Annotated[float, Field(ge=1.0, le=100_000.0, allow_inf_nan=False)]
_Milliwatts = Annotated[float, Field(ge=0.0, le=1e10, allow_inf_nan=False)]
_Repeats = Annotated[tuple[_Positive, ...], Field(max_length=100_000)]


class FitCode(StrEnum):
    """What a fit lacks, and why; behind some the names of the values that belong to it."""

    # A series was not fitted.
    TOO_MANY_POINTS = "too many points"  # points, most
    TOO_FEW_CLOCKS = "too few clocks"  # clocks, needed, left_out
    NO_CURVE = "no curve"  # error (rms of ln)
    NO_REFERENCE = "no reference"  # left_out
    NOT_FITTED = "not fitted"  # title; because
    # A point did not enter the fit.
    DISTURBED = "disturbed"
    IMPOSSIBLE = "impossible"
    HEATED = "heated"
    BRAKED = "braked"
    NO_CLOCK = "no clock"
    MAY_WANDER = "may wander"
    WANDERED = "wandered"
    # A clock does not follow from the model.
    NO_ENERGY = "no energy"
    # There is no E(f).
    ENERGY_NOT_KNOWN = "energy not known"  # missing, points, flagged
    # What a reader of a model must know of its sweeps.
    LIMIT_WAS_LOWERED = "limit was lowered"  # limit_mw, default_mw
    UNLOCKED_DIFFER = "unlocked differ"  # low, high (sources), low_mhz, high_mhz
    TEMPERATURES_DIFFER = "temperatures differ"  # cold, warm (sources), cold_c, warm_c
    NOTE_OF_SWEEP = "note of sweep"  # source, note
    MORE_NOTES = "more notes"  # notes


class ClockEstimate(Record):
    """A clock that follows from the model.

    Attributes:
        mhz: the clock, never outside what was measured; None when it is not known.
        low_mhz, high_mhz: its interval; None like ``mhz``.
        relation: ``at most``: it lies at or below the lowest clock measured; ``at least``: at or above the
            highest.
        reason: why ``mhz`` is None.
        reason_code: its code; None where there is no reason.
    """

    mhz: _Mhz | None
    low_mhz: _Mhz | None = None
    high_mhz: _Mhz | None = None
    relation: Literal["at", "at most", "at least"] = "at"
    reason: Text = ""
    reason_code: Text | None = None


class Setting(Record):
    """The repeats of one lock, limit or both.

    Attributes:
        kind: what was set.
        requested_sm_clock_mhz, requested_limit_mw: what was asked for; None where nothing was set.
        limit_mw: the limit in force as reported by the device, else the requested one; None without one.
        sm_clock_mhz: median of the sampled clocks; None when not sampled.
        label: the label of most of its repeats, corrected by the clocks that were sampled.
        iteration_s_R: seconds per iteration of each repeat that can be compared.
        energy_mj_R: energy per iteration of the same repeats; empty when any is unknown.
        power_cap_share: mean share of time in which the limit held the clock; None when not reported.
        idle: whether the device said that it idled, in most repeats; None when not reported.
        fitted: repeats that entered the fit.
        heated: repeats that heat slowed down; before schema 1.1 those of ``braked`` among them.
        braked: repeats that a hardware slowdown or the power brake slowed down, without heat.
        flagged: repeats of ``iteration_s_R`` whose energy is integrated power in time with the sensor.
    """

    kind: Literal["unlocked", "lock", "cap", "both"]
    requested_sm_clock_mhz: _Mhz | None = None
    requested_limit_mw: _Milliwatts | None = None
    limit_mw: _Milliwatts | None = None
    sm_clock_mhz: _Mhz | None = None
    label: Text
    iteration_s_R: _Repeats = ()
    energy_mj_R: _Repeats = ()
    power_cap_share: _Share | None = None
    idle: bool | None = None
    fitted: Count = 0
    heated: Count = 0
    braked: Count = 0
    flagged: Count = 0

    @model_validator(mode="after")
    def _same_repeats(self) -> Setting:
        if self.energy_mj_R and len(self.energy_mj_R) != len(self.iteration_s_R):
            raise ValueError("energies and times are of different numbers of repeats")
        return self


class LeftOut(Record):
    """Points that did not enter the fit, and why.

    Attributes:
        reason: why.
        reason_code: its code.
        points: how many.
    """

    reason: Text
    reason_code: Text | None = None
    points: Count


class Confound(Record):
    """Something that makes a sweep say less than it seems to.

    Attributes:
        kind: which.
        numbers: the evidence; None where it could not be measured.
        text: the same in one sentence.
    """

    kind: Literal[
        "cap never binds",
        "some caps do not bind",
        "clock not as requested",
        "limit not as requested",
        "unlocked is capped",
        "slowed by heat",
        "slowed by the brake",
        "in time with the sensor",
    ]
    numbers: dict[str, float | None] = Field(default_factory=dict)
    text: Text = ""


class Reference(Record):
    """What slowdown and saving are relative to.

    Attributes:
        how: ``unlocked``: no lock and the device's own limit; ``highest clock``: no such point was measured.
        sm_clock_mhz: median sampled clock.
        iteration_s, energy_mj, power_mw: as measured, medians; None where not reported.
        power_cap_share: share of time in which the limit held the clock; None when not reported.
        limit_mw: the device's own limit as it stood, which a site may have lowered; None when not reported.
        on_curve: it entered the fit; if not (its clock wandered), all is relative to its repeats alone.
    """

    how: Literal["unlocked", "highest clock"]
    sm_clock_mhz: _Mhz
    iteration_s: _Positive
    energy_mj: _Positive | None = None
    power_mw: _Positive | None = None
    power_cap_share: _Share | None = None
    limit_mw: _Milliwatts | None = None
    on_curve: bool = True


class SeriesFit(Record):
    """The model of one phase at one batch and context.

    Attributes:
        name, phase, batch_size, context_tokens, tokens_per_iteration: as in the sweep.
        clock_mhz_K: the clocks that were measured, rising; the curves hold between them, the highest is f0.
        points: points that did.
        reference: see :class:`Reference`.
        has_energy: whether there is E(f), see ``no_power``.
        no_power: why there is none.
        no_power_code: its code; None where there is E(f).
        samples_B: rows of ``curves.sample_curves``.
        critical: f_crit: below it time follows the clock (``curves.knees_mhz``).
        optimum: the measured clock of least energy.
        settings: what was measured.
        time_scatter, energy_scatter: standard deviation of the logarithm over repeats of one setting; None
            without repeats.
        scatter_dof: degrees of freedom of these.
        left_out: points that did not enter the fit.
        confounds: what to know before believing any of it.
        highest_power_mw: of all points compared; None without energies.
    """

    name: Text
    phase: Phase = "unknown"
    batch_size: Count | None = None
    context_tokens: Count | None = None
    tokens_per_iteration: Count | None = None
    clock_mhz_K: Annotated[tuple[_Mhz, ...], Field(min_length=2, max_length=1000)]
    points: Count
    reference: Reference
    has_energy: bool
    no_power: Text = ""
    no_power_code: Text | None = None
    samples_B: Annotated[
        tuple[Annotated[tuple[_NotNegative, ...], Field(max_length=1100)], ...],
        Field(min_length=1, max_length=_MOST_SAMPLES),
    ]
    critical: ClockEstimate
    optimum: ClockEstimate
    settings: Annotated[tuple[Setting, ...], Field(max_length=2000)]
    time_scatter: _NotNegative | None = None
    energy_scatter: _NotNegative | None = None
    scatter_dof: Count = 0
    left_out: Annotated[tuple[LeftOut, ...], Field(max_length=1000)] = ()
    confounds: Annotated[tuple[Confound, ...], Field(max_length=10_000)] = ()
    highest_power_mw: _NotNegative | None = None

    @model_validator(mode="after")
    def _has_curves(self) -> SeriesFit:
        clocks = self.clock_mhz_K
        if any(low >= high for low, high in pairwise(clocks)):
            raise ValueError("clock_mhz_K does not rise")
        if self.reference.sm_clock_mhz < clocks[0]:
            raise ValueError("the reference's clock is below the lowest one measured")
        for sample in self.samples_B:
            if len(sample) != 2 * KERNELS + 2 + len(clocks):
                raise ValueError("a sample has another number of terms than its curves")
            if sum(sample[:KERNELS]) <= 0.0 or min(sample[KERNELS : 2 * KERNELS]) < 1.0:
                raise ValueError("an iteration takes no time, or a knee lies above the highest clock")
            if self.has_energy and sum(sample[2 * KERNELS : 2 * KERNELS + 3]) <= 0.0:
                raise ValueError("an iteration takes no energy")
        return self

    @property
    def low_mhz(self) -> float:
        """The lowest clock measured."""
        return self.clock_mhz_K[0]

    @property
    def high_mhz(self) -> float:
        """The highest clock measured."""
        return self.clock_mhz_K[-1]

    @property
    def title(self) -> str:
        """What ran, for people."""
        return series_title(self.name, self.phase, self.batch_size, self.context_tokens)


def series_title(name: str, phase: str, batch_size: int | None, context_tokens: int | None) -> str:
    """What ran, for people: every number that distinguishes one series of a sweep from another."""
    parts = [name]
    if phase not in ("unknown", name):
        parts.append(phase)
    if batch_size is not None:
        parts.append(f"batch {batch_size}")
    if context_tokens is not None:
        parts.append(f"context {context_tokens}")
    return ", ".join(parts)


class ClockModel(Record):
    """What ``observatory clocks fit`` writes.

    Attributes:
        schema_version: ``major.minor``; readers refuse a newer major.
        created_unix_s: wall-clock label.
        argv: command line.
        device: the device of the sweeps.
        default_limit_mw: its default power limit; None when not reported.
        idle_power_mw: power without load; None when not reported.
        series: one model per phase, batch and context.
        seed: of the samples.
        sources: names of the sweep files.
        git_sha: commit of the working directory.
        notes: what a reader must know.
        note_codes: their codes.
    """

    schema_version: Annotated[str, Field(pattern=r"^\d{1,6}\.\d{1,6}$")] = CLOCK_MODEL_VERSION
    created_unix_s: Moment
    argv: tuple[Text, ...] = ()
    device: DeviceSpec
    default_limit_mw: _Milliwatts | None = None
    idle_power_mw: _Milliwatts | None = None
    series: Annotated[tuple[SeriesFit, ...], Field(min_length=1, max_length=1000)]
    seed: int = 0
    sources: tuple[Text, ...] = ()
    git_sha: Text | None = None
    notes: tuple[Text, ...] = ()
    note_codes: tuple[Text, ...] = ()


def load_clock_model(path: Path | str) -> ClockModel:
    """Read and check a clock model.

    Raises:
        ClockError: not readable, too large, of a newer schema, or not what the schema says.
    """
    try:
        return load_document(
            ClockModel,
            path,
            version=CLOCK_MODEL_VERSION,
            what="clock model",
            remedy="make one with `observatory clocks fit`",
            failure=ClockError,
        )
    except ClockError:
        if _is_sweep(path):
            raise ClockError(
                f"{path} is a sweep that was not fitted; `observatory clocks fit {path} --out FILE` makes a "
                "clock model of it"
            ) from None
        raise


def _is_sweep(path: Path | str) -> bool:
    try:
        load_sweep(path)
    except ClockError:
        return False
    return True

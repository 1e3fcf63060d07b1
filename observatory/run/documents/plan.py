"""A capacity plan as ``observatory plan --out`` wrote it, read back from an untrusted file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from observatory.errors import PlanError
from observatory.run.documents.printed import PRINTED_VERSION
from observatory.run.documents.versioned import load_document
from observatory.run.records import Count, Record, Text

_Number = Annotated[float, Field(ge=0.0, le=1e18)]
_Share = Annotated[float, Field(ge=0.0, le=1.0 + 1e-9)]
_MOST_ROWS = 100_000

Grade = Literal["measured", "fitted", "published", "assumed"]


class PlannedSetUp(Record):
    """A set-up that meets every target; see docs/json.md."""

    hardware: Text
    mode: Literal["together", "apart"]
    set_up: Text
    gpus: Count
    gpus_low: Count
    gpus_high: Count
    ranks: Count
    tp: Count
    sequences: Count
    tokens_per_s: _Number
    tokens_per_s_low: _Number
    tokens_per_s_high: _Number
    ms_per_token: _Number
    ms_per_token_low: _Number
    ms_per_token_high: _Number
    ttft_ms: _Number
    ttft_ms_low: _Number
    ttft_ms_high: _Number
    tokens_per_s_gpu: _Number
    tokens_per_s_user: _Number
    joules_per_token: _Number | None = None
    joules_per_token_low: _Number | None = None
    joules_per_token_high: _Number | None = None
    joules_grade: Grade | None = None
    is_simulated: bool = False
    joules_per_token_most: _Number | None
    rack_w: _Number | None
    currency: Text | None = None
    per_million: _Number | None
    limit: Text
    is_pareto: bool
    extrapolated: Annotated[tuple[Text, ...], Field(max_length=16)]
    grades: dict[Grade, _Share]


class RuledOut(Record):
    """A constraint with the set-ups that it ruled out."""

    constraint: Text
    set_ups: Count
    nearest: Text


class PlannedRouting(Record):
    """What an assumption about routing leads to."""

    routing: Text
    gpus: Count | None
    set_up: Text | None
    gpus_with_captured: Count | None
    ms_per_token_with_captured: _Number | None = None
    ttft_ms_with_captured: _Number | None = None


class PlannedAlpha(Record):
    """The exponent of the power law nearest to the loads of a layer."""

    phase: Text
    layer: Count
    alpha: _Number
    fitted_to: Text = "loads"
    distance: _Number
    busiest_captured: _Number
    busiest_fitted: _Number


class PlannedSources(Record):
    """What a plan was made from."""

    runs: Annotated[tuple[object, ...], Field(max_length=_MOST_ROWS)]
    phases: Annotated[tuple[Text, ...], Field(max_length=16)] = ()


class PlannedModel(Record):
    """The model of a plan."""

    name: Text
    parameters: Count
    longest: Count | None = None


class PlannedTargets(Record):
    """The targets of a plan."""

    tokens_per_s: _Number
    context: Count
    output: Count
    max_ms_per_token: _Number | None
    max_ttft_ms: _Number | None


class PlanFile(Record):
    """The parts of a plan that a report shows."""

    kind: Literal["plan"]
    schema_version: Text
    model: PlannedModel
    targets: PlannedTargets
    routing: Text
    sources: PlannedSources
    candidates: Annotated[tuple[PlannedSetUp, ...], Field(max_length=_MOST_ROWS)]
    rejected: Annotated[tuple[dict[str, object], ...], Field(max_length=_MOST_ROWS)]
    rejected_by: Annotated[tuple[RuledOut, ...], Field(max_length=1024)]
    assumptions: Annotated[tuple[PlannedRouting, ...], Field(max_length=16)]
    alphas: Annotated[tuple[PlannedAlpha, ...], Field(max_length=_MOST_ROWS)] = ()


def load_plan(path: Path | str) -> PlanFile:
    """Read a plan.

    Raises:
        PlanError: the file is none.
    """
    return load_document(
        PlanFile,
        path,
        version=PRINTED_VERSION,
        what="plan",
        remedy="write one with `observatory plan --out`",
        failure=PlanError,
    )

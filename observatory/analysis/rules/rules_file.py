"""Rules as a TOML file states them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from observatory.errors import RulesError
from observatory.run.bounded import read_toml
from observatory.run.manifest import Phase

#: What is computed from the loads of a layer.
LoadMetric = Literal[
    "dead_steps", "dead_experts", "expert_max_over_mean", "rank_max_over_mean", "gini", "entropy_bits"
]
#: What is known of whole phases of a run.
PhaseMetric = Literal[
    "exchange_share", "waiting_share", "ms", "tokens_per_s", "mj_per_token", "power_w", "clock_mhz"
]
LOAD_METRICS: tuple[str, ...] = get_args(LoadMetric)

_MOST_BYTES = 1 << 18
_MOST_RULES = 256
_MOST_STEPS = 1 << 40
_Count = Annotated[int, Field(ge=0, le=1 << 20, strict=True)]


class Rule(BaseModel):
    """A limit of one quantity.

    Attributes:
        metric: the quantity.
        above, below: the rule is broken by values beyond; exactly one is given.
        phase: the only phase that it is about; None for each phase that the run holds.
        layers: numbers of the only layers that it is about; None for all.
        window_steps: judge each window of so many consecutive steps, by its added loads; None for the loads
            of the whole run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    metric: Literal[LoadMetric, PhaseMetric]
    above: float | None = Field(default=None, strict=True)
    below: float | None = Field(default=None, strict=True)
    phase: Phase | None = None
    layers: Annotated[tuple[_Count, ...], Field(min_length=1, max_length=4096)] | None = None
    window_steps: Annotated[int, Field(ge=1, le=_MOST_STEPS, strict=True)] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.above is None) == (self.below is None):
            raise ValueError("a rule has a number either as `above` or as `below`")
        if self.metric not in LOAD_METRICS and (self.layers is not None or self.window_steps is not None):
            raise ValueError(f"{self.metric} is of whole phases: no `layers` and no `window_steps`")
        if self.metric == "dead_steps" and (self.below is not None or self.window_steps is not None):
            raise ValueError("dead_steps is a number of steps that `above` limits: no `window_steps`")
        return self

    @property
    def limit(self) -> float:
        """The number."""
        limit = self.above if self.above is not None else self.below
        assert limit is not None
        return limit

    def is_broken_by(self, value: float) -> bool:
        """Whether a value lies beyond the limit."""
        return value > self.limit if self.above is not None else value < self.limit

    @property
    def text(self) -> str:
        """The rule in one line: ``decode.gini > 0.6 in 100 steps``."""
        phase = "" if self.phase is None else f"{self.phase}."
        window = "" if self.window_steps is None else f" in {self.window_steps} steps"
        return f"{phase}{self.metric} {'>' if self.above is not None else '<'} {self.limit:g}{window}"


class RulesFile(BaseModel):
    """A file of rules.

    Attributes:
        rule: the rules, in the order of the file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rule: Annotated[tuple[Rule, ...], Field(min_length=1, max_length=_MOST_RULES)]


def load_rules(path: Path) -> tuple[Rule, ...]:
    """Read a file of rules.

    Raises:
        RulesError: not readable, or with a key or value that no rule has; wrong usage, so that it is not
            mistaken for a broken rule.
    """
    return read_toml(
        path,
        RulesFile,
        most_bytes=_MOST_BYTES,
        failure=RulesError,
        what="rules file",
        remedy="docs/check.md lists what a rule may state",
    ).rule

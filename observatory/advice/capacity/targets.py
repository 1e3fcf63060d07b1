"""What a plan has to reach."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from observatory.run.records import Record

_Positive = Annotated[float, Field(gt=0.0, le=1e12)]
_Tokens = Annotated[int, Field(ge=1, le=1 << 30)]


class Targets(Record):
    """Targets of a service in steady state.

    Attributes:
        tokens_per_s: generated tokens per second, over all users.
        context: tokens of a prompt.
        output: tokens that are generated for it.
        max_ms_per_token: time between two tokens of one user, mean; None for no limit.
        max_ttft_ms: time from the start of a prompt's computation to its first token; None for no limit.
        most_gpus: devices that there are; None for no limit.
        chunk: prompt tokens that a group computes in one step.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    tokens_per_s: _Positive
    context: _Tokens
    output: _Tokens
    max_ms_per_token: _Positive | None = None
    max_ttft_ms: _Positive | None = None
    most_gpus: _Tokens | None = None
    chunk: _Tokens = 8192

    @property
    def held(self) -> float:
        """Tokens in the cache of a sequence, mean while it is generated."""
        return self.context + self.output / 2

    @property
    def prompts_per_s(self) -> float:
        """Prompts that arrive per second."""
        return self.tokens_per_s / self.output

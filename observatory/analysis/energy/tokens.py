"""Energy per token: input tokens for prefill, output tokens for decode.

Tokens are those that were routed (each MoE layer sees every token of a step once; padding and masked tokens
are not among them). Without routing rows they follow from batch and sequence length of the manifest, which
count padding. Phases that make no output token of a model (training, unknown ones) are given per token
processed.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from observatory.run.manifest import DataSpec

#: Counts up to this are exact in a double.
_MOST_TOKENS = 1 << 53
#: What a token of a phase is.
TOKEN_KINDS = {"prefill": "input", "decode": "output"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseTokens:
    """Tokens of one phase on one rank.

    Attributes:
        kind: ``input``, ``output`` or ``processed``.
        tokens: how many, in the steps whose time is known; None where ``reason`` says why.
        source: ``routing rows`` or ``manifest``; None like it.
        reason: why there is no number.
    """

    kind: str
    tokens: int | None = None
    source: str | None = None
    reason: str | None = None


def count_tokens(
    phase: str,
    rank: int,
    steps: frozenset[int],
    routed: pd.DataFrame,
    data: DataSpec | None,
    *,
    ranks: int = 1,
) -> PhaseTokens:
    """Tokens that a rank handled in the steps of a phase that have spans.

    Args:
        phase: the phase.
        rank: the rank.
        steps: steps of this phase that have a span of this rank.
        routed: result of ``Run.routed_tokens``.
        data: what the manifest says was fed to the model, by all ranks together.
        ranks: how many the run has.
    """
    kind = TOKEN_KINDS.get(phase, "processed")
    own = routed[(routed["phase"] == phase) & (routed["source_rank"] == rank)]
    if own.empty:
        if ranks > 1:
            return PhaseTokens(
                kind=kind, reason="the run has no routing rows of it, and its batch size is that of all ranks"
            )
        return _from_manifest(phase, kind, steps, data)
    counted, covered = 0, 0
    for first, width, tokens in zip(own["step"], own["window_steps"], own["tokens"], strict=True):
        # A row may fold several steps; it counts when all of them have spans.
        if width <= len(steps) and all(step in steps for step in range(int(first), int(first + width))):
            counted, covered = counted + int(tokens), covered + int(width)
    if covered < len(steps):
        return PhaseTokens(
            kind=kind, reason=f"{len(steps) - covered} of {len(steps)} steps have a span but no routing rows"
        )
    if counted == 0:
        return PhaseTokens(kind=kind, reason="no token was routed in it")
    return PhaseTokens(kind=kind, tokens=counted, source="routing rows")


def _from_manifest(phase: str, kind: str, steps: frozenset[int], data: DataSpec | None) -> PhaseTokens:
    if data is None or not data.batch_size:
        return PhaseTokens(kind=kind, reason="the run has no routing rows of it and names no batch size")
    if phase != "decode" and not data.sequence_length:
        return PhaseTokens(kind=kind, reason="the run has no routing rows of it and names no sequence length")
    length = 1 if phase == "decode" or not data.sequence_length else data.sequence_length
    tokens = len(steps) * data.batch_size * length
    if tokens > _MOST_TOKENS:
        return PhaseTokens(
            kind=kind, reason="run.json: data.batch_size and data.sequence_length give over 2**53 tokens"
        )
    return PhaseTokens(kind=kind, tokens=tokens, source="manifest")

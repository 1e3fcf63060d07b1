"""Energy per token: input tokens for prefill, output tokens for decode.

Tokens are those that were routed (each MoE layer sees every token of a step once; padding and masked tokens
are not among them). Without routing rows they follow from batch and sequence length of the manifest, which
count padding. Phases that make no output token of a model (training, unknown ones) are given per token
processed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from pydantic import JsonValue

from observatory.analysis.energy.codes import EnergyCode
from observatory.analysis.energy.design import IDLE
from observatory.analysis.energy.phases import RankPhases
from observatory.analysis.energy.rows import PhaseRow
from observatory.reasons import Reason
from observatory.run import Run
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
    reason: Reason | None = None


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
    rows = routed[(routed["phase"] == phase) & (routed["source_rank"] == rank)]
    if rows.empty:
        if ranks > 1:
            return PhaseTokens(kind=kind, reason=Reason(EnergyCode.NO_ROUTING_ROWS))
        return _from_manifest(phase, kind, steps, data)
    # A row may fold several steps; it counts when all of them have spans.
    step_S = np.sort(np.fromiter(steps, np.int64, len(steps)))
    first_N, width_N = (rows[name].to_numpy(np.int64) for name in ("step", "window_steps"))
    known_N = np.searchsorted(step_S, first_N + width_N) - np.searchsorted(step_S, first_N)
    counts_N = known_N == width_N
    counted, covered = sum(rows["tokens"][counts_N].tolist()), int(width_N[counts_N].sum())
    if covered < len(steps):
        counts: dict[str, JsonValue] = {"missing": len(steps) - covered, "steps": len(steps)}
        return PhaseTokens(kind=kind, reason=Reason(EnergyCode.STEPS_WITHOUT_ROWS, counts))
    if counted == 0:
        return PhaseTokens(kind=kind, reason=Reason(EnergyCode.NO_TOKENS))
    return PhaseTokens(kind=kind, tokens=counted, source="routing rows")


def _from_manifest(phase: str, kind: str, steps: frozenset[int], data: DataSpec | None) -> PhaseTokens:
    if data is None or not data.batch_size:
        return PhaseTokens(kind=kind, reason=Reason(EnergyCode.NO_BATCH_SIZE))
    if phase != "decode" and not data.sequence_length:
        return PhaseTokens(kind=kind, reason=Reason(EnergyCode.NO_SEQUENCE_LENGTH))
    length = 1 if phase == "decode" or not data.sequence_length else data.sequence_length
    tokens = len(steps) * data.batch_size * length
    if tokens > _MOST_TOKENS:
        return PhaseTokens(kind=kind, reason=Reason(EnergyCode.TOO_MANY_TOKENS))
    return PhaseTokens(kind=kind, tokens=tokens, source="manifest")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRow:
    """Energy per token of one phase on one rank, over all devices of the rank."""

    source_rank: int
    phase: str
    kind: str
    tokens: int | None
    tokens_source: str | None
    devices: int
    mj_per_token: float | None = None
    mj_per_token_low: float | None = None
    mj_per_token_high: float | None = None
    above_idle_mj_per_token: float | None = None
    idle_mj_per_token: float | None = None
    flags: tuple[Reason, ...] = ()
    energy_flag: str | None = None
    reasons: tuple[Reason, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TotalRow:
    """Energy per token of one phase over all ranks that ran it."""

    phase: str
    ranks: int
    devices: int
    kind: str
    tokens: int | None = None
    energy_mj: float | None = None
    mj_per_token: float | None = None
    mj_per_token_low: float | None = None
    mj_per_token_high: float | None = None
    above_idle_mj_per_token: float | None = None
    idle_mj_per_token: float | None = None
    flags: tuple[Reason, ...] = ()
    energy_flag: str | None = None
    reasons: tuple[Reason, ...] = ()


def token_rows(
    run: Run,
    phases: Sequence[PhaseRow],
    phases_of: Mapping[int, RankPhases],
    missing: Mapping[int, Reason],
    flags_of: Mapping[str, tuple[Reason, ...]],
) -> list[TokenRow]:
    """Energy per token of each rank and phase.

    Args:
        run: the run.
        phases: rows of the phases of all devices.
        phases_of: phases of each rank.
        missing: of the ranks whose energy is not known, or not that of all their devices, why.
        flags_of: flags of devices.
    """
    of_rank: dict[tuple[int | None, str], list[PhaseRow]] = {}
    for row in phases:
        if row.span is None and row.phase != IDLE:
            of_rank.setdefault((row.source_rank, row.phase), []).append(row)
    routed = run.routed_tokens() if phases_of else pd.DataFrame()
    rows = []
    for rank, phase in [(one, name) for one in sorted(phases_of) for name in phases_of[one].steps]:
        counted = count_tokens(
            phase, rank, phases_of[rank].steps[phase], routed, run.manifest.data,
            ranks=run.manifest.topology.ranks,
        )  # fmt: skip
        on_devices = of_rank.get((rank, phase), [])
        token_row = TokenRow(
            source_rank=rank,
            phase=phase,
            kind=counted.kind,
            tokens=counted.tokens,
            tokens_source=counted.source,
            devices=len(on_devices),
        )
        if rank in missing:
            rows.append(replace(token_row, reasons=(missing[rank],)))
        else:
            rows.append(_with_tokens(token_row, on_devices, counted.reason, flags_of))
    return rows


def _with_tokens(
    row: TokenRow,
    on_devices: Sequence[PhaseRow],
    no_tokens: Reason | None,
    flags_of: Mapping[str, tuple[Reason, ...]],
) -> TokenRow:
    """The row with the energies of its devices over its tokens, or why there are none."""
    unknown = [item for item in on_devices if item.energy_mj is None]
    if unknown:
        counts: dict[str, JsonValue] = {"missing": len(unknown), "devices": len(on_devices)}
        reason = Reason(EnergyCode.ENERGY_NOT_KNOWN, counts, unknown[0].reasons)
        return replace(row, energy_flag=_one_of(unknown), reasons=(reason,))
    if row.tokens is None:
        return replace(row, reasons=(() if no_tokens is None else (no_tokens,)))
    has_idle = all(item.above_idle_mj is not None for item in on_devices)
    flags = [flag for item in on_devices for flag in item.flags]
    flags += [flag for item in on_devices for flag in flags_of.get(item.device_uuid, ())]
    return replace(
        row,
        mj_per_token=_sum([item.energy_mj for item in on_devices]) / row.tokens,
        mj_per_token_low=_sum([item.energy_low_mj for item in on_devices]) / row.tokens,
        mj_per_token_high=_sum([item.energy_high_mj for item in on_devices]) / row.tokens,
        above_idle_mj_per_token=_sum([item.above_idle_mj for item in on_devices]) / row.tokens
        if has_idle
        else None,
        idle_mj_per_token=_sum([item.idle_mj for item in on_devices]) / row.tokens if has_idle else None,
        flags=tuple(flags),
        energy_flag=_one_of(on_devices),
        reasons=() if has_idle else (Reason(EnergyCode.NO_IDLE_POWER),),
    )


def total_rows(tokens: Sequence[TokenRow]) -> list[TotalRow]:
    """Energy of each phase over all ranks that ran it, where these are several."""
    by_phase: dict[str, list[TokenRow]] = {}
    for row in tokens:
        by_phase.setdefault(row.phase, []).append(row)
    return [_total(phase, rows) for phase, rows in by_phase.items() if len(rows) > 1]


def _total(phase: str, rows: Sequence[TokenRow]) -> TotalRow:
    total = TotalRow(
        phase=phase, ranks=len(rows), devices=sum(row.devices for row in rows), kind=rows[0].kind
    )
    unknown = [row for row in rows if row.mj_per_token is None]
    if unknown:
        first = unknown[0]
        counts: dict[str, JsonValue] = {
            "missing": len(unknown), "ranks": len(rows), "rank": first.source_rank,
        }  # fmt: skip
        reason = Reason(EnergyCode.RANKS_NOT_KNOWN, counts, first.reasons)
        return replace(total, energy_flag=_one_of(unknown), reasons=(reason,))
    tokens = sum(row.tokens or 0 for row in rows)

    def whole(values: Sequence[float | None]) -> float:
        weighted = [(value or 0.0) * float(row.tokens or 0) for value, row in zip(values, rows, strict=True)]
        return _sum(weighted)

    has_idle = all(row.idle_mj_per_token is not None for row in rows)
    energy_mj = whole([row.mj_per_token for row in rows])
    return replace(
        total,
        tokens=tokens,
        energy_mj=energy_mj,
        mj_per_token=energy_mj / tokens,
        mj_per_token_low=whole([row.mj_per_token_low for row in rows]) / tokens,
        mj_per_token_high=whole([row.mj_per_token_high for row in rows]) / tokens,
        above_idle_mj_per_token=whole([row.above_idle_mj_per_token for row in rows]) / tokens
        if has_idle
        else None,
        idle_mj_per_token=whole([row.idle_mj_per_token for row in rows]) / tokens if has_idle else None,
        flags=tuple(flag for row in rows for flag in row.flags),
        energy_flag=_one_of(rows),
        reasons=() if has_idle else (Reason(EnergyCode.NO_IDLE_POWER),),
    )


def _one_of(rows: Sequence[PhaseRow] | Sequence[TokenRow]) -> str | None:
    """The flag of the rows that have one: there is only one kind."""
    return next((row.energy_flag for row in rows if row.energy_flag is not None), None)


def _sum(values: Sequence[float | None]) -> float:
    return float(np.sum(np.array(values, dtype=np.float64)))

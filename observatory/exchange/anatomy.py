"""Where the time of an MoE layer goes: its dispatch phases per layer and rank, and what bounds it.

Spans are measured on each rank's own clock and only durations are used, so clocks need not be aligned.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

__all__ = ["EXCHANGE_SPANS", "SPAN_ORDER", "critical_path", "phase_times"]

#: Phases of a dispatcher in the order in which they run.
SPAN_ORDER = ("route", "count_exchange", "pack", "dispatch", "experts", "combine", "unpack")

#: Those in which ranks meet: their duration includes waiting.
EXCHANGE_SPANS = ("count_exchange", "dispatch", "combine")

#: A span around the whole layer: it stands for the layer only where nothing inside was recorded.
_WHOLE = "moe_layer"

_LAYER = ["phase", "layer"]


def phase_times(spans: pd.DataFrame) -> pd.DataFrame:
    """Time in each span per layer and rank.

    Args:
        spans: columns of ``tables.SPAN_SCHEMA``. Spans without a layer, without an end, or that end before
            they start are left out.

    Returns:
        phase, layer, source_rank, name, spans (how many), total_s, p50_s; names in the order of
        ``SPAN_ORDER``, then the others by name.
    """
    timed = _timed(spans)
    grouped = timed.groupby([*_LAYER, "source_rank", "name"], sort=True)["duration_s"]
    frame = grouped.agg(spans="size", total_s="sum", p50_s="median").reset_index()
    return _in_order(frame, [*_LAYER, "source_rank"])


def critical_path(spans: pd.DataFrame) -> pd.DataFrame:
    """What each phase adds to the time of a layer when nobody could have been waited for less.

    Per step, the slowest rank's time counts in phases in which ranks compute alone. In phases in which they
    meet, the shortest rank's counts: who arrives last does not wait, so its time is the exchange's own. (A
    rank that exchanges nothing may be shorter still: the value is a lower bound then.)

    Returns:
        phase, layer, name, steps, ``critical_s`` (mean over steps), ``mean_s`` (mean over ranks and steps),
        ``share`` (of the layer's critical seconds), ``critical_rank`` (the rank that decided most often, None
        for phases in which ranks meet) and ``critical_rank_share`` (of the steps).
    """
    timed = _timed(spans)
    per_step = (
        timed.groupby([*_LAYER, "name", "step", "source_rank"], sort=True)["duration_s"].sum().reset_index()
    )
    rows = []
    for (phase, layer, name), own in per_step.groupby([*_LAYER, "name"], sort=True):
        wide = own.pivot_table(index="step", columns="source_rank", values="duration_s")
        meets = name in EXCHANGE_SPANS
        decided = wide.idxmax(axis=1).value_counts()
        rows.append(
            {
                "phase": phase,
                "layer": layer,
                "name": name,
                "steps": len(wide),
                "critical_s": float((wide.min(axis=1) if meets else wide.max(axis=1)).mean()),
                "mean_s": float(np.nanmean(wide.to_numpy())),
                "critical_rank": None if meets else int(decided.index[0]),
                "critical_rank_share": np.nan if meets else float(decided.iloc[0] / len(wide)),
            }
        )
    columns = [*_LAYER, "name", "steps", "critical_s", "mean_s", "critical_rank", "critical_rank_share"]
    frame = pd.DataFrame(rows, columns=columns)
    whole = frame.groupby(_LAYER)["critical_s"].transform("sum")
    frame["share"] = (frame["critical_s"] / whole).where(whole > 0)
    return _in_order(frame.astype({"critical_rank": "Int64"}), _LAYER)


def _timed(spans: pd.DataFrame) -> pd.DataFrame:
    """Spans of layers that have a duration."""
    duration = (spans["end_ns"] - spans["start_ns"]).astype(float) * 1e-9
    fits = spans["layer"].notna() & duration.notna() & (duration >= 0)
    timed = spans[fits].assign(duration_s=duration[fits]).astype({"layer": "int64"})
    whole = timed["name"] == _WHOLE
    divided = (~whole).groupby([timed["phase"], timed["layer"]]).transform("any").astype(bool)
    return timed[~(whole & divided)]


def _in_order(frame: pd.DataFrame, first: list[str]) -> pd.DataFrame:
    known = {name: position for position, name in enumerate(SPAN_ORDER)}
    keyed = frame.assign(_position=frame["name"].map(lambda name: known.get(name, len(known))))
    return keyed.sort_values([*first, "_position", "name"]).drop(columns="_position").reset_index(drop=True)

"""Where the time of an MoE layer goes: its dispatch phases per layer and rank, and what bounds it.

Spans are measured on each rank's own clock and only durations are used.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

#: Phases of a dispatcher in the order in which they run.
SPAN_ORDER = ("route", "count_exchange", "pack", "dispatch", "experts", "combine", "unpack")

#: Those in which ranks meet, with the role of their exchanges: their duration includes waiting.
EXCHANGE_SPANS = {"count_exchange": "other", "dispatch": "dispatch", "combine": "combine"}

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


def critical_path(spans: pd.DataFrame, waits: pd.DataFrame | None = None) -> pd.DataFrame:
    """What each phase takes on average, how much of it is waiting, and what its slowest rank takes.

    The slowest rank is that of each single step. In phases in which ranks meet it is the one with the longest
    time after its waiting is taken off. Where waiting is not known, the shortest rank's time stands there
    instead, a lower bound: who arrives last does not wait.

    Args:
        spans: columns of ``tables.SPAN_SCHEMA``.
        waits: result of ``wait_and_transfer`` on the exchanges of the same run.

    Returns:
        phase, layer, name, steps, ``mean_s`` (over ranks and steps), ``wait_s`` (waiting and being held, mean
        over ranks and steps; 0 in phases in which ranks compute alone, NaN where it is not known),
        ``critical_s`` (mean over steps), ``share`` (of the layer's critical seconds), ``critical_rank`` (the
        slowest most often; None where it is not known) and ``critical_rank_share`` (of the steps).
    """
    timed = _timed(spans)
    keys = [*_LAYER, "name", "step", "source_rank"]
    per_step = timed.groupby(keys, sort=True)["duration_s"].sum().reset_index()
    per_step["wait_s"] = _waited_s(per_step, waits)
    phases = per_step.groupby([*_LAYER, "name"], sort=True)
    of_phase = phases.ngroup()
    busy_s = (per_step["duration_s"] - per_step["wait_s"].fillna(0)).clip(lower=0)
    steps = busy_s.groupby([of_phase, per_step["step"]])
    frame = phases.size().rename("steps").reset_index()
    frame["steps"] = steps.size().groupby(level=0).size()
    for name in ("duration_s", "wait_s"):
        frame[name] = per_step[name].groupby(of_phase).mean()
    known = per_step["wait_s"].notna().groupby(of_phase).all()
    longest_s, shortest_s = (values.groupby(level=0).mean() for values in (steps.max(), steps.min()))
    slowest = per_step.loc[steps.idxmax(), "source_rank"]
    often = slowest.groupby([of_phase[slowest.index], slowest], sort=False).size().rename_axis([None, "rank"])
    often = often.sort_values(ascending=False, kind="stable").reset_index("rank", name="times")
    often = often[~often.index.duplicated()].reindex(frame.index)
    frame = frame.rename(columns={"duration_s": "mean_s"}).assign(
        wait_s=frame["wait_s"].where(known),
        critical_s=longest_s.where(known, shortest_s),
        critical_rank=often["rank"].where(known),
        critical_rank_share=(often["times"] / frame["steps"]).where(known),
    )
    whole = frame.groupby(_LAYER)["critical_s"].transform("sum")
    frame["share"] = (frame["critical_s"] / whole).where(whole > 0)
    return _in_order(frame.astype({"critical_rank": "Int64"}), _LAYER)


def _waited_s(per_step: pd.DataFrame, waits: pd.DataFrame | None) -> pd.Series[float]:
    """Waiting and being held in each row's phase: 0 where ranks do not meet, NaN where it is not known."""
    role = per_step["name"].map(EXCHANGE_SPANS)
    alone = pd.Series(np.where(role.isna(), 0.0, np.nan), index=per_step.index)
    if waits is None or waits.empty:
        return alone
    keys = ["phase", "layer", "role", "step", "source_rank"]
    lost = waits[waits["layer"].notna()].astype({"layer": "int64"})
    lost_s = (lost["wait_s"] + lost["held_s"].fillna(0)).groupby([lost[key] for key in keys])
    sums = lost_s.sum().where(lost_s.count() == lost_s.size()).rename("lost_s").reset_index()
    meets = per_step.assign(role=role)[role.notna()]
    found = meets[keys].merge(sums, how="left", on=keys)["lost_s"]
    return alone.fillna(pd.Series(found.to_numpy(float), index=meets.index))


def _timed(spans: pd.DataFrame) -> pd.DataFrame:
    """Spans of layers that have a duration."""
    duration = (spans["end_ns"] - spans["start_ns"]).astype(float) * 1e-9
    fits = spans["layer"].notna() & duration.notna() & (duration >= 0)
    timed = spans[fits].assign(duration_s=duration[fits]).astype({"layer": "int64"})
    whole = timed["name"] == _WHOLE
    divided = (~whole).groupby([timed["phase"], timed["layer"]]).transform("any").astype(bool)
    return timed[~(whole & divided)]


def _in_order(frame: pd.DataFrame, first: list[str]) -> pd.DataFrame:
    place_of = {name: position for position, name in enumerate(SPAN_ORDER)}
    keyed = frame.assign(_position=frame["name"].map(lambda name: place_of.get(name, len(place_of))))
    return keyed.sort_values([*first, "_position", "name"]).drop(columns="_position").reset_index(drop=True)

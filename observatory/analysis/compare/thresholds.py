"""Thresholds on differences: ``decode.ms > +3 %``.

One metric, ``>`` or ``<``, and a number, above zero where it has no sign: with ``%`` of the relative
difference, else of the difference in the unit of the metric. A threshold is passed where the whole 95 %
interval of the difference lies beyond it, so that noise passes none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from observatory.analysis.compare.metrics import metric_names
from observatory.errors import ThresholdError

_FORM = re.compile(r"\s*([A-Za-z_.]{1,80})\s*([<>])\s*([+-]?\d{1,12}(?:\.\d{1,12})?)\s*(%?)\s*")
State = Literal["passed", "within", "undecided", "not_compared"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """One threshold.

    Attributes:
        text: as given.
        name: metric with its phase.
        above: passed by differences above the number; else below.
        number: signed; a share where ``relative``.
        relative: of the baseline's value.
    """

    text: str
    name: str
    above: bool
    number: float
    relative: bool


def parse_threshold(text: str) -> Threshold:
    """A threshold from its text.

    Raises:
        ThresholdError: not of the form, or of a metric that does not exist.
    """
    shown = ascii(text)[:80]
    match = _FORM.fullmatch(text)
    if match is None:
        raise ThresholdError(
            f"threshold {shown} is not understood",
            expected='METRIC, > or <, a number and % or nothing, such as "decode.ms > +3 %"',
        )
    name, sign, number, percent = match.groups()
    if name not in metric_names():
        phases, metrics = (sorted({part.split(".")[at] for part in metric_names()}) for at in (0, 1))
        raise ThresholdError(
            f"threshold {shown} is of the metric {name!r}, which does not exist",
            expected=f"PHASE.NAME with a phase of {', '.join(phases)} and a name of {', '.join(metrics)}",
        )
    value = float(number) / 100 if percent else float(number)
    return Threshold(
        text=" ".join(text.split()), name=name, above=sign == ">", number=value, relative=bool(percent)
    )


def judge_thresholds(
    thresholds: Iterable[Threshold], comparisons: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Every threshold against every comparison of a document.

    Returns:
        ``threshold``, ``other``, ``ep``, the difference and its ``state``: ``passed`` (the whole interval is
        beyond), ``within`` (the value is not), ``undecided`` (the value is, but not the whole interval) or
        ``not_compared`` (no such row, no difference, or no interval).
    """
    return [
        {
            "threshold": threshold.text,
            "other": item["other"]["name"],
            "ep": row.get("ep"),
            **_judged(threshold, row),
            "reason": row.get("reason"),
        }
        for threshold in thresholds
        for item in comparisons
        for row in [row for row in item["rows"] if row["name"] == threshold.name] or [{}]
    ]


def _judged(threshold: Threshold, row: Mapping[str, Any]) -> dict[str, Any]:
    names = (
        ("relative", "relative_low", "relative_high") if threshold.relative else ("difference", "low", "high")
    )
    value, low, high = (row.get(name) for name in names)
    state: State = "not_compared"
    if value is not None and low is not None and high is not None:
        sign = 1 if threshold.above else -1
        nearest = low if threshold.above else high
        beyond = sign * value > sign * threshold.number
        state = "passed" if sign * nearest > sign * threshold.number else "undecided" if beyond else "within"
    return {"state": state, "value": value, "low": low, "high": high, "is_share": threshold.relative}


def threshold_sentence(row: Mapping[str, Any]) -> str:
    """One judged threshold in words."""
    words = {
        "passed": "FAILED, the whole interval is beyond",
        "within": "holds",
        "undecided": "holds, but only part of the interval is on this side",
        "not_compared": "NOT JUDGED",
    }
    ep = "" if row["ep"] is None else f" at EP {row['ep']}"
    text = f"{row['threshold']}{ep}, {row['other']}: {words[row['state']]}"
    if row["value"] is not None:
        text += f": {_shown(row, 'value')}"
        if row["low"] is not None:
            text += f" ({_shown(row, 'low')} to {_shown(row, 'high')})"
    if row["state"] == "not_compared":
        why = row["reason"]["sentence"] if row["reason"] else "neither side has it"
        text += f": {why}"
    return text


def _shown(row: Mapping[str, Any], name: str) -> str:
    value = row[name]
    if not math.isfinite(value):
        return "n/a"
    return f"{100 * value:+.1f} %" if row["is_share"] else f"{value:+.4g}"

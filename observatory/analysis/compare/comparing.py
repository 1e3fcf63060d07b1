"""Two subjects compared: aligned, differences with intervals, significance controlled, confounders named.

A row is called changed where its p value, adjusted for the number of rows of its family, is at most 5 %
(Benjamini-Hochberg). Families are the rows of a whole run, and for each metric and phase the rows of its
layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from observatory.analysis.compare.metrics import METRICS, Key, sort_key
from observatory.analysis.compare.series import (
    FEWEST_FREEDOM,
    FEWEST_STEPS,
    Difference,
    Pooled,
    Series,
    difference_of,
    difference_of_runs,
    false_discovery,
    mean_of,
    pooled_correlation,
    statistic_series,
    steps_match,
)
from observatory.analysis.compare.subject import GroupedLoads, Subject
from observatory.analysis.compare.words import CompareCode
from observatory.analysis.routing.imbalance import gini_rows
from observatory.reasons import Reason

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

#: At most this share of the rows that are called changed did not change.
FALSE_DISCOVERY = 0.05
#: Tokens that differ by less than this share change no routing value noticeably.
_TOKENS_ALIKE = 0.02
_MOST_TOKENS_APART = 0.1
#: Further runs of a baseline, without which its runs show no scatter to rely on.
_FEWEST_REPEATS = 2
#: Groups of steps of a jackknife.
_MOST_GROUPS = 128
#: Metrics whose value depends on the tokens of a step, or of the whole run.
_DEPENDS_ON_TOKENS = {
    "activated_experts": CompareCode.TOKENS_OF_STEP,
    "rank_max_over_mean": CompareCode.TOKENS_OF_STEP,
    "gini": CompareCode.TOKENS_DIFFER,
    "entropy_bits": CompareCode.TOKENS_DIFFER,
    "dead_experts": CompareCode.TOKENS_DIFFER,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One quantity on both sides.

    Attributes:
        key: where it is in the baseline.
        other_layer: the layer that it is compared with; None like the key's.
        base, other: the values; None where a side has none.
        difference: of the two; None where they are not compared.
        adjusted_p: p value adjusted for its family; None without one.
        verdict: ``higher``, ``lower``, ``same`` (the interval holds 0), ``perhaps_higher`` or
            ``perhaps_lower`` (it does not, as that of one of so many rows would by chance), ``identical``,
            ``unknown`` (no interval) or ``not_compared``.
        reason: why there is no difference, or no interval.
    """

    key: Key
    other_layer: int | None = None
    base: float | None = None
    other: float | None = None
    difference: Difference | None = None
    adjusted_p: float | None = None
    verdict: str = "not_compared"
    reason: Reason | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One subject against the baseline.

    Attributes:
        base, other: the subjects.
        alignment: how layers were matched.
        confounders: what else differs, and what must be known.
        rows: of the whole run, means over layers among them.
        layers: of single layers.
    """

    base: Subject
    other: Subject
    alignment: Reason
    confounders: tuple[Reason, ...]
    rows: tuple[Row, ...]
    layers: tuple[Row, ...]


def compare_subjects(base: Subject, other: Subject, *, repeats: Sequence[Subject] = ()) -> Comparison:
    """Compare everything that both have.

    Args:
        base: the baseline.
        other: what is compared with it.
        repeats: further runs of the baseline's set-up; with two of them or more, the scatter of these runs
            shows how sure a difference is.
    """
    alignment, pairs = align_layers(base, other)
    remarks: list[Reason] = []
    series = [dict(subject.series) for subject in (base, other, *repeats)]
    for phase in sorted({phase for phase, _ in (*base.loads, *other.loads)}):
        remarks += _add_statistics((base, other, *repeats), phase, series)
    sides = _Sides(base, other, series[0], series[1], series[2:] if len(repeats) >= _FEWEST_REPEATS else [])
    rows = _judged(list(_rows(sides, [(None, None)])))
    layers = list(_rows(sides, pairs))
    paired = sum(row.difference is not None and row.difference.paired for row in rows)
    if paired:
        remarks.append(Reason(CompareCode.PAIRED, {"count": paired}))
    families: dict[tuple[str, str, int | None], list[Row]] = {}
    for row in layers:
        families.setdefault((row.key.metric, row.key.phase, row.key.ep), []).append(row)
    judged = [row for family in families.values() for row in _judged(family)]
    return Comparison(
        base=base,
        other=other,
        alignment=alignment,
        confounders=(*_confounders(base, other, runs=1 + len(sides.repeats)), *remarks),
        rows=tuple(sorted(rows, key=lambda row: sort_key(row.key))),
        layers=tuple(sorted(judged, key=lambda row: sort_key(row.key))),
    )


@dataclass(frozen=True, slots=True)
class _Sides:
    """Both sides with the series of each, and those of further runs of the baseline."""

    base: Subject
    other: Subject
    first: dict[Key, Series]
    second: dict[Key, Series]
    repeats: list[dict[Key, Series]]

    @property
    def same_tokens(self) -> bool:
        return self.base.tokens is not None and self.base.tokens == self.other.tokens

    def runs_of(self, key: Key, left: Series) -> Float64 | None:
        """Values of all runs of the baseline; None where it is one run, or a run has none, or all are equal.

        Runs that route the same tokens are equal, and show nothing of how other tokens would be routed.
        """
        values = [series[key].value for series in self.repeats if key in series]
        if not values or len(values) < len(self.repeats):
            return None
        runs_R = np.array([left.value, *values])
        return runs_R if np.ptp(runs_R) > 1e-12 * np.abs(runs_R).max() else None


def align_layers(base: Subject, other: Subject) -> tuple[Reason, list[tuple[int, int]]]:
    """How layers are matched, and the pairs of their places; none where only wholes can be compared."""
    mine, theirs = base.experts_L, other.experts_L
    if mine == theirs:
        return Reason(CompareCode.LAYERS_ALIKE), [(place, place) for place in range(len(mine))]
    if len({*mine, *theirs}) == 1 and mine and theirs:
        values: dict[str, JsonValue] = {"base_layers": len(mine), "other_layers": len(theirs)}
        depth = [(place, int((place + 0.5) / len(mine) * len(theirs))) for place in range(len(mine))]
        return Reason(CompareCode.RELATIVE_DEPTH, values), depth
    experts: dict[str, JsonValue] = {
        "base_experts": [*sorted(set(mine))],
        "other_experts": [*sorted(set(theirs))],
    }
    return Reason(CompareCode.AS_WHOLE, experts), []


def _rows(sides: _Sides, pairs: Sequence[tuple[int | None, int | None]]) -> Iterator[Row]:
    """Rows of these pairs of layers; of wholes where the pair is (None, None)."""
    here, there = _by_layer(sides.first), _by_layer(sides.second)
    families: dict[Key, list[tuple[Key, int | None, Series, Series]]] = {}
    for mine, theirs in pairs:
        left, right = here.get(mine, {}), there.get(theirs, {})
        for key in sorted({*left, *right}, key=sort_key):
            at = replace(key, layer=mine)
            if key in left and key in right:
                families.setdefault(key, []).append((at, theirs, left[key], right[key]))
            elif mine is None:
                lacking = sides.other if key in left else sides.base
                yield Row(
                    key=at,
                    base=left[key].value if key in left else None,
                    other=right[key].value if key in right else None,
                    reason=_why_missing(key, lacking, "baseline" if lacking is sides.base else "other"),
                )
    for family in families.values():
        pooled = _pooled([(mine_of, theirs_of) for _, _, mine_of, theirs_of in family])
        for at, theirs, mine_of, theirs_of in family:
            yield _row(sides, at, theirs, mine_of, theirs_of, pooled)


def _by_layer(series: Mapping[Key, Series]) -> dict[int | None, dict[Key, Series]]:
    layers: dict[int | None, dict[Key, Series]] = {}
    for key, item in series.items():
        layers.setdefault(key.layer, {})[replace(key, layer=None)] = item
    return layers


def _pooled(pairs: Sequence[tuple[Series, Series]]) -> Pooled:
    """How much neighbouring steps resemble each other, from all layers of a metric."""
    matching = [
        right.sample_N - left.sample_N
        for left, right in pairs
        if left.sample_N is not None and right.sample_N is not None and steps_match(left, right)
    ]
    return Pooled(
        base=pooled_correlation([left.sample_N for left, _ in pairs if left.sample_N is not None]),
        other=pooled_correlation([right.sample_N for _, right in pairs if right.sample_N is not None]),
        paired=pooled_correlation(matching),
    )


def _why_missing(key: Key, lacking: Subject, side: str) -> Reason:
    reason = lacking.missing.get(key.metric)
    if reason is not None:
        return Reason(reason.code, {"side": _SIDES[side], **reason.values})
    if lacking.source == "document":
        return Reason(CompareCode.NOT_IN_DOCUMENT, {"side": _SIDES[side]})
    return Reason(CompareCode.ONE_SIDE, {"side": _SIDES["other" if side == "baseline" else "baseline"]})


_SIDES = {"baseline": "the baseline", "other": "the other"}


def _row(
    sides: _Sides, key: Key, other_layer: int | None, left: Series, right: Series, pooled: Pooled
) -> Row:
    plain = Row(key=key, other_layer=other_layer, base=left.value, other=right.value)
    at_time = replace(key, metric="ms")
    if key.metric == "tokens_per_s" and at_time in sides.first and at_time in sides.second:
        times = sides.first[at_time], sides.second[at_time]
        # Pages hold 7 digits.
        if np.isclose(left.value * times[0].value, right.value * times[1].value, rtol=1e-5):
            return _rate_row(plain, times[0].value, _row(sides, at_time, other_layer, *times, pooled))
    refused = _refusal(key, left, right, sides.base, sides.other)
    if refused is not None:
        return replace(plain, reason=refused)
    runs_R = sides.runs_of(key, left)
    if runs_R is not None:
        return replace(plain, base=float(runs_R.mean()), difference=difference_of_runs(runs_R, right))
    counted = left.exact and right.exact
    paired = sides.same_tokens and (counted or (left.steps >= FEWEST_STEPS and steps_match(left, right)))
    difference = difference_of(left, right, paired=paired, pooled=pooled)
    if difference.low is not None:
        return replace(plain, difference=difference)
    reason = Reason(CompareCode.FEW_STEPS, {"steps": difference.steps, "needed": FEWEST_STEPS})
    if counted:
        reason = Reason(CompareCode.COUNT)
    elif "document" in (sides.base.source, sides.other.source):
        reason = Reason(CompareCode.NO_INTERVAL)
    return replace(plain, difference=difference, verdict="unknown", reason=reason)


def _rate_row(plain: Row, base_ms: float, time: Row) -> Row:
    """Tokens per second of steps of equally many tokens, from the difference of their times."""
    assert plain.base is not None
    if time.difference is None or time.base is None:
        return replace(time, key=plain.key, base=plain.base, other=plain.other)
    of_time = time.difference
    base = plain.base * base_ms / time.base  # time.base is the mean of several runs with --repeat
    share, low, high = (
        None if relative is None or relative <= -1 else 1 / (1 + relative) - 1
        for relative in (of_time.relative, of_time.relative_high, of_time.relative_low)
    )
    assert share is not None
    difference = replace(of_time, difference=share * base, relative=share)
    reason = time.reason
    if low is None or high is None:
        none = replace(difference, low=None, high=None, relative_low=None, relative_high=None, p=None)
        reason = reason or Reason(CompareCode.FEW_INDEPENDENT_STEPS, {"steps": of_time.steps})
        return replace(plain, base=base, difference=none, verdict="unknown", reason=reason)
    difference = replace(difference, low=low * base, high=high * base, relative_low=low, relative_high=high)
    return replace(plain, base=base, difference=difference)


def _refusal(key: Key, left: Series, right: Series, base: Subject, other: Subject) -> Reason | None:
    if METRICS[key.metric].by_experts and set(base.experts_L) != set(other.experts_L):
        return Reason(CompareCode.EXPERTS_DIFFER)
    code = _DEPENDS_ON_TOKENS.get(key.metric)
    if code is None or left.tokens is None or right.tokens is None:
        return None
    if _apart(left.tokens, right.tokens) <= _MOST_TOKENS_APART:
        return None
    return Reason(code, {"base_tokens": left.tokens, "other_tokens": right.tokens})


def _apart(one: int, other: int) -> float:
    return abs(one - other) / max(one, other, 1)


def _judged(family: list[Row]) -> list[Row]:
    """Verdicts of a family of rows."""
    tested = [row for row in family if row.difference is not None and row.difference.p is not None]
    if not tested:
        return family
    p_N = np.array([row.difference.p for row in tested if row.difference is not None], dtype=np.float64)
    judged = {}
    for row, adjusted in zip(tested, false_discovery(p_N).tolist(), strict=True):
        assert row.difference is not None
        verdict = _verdict(row.difference, adjusted)
        reason = row.reason
        freedom = row.difference.freedom
        if verdict == "same" and freedom is not None and freedom < FEWEST_FREEDOM:
            verdict = "unknown"
            reason = Reason(CompareCode.FEW_INDEPENDENT_STEPS, {"steps": row.difference.steps})
        judged[row.key] = replace(row, adjusted_p=adjusted, verdict=verdict, reason=reason)
    return [judged.get(row.key, row) for row in family]


def _verdict(difference: Difference, adjusted_p: float) -> str:
    assert difference.low is not None
    assert difference.high is not None
    if difference.low == difference.high == 0:
        return "identical"
    changed = "higher" if difference.difference > 0 else "lower"
    if adjusted_p <= FALSE_DISCOVERY:
        return changed
    return "same" if difference.low <= 0 <= difference.high else f"perhaps_{changed}"


def _add_statistics(
    subjects: Sequence[Subject], phase: str, series: Sequence[dict[Key, Series]]
) -> list[Reason]:
    """Statistics of whole runs over as many tokens in all of them; what must be known of it."""
    totals = [total for subject in subjects if (total := _most_tokens(subject, phase))]
    limit = min(totals)
    remarks = []
    is_cut = _apart(limit, max(totals)) > _TOKENS_ALIKE
    kept = []
    for subject, of_subject in zip(subjects, series, strict=True):
        added = whole_run_series(subject, phase, limit if is_cut else max(totals))
        kept += [item.tokens for item in added.values() if item.tokens is not None]
        of_subject.update(added)
    if is_cut and kept and _apart(min(kept), max(kept)) <= _MOST_TOKENS_APART:
        remarks.append(Reason(CompareCode.FIRST_TOKENS, {"phase": phase, "tokens": limit}))
    return remarks


def _most_tokens(subject: Subject, phase: str) -> int:
    return max(
        (int(loads.tokens_G.sum()) for (name, _), loads in subject.loads.items() if name == phase), default=0
    )


def whole_run_series(subject: Subject, phase: str, most_tokens: int) -> dict[Key, Series]:
    """Gini, entropy and experts without a token in one phase, of each layer and their mean (dead: their sum).

    Args:
        subject: with loads.
        phase: of the run.
        most_tokens: only the first steps count, up to so many tokens.
    """
    of_metric: dict[str, list[Series]] = {}
    result: dict[Key, Series] = {}
    for (name, place), loads in subject.loads.items():
        if name != phase:
            continue
        kept = _folded(_first_tokens(loads, most_tokens))
        tokens = int(kept.tokens_G.sum())
        for metric, statistic in (("gini", gini_rows), ("entropy_bits", entropy_rows)):
            item = statistic_series(kept.load_GE, kept.step_G, statistic)
            if item is not None:
                item = replace(item, tokens=tokens)
                result[Key(metric, phase, place)] = item
                of_metric.setdefault(metric, []).append(item)
        idle = float(np.count_nonzero(kept.load_GE.sum(axis=0) == 0))
        dead = Series(value=idle, exact=True, tokens=tokens)
        result[Key("dead_experts", phase, place)] = dead
        of_metric.setdefault("dead_experts", []).append(dead)
    for metric, items in of_metric.items():
        whole = mean_of(items)
        if metric == "dead_experts":
            whole = replace(whole, value=sum(item.value for item in items), exact=True)
        result[Key(metric, phase)] = whole
    return result


def _folded(loads: GroupedLoads) -> GroupedLoads:
    """At most so many groups: a jackknife leaves out one at a time."""
    first_G = np.arange(0, len(loads.step_G), -(-len(loads.step_G) // _MOST_GROUPS))
    return GroupedLoads(
        load_GE=np.add.reduceat(loads.load_GE, first_G, axis=0),
        tokens_G=np.add.reduceat(loads.tokens_G, first_G),
        step_G=loads.step_G[first_G],
    )


def _first_tokens(loads: GroupedLoads, most_tokens: int) -> GroupedLoads:
    """The first groups, up to so many tokens, at least one."""
    upto = int(
        np.searchsorted(np.cumsum(loads.tokens_G), most_tokens * (1 + _TOKENS_ALIKE / 2), side="right")
    )
    upto = max(upto, 1)
    return GroupedLoads(
        load_GE=loads.load_GE[:upto], tokens_G=loads.tokens_G[:upto], step_G=loads.step_G[:upto]
    )


def entropy_rows(load_SE: Int64) -> Float64:
    """Shannon entropy of each row in bits; NaN where nothing was assigned."""
    total_S1 = load_SE.sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        share_SE = load_SE / total_S1
        bits_SE = np.where(load_SE > 0, -share_SE * np.log2(share_SE), 0.0)
    return np.where(total_S1[:, 0] > 0, bits_SE.sum(axis=1), np.nan)


def _confounders(base: Subject, other: Subject, *, runs: int) -> Iterator[Reason]:
    """What else differs between the two, and what must be known of them."""
    for subject, side in ((base, "the baseline"), (other, "the other")):
        if subject.simulated_device:
            yield Reason(CompareCode.SIMULATED_DEVICE, {"side": side})
    if base.run_id is not None and base.run_id == other.run_id:
        yield Reason(CompareCode.SAME_RUN)
        return
    yield from differing_facts(base, other)
    for subject, side in ((base, "the baseline"), (other, "the other")):
        if subject.short_of_cores:
            yield Reason(CompareCode.SHORT_OF_CORES, {"side": side})
    if base.started_unix_s is not None and other.started_unix_s is not None:
        apart_s = other.started_unix_s - base.started_unix_s
        sides = ("the baseline", "the other") if apart_s >= 0 else ("the other", "the baseline")
        yield Reason(CompareCode.ORDER, {"first": sides[0], "later": sides[1], "apart_s": abs(apart_s)})
    if runs > 1:
        yield Reason(CompareCode.SEVERAL_RUNS, {"runs": runs})
    else:
        yield Reason(CompareCode.ONE_RUN_EACH)


#: Facts that are values by name: only the names that differ are shown.
_CHANGES = {CompareCode.OTHER_SOFTWARE, CompareCode.OTHER_SYSTEM, CompareCode.OTHER_SETTINGS}


def differing_facts(base: Subject, other: Subject) -> Iterator[Reason]:
    """Facts of two subjects that may explain a difference."""
    for code, mine in base.facts.items():
        theirs = other.facts.get(code)
        if code not in other.facts or mine == theirs:
            continue
        if code in _CHANGES:
            yield _changes(CompareCode(code), mine, theirs or {})
        elif code == CompareCode.OTHER_PLACEMENT:
            yield Reason(CompareCode.OTHER_PLACEMENT)
        else:
            yield Reason(CompareCode(code), {"base": _plain(mine), "other": _plain(theirs)})


def _changes(code: CompareCode, mine: Mapping[str, str], theirs: Mapping[str, str]) -> Reason:
    changes: list[JsonValue] = [
        f"{name} {mine.get(name, 'none')} against {theirs.get(name, 'none')}"
        for name in sorted({*mine, *theirs})
        if mine.get(name) != theirs.get(name)
    ]
    return Reason(code, {"changes": changes})


def _plain(value: object) -> JsonValue:
    """A fact for a document."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float) or value is None else str(value)

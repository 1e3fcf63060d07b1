"""Rules, judged by a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from observatory.analysis.compare.collect import measure_run, own_degrees
from observatory.analysis.compare.metrics import Key
from observatory.analysis.compare.series import Series, interval_of
from observatory.analysis.compare.subject import Subject
from observatory.analysis.compare.words import CompareCode
from observatory.analysis.parallel.placement import Placement
from observatory.analysis.parallel.scan import place, placement_rule
from observatory.analysis.rules.judged import Judged
from observatory.analysis.rules.load_rules import DeadExpertJudge, WindowJudge
from observatory.analysis.rules.rules_file import LOAD_METRICS, Rule
from observatory.analysis.rules.words import RuleCode
from observatory.errors import PlacementError
from observatory.reasons import Reason
from observatory.run import LoadBlock, Run

#: Metrics that are a share of the time of a step, and the time that they take.
_SHARES = {"exchange_share": "exchange_ms", "waiting_share": "wait_ms"}


def judge_rules(run: Run, rules: Sequence[Rule]) -> list[Judged]:
    """Judge every rule in each phase, and each layer, that it is about.

    Args:
        run: an open run.
        rules: the rules.

    Returns:
        In the order of the rules, then by phase and layer; at least one for each rule.

    Raises:
        LoadError: loads are negative or inconsistent.
    """
    of_loads = [rule for rule in rules if rule.metric in LOAD_METRICS]
    judged = _judge_loads(run, of_loads) if of_loads else {}
    of_phases = [rule for rule in rules if rule.metric not in LOAD_METRICS]
    if of_phases:
        subject = measure_run(run)
        judged |= {rule: list(_judge_phases(subject, rule)) for rule in of_phases}
    return [item for rule in rules for item in judged[rule]]


def _judge_loads(run: Run, rules: Sequence[Rule]) -> dict[Rule, list[Judged]]:
    top_k = {spec.layer: spec.top_k for spec in run.manifest.model.moe_layers}
    judges: dict[tuple[Rule, str, int], WindowJudge | DeadExpertJudge] = {}
    judged: dict[Rule, list[Judged]] = {rule: [] for rule in rules}
    misplaced: set[tuple[Rule, str, int]] = set()
    phases: set[str] = set()
    for block in run.iter_loads():
        phases.add(block.phase)
        for rule in rules:
            key = (rule, block.phase, block.layer)
            if not _is_about(rule, block) or key in misplaced:
                continue
            if key not in judges:
                try:
                    judges[key] = _judge_of(run, rule, block, top_k.get(block.layer))
                except PlacementError as error:
                    misplaced.add(key)
                    reason = Reason(CompareCode.DEGREE, {"ep": _degree(run), "detail": str(error)})
                    judged[rule].append(
                        Judged(rule=rule, phase=block.phase, layer=block.layer, reason=reason)
                    )
                    continue
            judges[key].add(block)
    for (rule, _, _), judge in sorted(judges.items(), key=lambda item: item[0][1:]):
        judged[rule] += judge.finish()
    return {rule: items or [_nothing_of(rule, phases)] for rule, items in judged.items()}


def _is_about(rule: Rule, block: LoadBlock) -> bool:
    return rule.phase in (None, block.phase) and (rule.layers is None or block.layer in rule.layers)


def _nothing_of(rule: Rule, phases: set[str]) -> Judged:
    if not phases:
        reason = Reason(RuleCode.NO_ROUTING)
    elif rule.phase is not None and rule.phase not in phases:
        reason = Reason(RuleCode.NO_SUCH_PHASE, {"phases": [*sorted(phases)]})
    else:
        reason = Reason(RuleCode.NO_SUCH_LAYER)
    return Judged(rule=rule, phase=rule.phase, reason=reason)


def _degree(run: Run) -> int:
    return next(iter(own_degrees(run.manifest)), 1)


def _judge_of(run: Run, rule: Rule, block: LoadBlock, top_k: int | None) -> WindowJudge | DeadExpertJudge:
    if rule.metric == "dead_steps":
        return DeadExpertJudge(rule, block)
    placement: Placement | None = None
    if rule.metric == "rank_max_over_mean":
        placement = place(
            placement_rule("auto", run.manifest.topology),
            layer=block.layer, experts=block.experts, ep=_degree(run),
        )  # fmt: skip
    return WindowJudge(rule, block, placement, top_k)


def _judge_phases(subject: Subject, rule: Rule) -> Iterator[Judged]:
    """A rule about whole phases."""
    phases = sorted({key.phase for key in subject.series})
    values = {phase: value for phase in phases if (value := _value(subject, rule.metric, phase)) is not None}
    for phase, value in values.items():
        if rule.phase in (None, phase):
            interval = interval_of(value) or (None, None)
            yield Judged(
                rule=rule, phase=phase, value=value.value, low=interval[0], high=interval[1],
                steps=value.steps or None,
            )  # fmt: skip
    if not (values.keys() if rule.phase is None else values.keys() & {rule.phase}):
        reason = _missing(subject, rule)
        if reason is None and rule.phase is not None and rule.phase not in phases:
            reason = Reason(RuleCode.NO_SUCH_PHASE, {"phases": [*phases]})
        yield Judged(rule=rule, phase=rule.phase, reason=reason or Reason(RuleCode.NO_VALUE))


def _value(subject: Subject, metric: str, phase: str) -> Series | None:
    if metric not in _SHARES:
        return subject.series.get(Key(metric, phase))
    part, whole = (subject.series.get(Key(name, phase)) for name in (_SHARES[metric], "ms"))
    if part is None or whole is None or whole.value <= 0:
        return None
    return Series(value=part.value / whole.value)


def _missing(subject: Subject, rule: Rule) -> Reason | None:
    of_share = _SHARES.get(rule.metric)
    names = (rule.metric,) if of_share is None else (of_share, "ms")
    return next((subject.missing[name] for name in names if name in subject.missing), None)

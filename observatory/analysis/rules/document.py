"""The document of ``observatory check``, its table and sentences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from observatory.analysis.columns import Column, Table
from observatory.analysis.rules.judged import Judged
from observatory.analysis.rules.rules_file import Rule
from observatory.analysis.rules.words import sentence
from observatory.run.documents.printed import printed_document
from observatory.text import counted

#: Rows of one broken rule that a table shows at most; all are in the document.
_MOST_SHOWN = 5

_COLUMNS = (
    Column(name="rule", title="rule", text=True, key=True),
    Column(name="phase", title="phase", text=True, key=True),
    Column(name="layer", title="layer", key=True, otherwise="all"),
    Column(name="expert", title="expert", otherwise=""),
    Column(name="value", title="value", interval=("low", "high")),
    Column(name="floor", title="floor", otherwise="", legend="of uniform routing of as many tokens"),
    Column(name="where", title="where", text=True, otherwise=""),
)


def check_document(run: str, rules: Sequence[Rule], judged: Sequence[Judged]) -> dict[str, Any]:
    """Judged rules, as ``--json`` prints them (docs/json.md).

    Args:
        run: path of the run.
        rules: the rules.
        judged: what `judge_rules` returned.
    """
    return printed_document(
        "check",
        {
            "run": run,
            "rules": [
                {"rule": rule.text, **rule.model_dump(), "state": _state_of(rule, judged)} for rule in rules
            ],
            "rows": [_row(item) for item in judged],
        },
    )


def _state_of(rule: Rule, judged: Iterable[Judged]) -> str:
    states = {item.state for item in judged if item.rule == rule}
    return next(state for state in ("broken", "not_judged", "kept") if state in states)


def _row(item: Judged) -> dict[str, Any]:
    return {
        "rule": item.rule.text,
        "metric": item.rule.metric,
        "state": item.state,
        "phase": item.phase,
        "layer": item.layer,
        "expert": item.expert,
        "value": item.value,
        "low": item.low,
        "high": item.high,
        "limit": item.rule.limit,
        "floor": item.floor,
        "first_step": item.first_step,
        "after_step": item.after_step,
        "steps": item.steps,
        "windows": item.windows,
        "broken_windows": item.broken_windows,
        "reason": None
        if item.reason is None
        else {**item.reason.document(), "sentence": sentence(item.reason)},
    }


def check_table(document: Mapping[str, Any]) -> Table:
    """The rows that break a rule, of each rule the worst ones."""
    shown, broken = [], 0
    for rule in document["rules"]:
        rows = [row for row in document["rows"] if row["rule"] == rule["rule"] and row["state"] == "broken"]
        rows.sort(key=lambda row: abs(row["value"] - row["limit"]), reverse=True)
        shown += [{**row, "where": _where(row)} for row in rows[:_MOST_SHOWN]]
        broken += len(rows)
    most = f", of each the {_MOST_SHOWN} worst; all: --json, --csv" if len(shown) < broken else ""
    return Table(
        name="broken", columns=_COLUMNS, rows=shown, title=f"{counted(broken, 'row')} against a rule{most}"
    )


def check_csv(document: Mapping[str, Any]) -> Table:
    """Every row."""
    rows = [
        {**row, "reason": None if row["reason"] is None else row["reason"]["sentence"]}
        for row in document["rows"]
    ]
    return Table(name="rows", columns=(), rows=rows)


def check_sentences(document: Mapping[str, Any]) -> list[str]:
    """What was not judged and why, what chance alone would break, and how many rules are kept."""
    lines = [
        f"NOT JUDGED: {_named(row)}: {row['reason']['sentence']}"
        for row in document["rows"]
        if row["state"] == "not_judged"
    ]
    for rule in document["rules"]:
        of_chance = [row for row in document["rows"] if row["rule"] == rule["rule"] and _is_chance(row)]
        if of_chance:
            lines.append(
                f"{rule['rule']}: uniform routing would break it too in {counted(len(of_chance), 'row')}: "
                "with more tokens in a window the floor is lower"
            )
    states = [rule["state"] for rule in document["rules"]]
    broken, unknown = states.count("broken"), states.count("not_judged")
    lines.append(
        f"{counted(len(states), 'rule')}: {broken} broken, {unknown} not judged, {states.count('kept')} kept"
    )
    return lines


def _is_chance(row: Mapping[str, Any]) -> bool:
    return row["state"] == "broken" and row["floor"] is not None and row["floor"] > row["limit"]


def _named(row: Mapping[str, Any]) -> str:
    """The rule, and where it was to be judged."""
    words = [] if row["phase"] is None or row["rule"].startswith(f"{row['phase']}.") else [row["phase"]]
    if row["layer"] is not None:
        words.append(f"layer {row['layer']}")
    return f"{row['rule']} ({', '.join(words)})" if words else str(row["rule"])


def _where(row: Mapping[str, Any]) -> str:
    if row["metric"] == "dead_steps":
        return "never a token" if row["after_step"] is None else f"after step {row['after_step']}"
    if row["windows"] is not None and row["windows"] > 1:
        return f"from step {row['first_step']}; {row['broken_windows']} of {row['windows']} windows"
    return ""

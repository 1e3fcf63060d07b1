"""Rules about runs, against loops that count by hand; their file; the exit codes of the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from observatory.analysis.rules.judged import Judged
from observatory.analysis.rules.judging import judge_rules
from observatory.analysis.rules.rules_file import Rule
from observatory.cli import main
from observatory.run import open_run
from observatory.run.manifest import Manifest, ModelSpec, MoeLayerSpec
from observatory.run.rows import routing_rows
from observatory.run.writer import RunWriter

EXPERTS, STEPS = 6, 40


@pytest.fixture
def loads_SE() -> np.ndarray:
    """Loads with stretches in which experts get nothing; steps 9 to 11 route nothing at all."""
    rng = np.random.default_rng(7)
    loads = rng.integers(0, 3, size=(STEPS, EXPERTS)) * (rng.random((STEPS, EXPERTS)) < 0.4)
    loads[9:12] = 0
    loads[:, 4] = 0
    loads[5, 2] = 90
    return np.asarray(loads, dtype=np.int64)


@pytest.fixture
def run(tmp_path: Path, loads_SE: np.ndarray) -> Path:
    """Two ranks that share each step's loads; layer 1 has four times those of layer 0."""
    layers = tuple(
        MoeLayerSpec(layer=layer, module=f"m.{layer}", experts=EXPERTS, top_k=1) for layer in (0, 1)
    )
    manifest = Manifest(run_id="id", created_unix_s=1.0, model=ModelSpec(name="made", moe_layers=layers))
    with RunWriter.create(tmp_path / "run", manifest) as writer:
        for layer, factor in ((0, 1), (1, 4)):
            load_NE = loads_SE * factor
            writer.append(
                "routing",
                routing_rows(
                    step_N=3 * np.arange(STEPS),  # every third step was captured
                    phase_N="decode",
                    layer_N=np.full(STEPS, layer),
                    source_rank=0,
                    tokens_N=load_NE.sum(axis=1),
                    load_NE=load_NE,
                ),
            )
    return tmp_path / "run"


def judged(run: Path, **rule: object) -> list[Judged]:
    return judge_rules(open_run(run), [Rule.model_validate(rule)])


def dead_stretches(loads_SE: np.ndarray) -> dict[int, tuple[int, int | None]]:
    """Of each expert the longest stretch without a token, and the step of the token before it."""
    found: dict[int, tuple[int, int | None]] = {}
    for expert in range(EXPERTS):
        length, after, best = 0, None, (0, None)
        for row in range(STEPS):
            if loads_SE[row].sum() == 0:
                continue
            if loads_SE[row, expert]:
                length, after = 0, 3 * row
            else:
                length += 1
                if length > best[0]:
                    best = (length, after)
        found[expert] = best
    return found


@pytest.mark.parametrize("block_bytes", [None, 1])
def test_steps_without_a_token_are_those_of_a_count_by_hand(
    run: Path, loads_SE: np.ndarray, block_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_run(run)
    if block_bytes is not None:  # a block for each step
        whole = opened.iter_loads
        monkeypatch.setattr(opened, "iter_loads", lambda: whole(max_block_bytes=block_bytes))
    expected = dead_stretches(loads_SE)
    for limit in (0, 3, 10, STEPS):
        rows = judge_rules(opened, [Rule(metric="dead_steps", above=limit, layers=(1,))])
        broken = {e: found for e, found in expected.items() if found[0] > limit}
        if broken:
            assert {row.expert: (row.value, row.after_step) for row in rows} == broken
        else:
            assert [(row.expert, row.value, row.state) for row in rows] == [(4, expected[4][0], "kept")]


@pytest.mark.parametrize("window", [1, 7, 40])
def test_the_worst_window_and_the_number_of_broken_ones_are_those_of_a_loop(
    run: Path, loads_SE: np.ndarray, window: int
) -> None:
    ratios = {}
    for start in range(0, STEPS - window + 1, window):
        load_E = loads_SE[start : start + window].sum(axis=0)
        if load_E.sum():
            ratios[3 * start] = load_E.max() / load_E.mean()
    for row in judged(run, metric="expert_max_over_mean", above=2.5, window_steps=window):
        assert row.value == pytest.approx(max(ratios.values()))
        assert ratios[row.first_step or 0] == pytest.approx(row.value)
        assert (row.windows, row.broken_windows) == (
            len(ratios),
            sum(ratio > 2.5 for ratio in ratios.values()),
        )
    low = judged(run, metric="expert_max_over_mean", below=2.5, window_steps=window)
    assert [row.value for row in low] == [pytest.approx(min(ratios.values()))] * 2


def test_a_window_longer_than_the_run_is_not_judged(run: Path) -> None:
    (row,) = judged(run, metric="gini", above=0.1, layers=[1], window_steps=STEPS + 1)
    assert row.state == "not_judged"
    assert row.reason is not None
    assert row.reason.document() == {"code": "few_steps", "needed": STEPS + 1, "steps": STEPS}


def test_values_of_the_whole_run_agree_with_its_routing_table(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["routing", str(run), "--json"]) == 0
    table = {row["layer"]: row for row in json.loads(capsys.readouterr().out)["layers"]}
    for metric in ("gini", "entropy_bits", "expert_max_over_mean"):
        for row in judged(run, metric=metric, above=0):
            assert row.value == pytest.approx(table[row.layer][metric]), metric
            assert row.state == "broken"


def test_a_rule_is_about_its_phase_and_layers_alone(run: Path) -> None:
    assert [row.layer for row in judged(run, metric="gini", above=2, layers=[1, 9])] == [1]
    (missing,) = judged(run, metric="gini", above=2, layers=[9])
    assert missing.reason is not None
    assert missing.reason.code == "no_such_layer"
    (missing,) = judged(run, metric="gini", above=2, phase="prefill")
    assert missing.reason is not None
    assert missing.reason.document() == {"code": "no_such_phase", "phases": ["decode"]}


FILES = {
    "kept": ('metric = "gini"\nabove = 0.9', 0),
    "broken": ('metric = "gini"\nabove = 0.1', 1),
    "broken below": ('metric = "entropy_bits"\nbelow = 3', 1),
    "not captured": ('metric = "waiting_share"\nabove = 0.1', 4),
    "no limit": ('metric = "gini"', 2),
    "two limits": ('metric = "gini"\nabove = 0.1\nbelow = 0.05', 2),
    "not a number": ('metric = "gini"\nabove = nan', 2),
    "text": ('metric = "gini"\nabove = "0.1"', 2),
    "unknown metric": ('metric = "ginni"\nabove = 0.1', 2),
    "unknown key": ('metric = "gini"\nabove = 0.1\nlayer = 3', 2),
    "window of a phase": ('metric = "ms"\nabove = 3\nwindow_steps = 5', 2),
    "window of no steps": ('metric = "gini"\nabove = 0.1\nwindow_steps = 0', 2),
    "dead below": ('metric = "dead_steps"\nbelow = 3', 2),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_rules_decides_the_exit_code(
    name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, code = FILES[name]
    (tmp_path / "rules.toml").write_text(f"[[rule]]\n{text}\n")
    assert main(["check", str(run), "--rules", str(tmp_path / "rules.toml")]) == code
    said = capsys.readouterr()
    assert len([line for line in said.err.splitlines() if line.startswith("observatory:")]) == (code == 2)
    assert ("NOT JUDGED" in said.out) == (code == 4)
    assert ("1 broken" in said.out) == (code == 1)


def test_a_broken_rule_outweighs_one_that_cannot_be_judged(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text("".join(f"[[rule]]\n{FILES[name][0]}\n" for name in ("kept", "broken", "not captured")))
    assert main(["check", str(run), "--rules", str(rules), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert [rule["state"] for rule in document["rules"]] == ["kept", "broken", "not_judged"]
    assert {row["state"] for row in document["rows"]} == {"kept", "broken", "not_judged"}


def test_what_uniform_routing_would_break_too_is_said(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\nmetric = "gini"\nabove = 0.01\nwindow_steps = 1\n')
    assert main(["check", str(run), "--rules", str(rules)]) == 1
    assert "uniform routing would break it too in 2 rows" in capsys.readouterr().out

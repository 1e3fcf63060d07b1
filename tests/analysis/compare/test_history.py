"""Changes of level against known truth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from observatory.analysis.compare.change_points import FALSE_ALARMS, best_split, level, splits
from observatory.analysis.compare.collect import measure_run
from observatory.analysis.compare.history import history_of_runs, history_of_steps, series_of
from observatory.run import open_run
from tests.analysis.compare.made import autoregressive, made_run


@pytest.mark.parametrize(
    ("points", "correlation", "alike"),
    [(12, 0.0, False), (40, 0.0, False), (200, 0.0, True), (200, 0.6, True)],
)
def test_a_series_without_a_change_raises_no_alarm_more_often_than_stated(
    points: int, correlation: float, alike: bool
) -> None:
    alarms = 0
    for seed in range(300):
        split = best_split(autoregressive(points, seed=seed, correlation=correlation), alike=alike)
        assert split is not None
        alarms += split.p <= level(alike=alike)
    assert alarms / 300 < FALSE_ALARMS + 0.038  # three standard errors


@pytest.mark.parametrize("alike", [False, True])
def test_a_change_is_dated(alike: bool) -> None:
    points, at = (200, 120) if alike else (24, 15)
    hits = 0
    for seed in range(40):
        value_N = autoregressive(points, seed=seed, correlation=0.3 if alike else 0.0)
        value_N = value_N + 4 * (np.arange(points) >= at)
        split = best_split(value_N, alike=alike)
        assert split is not None
        hits += split.p <= level(alike=alike) and abs(split.at - at) <= (4 if alike else 1)
    assert hits >= 34


def test_several_changes_are_found_and_one_outlier_is_none() -> None:
    noise = np.random.default_rng(3).normal(size=60)
    steps = noise + 8 * ((np.arange(60) >= 20) & (np.arange(60) < 40))
    first = best_split(steps, alike=False)
    assert first is not None
    assert splits(steps, first, alike=False) == [20, 40]
    spike = noise.copy()
    spike[30] = 1000.0
    split = best_split(spike, alike=False)
    assert split is not None
    assert split.p > FALSE_ALARMS


def test_what_is_constant_or_short_is_not_tested() -> None:
    assert best_split(np.full(50, 3.0), alike=False) is None
    assert best_split(np.arange(7.0), alike=False) is None
    assert best_split(np.arange(39.0), alike=True) is None


def test_changes_of_runs_name_what_else_changed(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    subjects = [
        measure_run(
            open_run(
                made_run(
                    tmp_path / f"{9 - number % 10}-{number}",
                    seed=number,
                    ms=10 * (1 + 0.01 * random.normal()) * (1.4 if number >= 7 else 1.0),
                    started=1e9 + 60 * number,
                    host="node-a" if number < 7 else "node-b",
                    steps=10,
                    phases=("decode",),
                )
            )
        )
        for number in range(12)
    ]
    ((key, ordered),) = series_of(reversed(subjects)).items()
    assert [subject.started_unix_s for subject in ordered] == [1e9 + 60 * number for number in range(12)]
    history = history_of_runs(" ".join(key), ordered)
    tracks = {track.key.name: track for track in history.tracks}
    (change,) = tracks["decode.ms"].changes
    assert change.at == 7
    assert change.after / change.before == pytest.approx(1.4, rel=0.05)
    assert [fact.code for fact in change.facts] == ["other_machine"]  # every run has another seed
    assert tracks["decode.gini"].changes == ()


def test_checkpoints_are_ordered_by_their_training_step(tmp_path: Path) -> None:
    subjects = [
        measure_run(
            open_run(
                made_run(
                    tmp_path / f"run-{step}",
                    seed=step,
                    model=f"moe/checkpoint-{step}",
                    skew=0.2 if step < 600 else 3.0,
                    steps=10,
                    phases=("prefill",),
                    started=1e9 - step,
                )
            )
        )
        for step in range(100, 1300, 100)
    ]
    ((_, ordered),) = series_of(subjects).items()
    history = history_of_runs("moe", ordered)
    assert history.order_by == "training_step"
    assert [point.order for point in history.points] == [float(step) for step in range(100, 1300, 100)]
    tracks = {track.key.name: track for track in history.tracks}
    for name in ("prefill.gini", "prefill.expert_drift", "prefill.entropy_bits"):
        assert [history.points[change.at].order for change in tracks[name].changes] == [600.0]


def test_a_change_inside_one_run_is_found(tmp_path: Path) -> None:
    def share(step: int) -> np.ndarray:
        shares = np.ones(8)
        shares[0] = 1.0 if step < 50 else 4.0
        return shares

    run = made_run(tmp_path / "run", steps=80, share=share, phases=("prefill",))
    (history,) = history_of_steps(measure_run(open_run(run)))
    tracks = {track.key.name: track for track in history.tracks}
    (change,) = tracks["prefill.gini"].changes
    assert abs(history.points[change.at].order - 50) <= 3
    assert tracks["prefill.ms"].changes == ()


def test_the_range_of_a_correction_bias_is_a_series(tmp_path: Path) -> None:
    def bias(step: int) -> np.ndarray:
        return np.linspace(0.0, (0.01 if step < 50 else 0.04) + 1e-4 * np.sin(step), 8)

    run = made_run(tmp_path / "run", steps=80, bias=bias, phases=("train_forward",))
    subject = measure_run(open_run(run))
    (history,) = history_of_steps(subject)
    biases = [track for track in history.layers if track.key.metric == "router_bias"]
    assert [track.key.layer for track in biases] == [0, 1]
    (change,) = biases[0].changes
    assert history.points[change.at].order == 50
    assert (change.before, change.after) == pytest.approx((0.01, 0.04), rel=0.05)
    (whole,) = (
        track for track in history_of_runs("runs", [subject]).tracks if track.key.metric == "router_bias"
    )
    assert whole.value_N == pytest.approx([0.04], rel=0.05)


def test_runs_of_other_batches_or_devices_are_series_of_their_own(tmp_path: Path) -> None:
    set_ups = ({}, {"batch_size": 8}, {"device_kind": "replay"}, {"device_kind": "nvidia"})
    subjects = [
        measure_run(open_run(made_run(tmp_path / f"{number}-{again}", steps=2, **set_up)))  # type: ignore[arg-type]
        for number, set_up in enumerate(set_ups)
        for again in range(2)
    ]
    assert [len(of_key) for of_key in series_of(subjects).values()] == [2, 2, 2, 2]
    assert any("replay made" in key for key in series_of(subjects))

"""What a report says about clocks: sweeps as measured, the front, and the advice with its evidence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from observatory.advice.frequency import recommend_clocks
from observatory.analysis.frequency import ClockModel, fit_clocks
from observatory.cli import main
from observatory.errors import ClockError
from observatory.reports.frames.collect import collect
from observatory.reports.frames.frequency import ClockFrames, collect_clocks
from observatory.reports.frames.report import ReportFrames
from observatory.reports.page import FigureBlock, Section
from observatory.reports.sections import clocks_section, file_records, problems
from observatory.run import open_run
from observatory.run.documents.clock_sweep import ClockSweep
from tests.devices.synthetic_device import DEVICES
from tests.reports.sample_power import a_sweep
from tests.reports.sample_runs import manifest, stated, write_run
from tests.reports.test_report import HOSTILE, Tags


def saved(path: Path, document: ClockSweep | ClockModel) -> Path:
    path.write_text(document.model_dump_json(), encoding="utf-8")
    return path


def found(*paths: Path, max_slowdown: float = 0.02) -> ClockFrames:
    frames = collect_clocks(paths, max_slowdown=max_slowdown)
    assert frames is not None
    return frames


@pytest.fixture(scope="module")
def sweep_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("sweep") / "sweep.json", a_sweep())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "run", manifest(layers=1, experts=4, top_k=1), steps=4)


@pytest.fixture(scope="module")
def frames(run: Path, sweep_file: Path) -> ReportFrames:
    return collect([open_run(run)], ep_degrees=(2,), gpus_per_node=4, clocks=found(sweep_file))


def figure(section: Section, name: str) -> Any:
    (block,) = [block for block in section.blocks if isinstance(block, FigureBlock) and block.id == name]
    (variant,) = block.variants
    return variant.figure


def named(shown: Any, name: str) -> Any:
    return next(trace for trace in shown.data if trace.name == name)


def test_the_plane_shows_every_setting_as_measured_relative_to_unlocked(frames: ReportFrames) -> None:
    sweep = a_sweep()
    shown = figure(clocks_section(frames), "clock-plane")
    energies: dict[tuple[int | None, int | None], list[tuple[float, float]]] = {}
    for point in sweep.series[0].points:
        assert point.energy_mj is not None
        key = (point.requested_sm_clock_mhz, point.requested_limit_mw)
        energies.setdefault(key, []).append((point.iteration_s, point.energy_mj / point.iterations))
    middle = {key: np.median(np.array(values), axis=0) for key, values in energies.items()}
    base_s, base_mj = middle[None, None]
    expected = sorted(
        (100 * (seconds / base_s - 1), 100 * (mj / base_mj - 1)) for seconds, mj in middle.values()
    )
    drawn = sorted(
        pair
        for name in ("clock locked", "power capped", "unlocked")
        for pair in zip(named(shown, name).x, named(shown, name).y, strict=True)
    )
    assert np.array(drawn) == pytest.approx(np.array(expected), abs=0.6)
    assert len(drawn) == len(expected)


def test_the_front_holds_what_nothing_beats_in_both(frames: ReportFrames) -> None:
    assert frames.clocks is not None
    points = frames.clocks.points
    for row in points.itertuples():
        beaten = ((points["slowdown"] < row.slowdown) & (points["saving"] > row.saving)).any()
        assert not (row.on_front and beaten)
        if not row.on_front:
            at_least = (points["slowdown"] <= row.slowdown) & (points["saving"] >= row.saving)
            assert at_least.sum() > 1
    line = named(figure(clocks_section(frames), "clock-plane"), "Pareto front of what was measured")
    front = points[points["on_front"].astype(bool)].sort_values("slowdown")
    assert list(line.x) == pytest.approx((front["slowdown"] * 100).tolist())
    assert (np.diff(list(line.y)) <= 1e-9).all(), "further right on the front there is less energy"


def test_the_recommended_point_is_that_of_the_advice_and_the_sentence_gives_its_evidence(
    frames: ReportFrames,
) -> None:
    (advice,) = recommend_clocks(fit_clocks([a_sweep()], sources=["sweep.json"], bootstrap=200)).series
    assert advice.choice is not None
    ring = named(figure(clocks_section(frames), "clock-plane"), "recommended")
    assert ring.x[0] == pytest.approx(100 * advice.choice.slowdown.value)
    assert ring.y[0] == pytest.approx(-100 * advice.choice.saving.value)
    assert ring.text[0] == f"{advice.choice.sm_clock_mhz:.0f} MHz"
    sentence = next(text for text in stated(frames) if "lock to" in text)
    for part in (
        f"lock to {advice.choice.sm_clock_mhz:.0f} MHz",
        "which saves",
        "for a slowdown of",
        "measured",
    ):
        assert part in sentence
    assert sentence.startswith("Synthetic GPU, memory-bound")
    assert sentence == clocks_section(frames).lead[0]
    truth = DEVICES["memory-bound"]
    assert advice.choice.saving.value == pytest.approx(truth.saving(advice.choice.sm_clock_mhz), abs=0.02)


def test_the_ring_stands_where_a_lock_costs_time(run: Path, tmp_path: Path) -> None:
    path = saved(tmp_path / "sweep.json", a_sweep("compute-bound"))
    shown = collect([open_run(run)], ep_degrees=(2,), gpus_per_node=4, clocks=found(path, max_slowdown=0.2))
    (advice,) = recommend_clocks(
        fit_clocks([a_sweep("compute-bound")], sources=["sweep.json"], bootstrap=200), max_slowdown=0.2
    ).series
    assert advice.choice is not None
    assert advice.choice.slowdown.value > 0.05
    ring = named(figure(clocks_section(shown), "clock-plane"), "recommended")
    assert ring.x[0] == pytest.approx(100 * advice.choice.slowdown.value)
    budget = figure(clocks_section(shown), "clock-plane").layout.shapes[0]
    assert (budget.x0, budget.x1) == (20.0, 20.0)


def test_the_curves_pass_through_what_the_device_does(frames: ReportFrames) -> None:
    shown = figure(clocks_section(frames), "clock-curves")
    device = DEVICES["memory-bound"]
    times, energies = (trace for trace in shown.data if trace.name == "fitted")
    assert list(times.y) == pytest.approx([1e3 * device.iteration_s(mhz) for mhz in times.x], rel=0.03)
    assert list(energies.y) == pytest.approx([device.energy_j(mhz) for mhz in energies.x], rel=0.03)
    unlocked = named(shown, "unlocked")
    assert unlocked.x[0] == 1830
    assert next(shape.x0 for shape in shown.layout.shapes if shape.xref == "x") == 1830


def test_a_fit_is_shown_as_its_sweep_is(sweep_file: Path, tmp_path: Path) -> None:
    fit = saved(tmp_path / "fit.json", fit_clocks([a_sweep()], sources=["sweep.json"], bootstrap=200))
    ours, theirs = found(sweep_file), found(fit)
    assert [file.what for file in (*ours.files, *theirs.files)] == ["sweep", "fit"]
    assert ours.files[0].advice == theirs.files[0].advice
    assert ours.points.equals(theirs.points)


def test_a_budget_changes_the_clock(sweep_file: Path) -> None:
    tight, loose = found(sweep_file, max_slowdown=0.0), found(sweep_file, max_slowdown=0.5)
    assert tight.files[0].advice.max_slowdown == 0.0
    assert loose.options()[-2:] == ["--max-slowdown", "0.5"]
    with pytest.raises(ClockError, match="is no budget"):
        found(sweep_file, max_slowdown=11.0)


def test_a_sweep_of_too_few_clocks_is_left_out_and_named(run: Path, tmp_path: Path) -> None:
    few = saved(tmp_path / "few.json", a_sweep(locks_mhz=(1500,), caps_w=()))
    shown = collect([open_run(run)], ep_degrees=(2,), gpus_per_node=4, clocks=found(few))
    assert "3 at least are needed" in clocks_section(shown).reason
    assert any(name == "few.json" and "3 at least" in lines[0] for name, lines in problems(shown))


def test_a_sweep_without_energy_shows_times_and_why_there_is_no_saving(run: Path, tmp_path: Path) -> None:
    sweep = a_sweep()
    series = sweep.series[0]
    points = tuple(point.model_copy(update={"energy_mj": None}) for point in series.points)
    bare = sweep.model_copy(update={"series": (series.model_copy(update={"points": points}),)})
    shown = collect(
        [open_run(run)], ep_degrees=(2,), gpus_per_node=4, clocks=found(saved(tmp_path / "bare.json", bare))
    )
    section = clocks_section(shown)
    assert [block.id for block in section.blocks if isinstance(block, FigureBlock)] == ["clock-curves"]
    assert "no saving can be stated" in section.lead[0]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema_version": "1.0", "series": []}', "\0", "9" * 50])
def test_a_file_that_is_neither_is_refused_in_one_sentence(text: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ClockError, match="make one with"):
        found(path)
    with pytest.raises(ClockError, match="cannot be read"):
        found(tmp_path / "absent.json")


def test_a_newer_schema_is_refused(sweep_file: Path, tmp_path: Path) -> None:
    document = json.loads(sweep_file.read_text()) | {"schema_version": "9.0"}
    path = tmp_path / "newer.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ClockError, match=r"has schema 9\.0"):
        found(path)


def test_hostile_text_of_a_sweep_stays_text_and_the_page_says_how_to_make_it_again(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = a_sweep()
    series = tuple(item.model_copy(update={"name": HOSTILE}) for item in sweep.series)
    device = sweep.device.model_copy(update={"name": HOSTILE, "uuid": HOSTILE[:100]})
    nasty = sweep.model_copy(update={"series": series, "device": device, "argv": (HOSTILE,)})
    path, out = saved(tmp_path / "sweep.json", nasty), tmp_path / "page.html"
    argv = ["report", str(run), "--clocks", str(path), "--max-slowdown", "0.05", "--out", str(out)]
    assert main(argv) == 0
    capsys.readouterr()
    page = out.read_text(encoding="utf-8")
    parsed = Tags()
    parsed.feed(page)
    assert [each for tag, each in parsed.tags if tag == "script" and "type" not in each] == [{}, {}]
    assert not [tag for tag, _ in parsed.tags if tag in ("img", "iframe", "object", "link")]
    assert f"--clocks {path} --max-slowdown 0.05" in page
    assert "clock sweep, fitted for this page" in page


def test_the_records_of_clock_files_are_among_those_of_the_page(frames: ReportFrames) -> None:
    (record,) = file_records(frames)
    assert record.title == "sweep.json: clock sweep, fitted for this page"
    assert dict(record.pairs)["fitted to"] == "sweep.json"

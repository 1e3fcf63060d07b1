"""What a report says about power and energy: the run's own rows, what it refuses,
what it leaves out aloud."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from observatory.analysis.energy import energy_summary
from observatory.reports import write_report
from observatory.reports.figures.energy import device_energy, token_energy
from observatory.reports.figures.power import power_timeline
from observatory.reports.frames.collect import collect
from observatory.reports.frames.power import BINS
from observatory.reports.frames.report import ReportFrames
from observatory.reports.outline import build_sections
from observatory.reports.page import Cell, FigureBlock, Section, Table
from observatory.reports.sections import energy_section, power_section, problems
from observatory.reports.text import millijoules
from observatory.reports.thinning import joined_stretches, kept_samples
from observatory.run import RunWriter, open_run
from observatory.run.manifest import ClockSpec, DeviceSpec, RankPower
from tests.analysis.energy.runs import write_energy_run
from tests.devices.recordings import recorded_rows
from tests.devices.sensor import SimulatedSensor, spans_of, steps
from tests.reports.sample_power import DEVICE, UUID, a_load, a_power_run, samples_of
from tests.reports.sample_runs import manifest, stated, write_run
from tests.reports.test_report import HOSTILE, Tags


def frames_of(*runs: Path) -> ReportFrames:
    return collect([open_run(run) for run in runs], ep_degrees=(2,), gpus_per_node=4)


def figures(section: Section) -> dict[str, FigureBlock]:
    return {block.id: block for block in section.blocks if isinstance(block, FigureBlock)}


def said(frames: ReportFrames) -> str:
    """Everything that the sections about power say outside tables, and the gaps."""
    parts = [line for _, lines in problems(frames) for line in lines]
    for section in build_sections(frames, gpus_per_node=4):
        if section.id in ("power", "energy", "clocks"):
            parts += [*section.lead, section.reason]
            parts += [variant.note for block in figures(section).values() for variant in block.variants]
    return "\n".join(filter(None, parts))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_power_run(tmp_path_factory.mktemp("power") / "run")


@pytest.fixture(scope="module")
def frames(run: Path) -> ReportFrames:
    return frames_of(run)


def marks(figure: Any) -> list[Any]:
    return [trace for trace in figure.data if trace.type == "scatter" and trace.mode == "markers"]


def trace_named(figure: Any, name: str) -> Any:
    return next(trace for trace in figure.data if trace.name == name)


def test_every_point_of_the_course_is_a_sample_of_the_run(run: Path, frames: ReportFrames) -> None:
    (variant,) = figures(power_section(frames))["power-timeline"].variants
    rows = open_run(run).power().sort_values("time_ns")
    seconds = (rows["time_ns"] - rows["time_ns"].min()) * 1e-9
    for name, column, factor in (
        ("power", "power_mw", 1e-3),
        ("SM clock", "sm_clock_mhz", 1.0),
        ("memory clock", "memory_clock_mhz", 1.0),
        ("temperature", "temperature_c", 1.0),
        ("power limit", "enforced_limit_mw", 1e-3),
    ):
        trace = trace_named(variant.figure, name)
        assert list(trace.x) == pytest.approx(seconds.tolist(), abs=1e-4), name
        assert list(trace.y) == pytest.approx((rows[column].astype(float) * factor).tolist(), abs=1e-3), name


def test_phases_and_reasons_lie_where_spans_and_samples_have_them(run: Path, frames: ReportFrames) -> None:
    (variant,) = figures(power_section(frames))["power-timeline"].variants
    opened = open_run(run)
    start_ns = opened.power()["time_ns"].min()
    spans = opened.spans()
    for phase in ("prefill", "decode"):
        own = spans[spans["phase"] == phase]
        lane = trace_named(variant.figure, phase)
        assert lane.base[0] == pytest.approx((own["start_ns"].min() - start_ns) * 1e-9, abs=1e-3)
        assert lane.base[-1] + lane.x[-1] == pytest.approx((own["end_ns"].max() - start_ns) * 1e-9, abs=1e-3)
    cap = trace_named(variant.figure, "power cap")
    outcome = opened.power()
    held = outcome[outcome["event_reasons"] == 0x4]["time_ns"]
    assert cap.base[0] == pytest.approx((held.min() - start_ns) * 1e-9, abs=1e-3)
    assert sum(cap.x) == pytest.approx(0.05 * len(held), rel=0.02)
    shaded = [shape for shape in variant.figure.layout.shapes if shape.type == "rect"]
    assert shaded[0].x0 == pytest.approx(trace_named(variant.figure, "prefill").base[0])


@given(
    st.integers(3, 12).flatmap(
        lambda bins: st.tuples(
            st.just(bins),
            arrays.arrays(np.float64, st.integers(1, 300), elements=st.floats(0, 1e6, allow_nan=False)),
        )
    )
)
def test_thinning_keeps_every_extreme_and_invents_nothing(given_: tuple[int, np.ndarray]) -> None:
    bins, value = given_
    time_ns = np.arange(len(value), dtype=np.int64) * 50
    kept = kept_samples(time_ns, value, np.zeros(len(value), np.int64), bins=bins)
    assert len(kept) <= max(2 * bins + 2, 0) or len(value) <= 2 * bins
    assert (np.diff(kept) > 0).all()
    assert {0, len(value) - 1} <= set(kept.tolist())
    assert value[kept].max() == value.max()
    assert value[kept].min() == value.min()


def test_stretches_closer_than_can_be_seen_are_one() -> None:
    start, end = np.array([0, 12, 50, 52]), np.array([10, 20, 51, 60])
    joined = joined_stretches(start, end, closer_ns=5)
    assert [array.tolist() for array in joined] == [[0, 50], [20, 60]]
    inside = joined_stretches(np.array([0, 2]), np.array([100, 3]), closer_ns=5)
    assert [array.tolist() for array in inside] == [[0], [100]], "a stretch inside another ends nothing"


def test_thousands_of_samples_are_thinned_aloud_and_the_page_stays_small(tmp_path: Path) -> None:
    path = tmp_path / "run"
    table = recorded_rows(samples=40_000, uuid=UUID)
    power = table.column("power_mw").to_numpy().copy()
    power[12_345] = 999_999_000
    table = table.set_column(table.column_names.index("power_mw"), "power_mw", [power])
    with RunWriter.create(path, manifest()) as writer:
        writer.append("power", table)
        writer.update_manifest(devices=(DEVICE,))
    shown = frames_of(path)
    (variant,) = figures(power_section(shown))["power-timeline"].variants
    trace = trace_named(variant.figure, "power")
    assert len(trace.x) <= 2 * BINS + 2
    assert max(trace.y) == pytest.approx(999_999.0), "the peak of one sample is drawn"
    assert "40\u202f000 samples" in variant.note
    assert "of power drawn" in variant.note
    assert f"more than {2 * BINS}" in figures(power_section(shown))["power-timeline"].caption
    page = write_report([path], tmp_path / "page.html").stat().st_size
    bare = write_report([write_run(tmp_path / "bare", manifest(), steps=2)], tmp_path / "bare.html")
    assert page < bare.stat().st_size + 150_000


def test_a_reading_that_is_missing_and_a_hole_interrupt_the_line(tmp_path: Path) -> None:
    power = samples_of(a_load())
    power.loc[20:24, "power_mw"] = np.nan
    power = power.drop(index=range(60, 80))
    shown = frames_of(a_power_run(tmp_path / "run", power=power))
    (variant,) = figures(power_section(shown))["power-timeline"].variants
    line = trace_named(variant.figure, "power")
    assert sum(value is None for value in line.y) == 2
    clock = trace_named(variant.figure, "SM clock")
    assert sum(value is None for value in clock.y) == 1, "the clock was reported all the time"


def test_energy_per_token_is_that_of_the_summary_idle_apart(run: Path, frames: ReportFrames) -> None:
    tokens = energy_summary(open_run(run)).tokens.set_index("phase")
    (variant,) = figures(energy_section(frames))["energy-tokens"].variants
    for phase, truth in (("prefill", 650.0 * 150 / 2048), ("decode", 310.0 * 10 / 16)):
        row = tokens.loc[phase]
        idle = [trace for trace in variant.figure.data if trace.name == "idle power over the same time"]
        above = trace_named(variant.figure, f"{phase}, above idle")
        same = next(trace for trace in idle if trace.xaxis == above.xaxis)
        assert above.x[0] == pytest.approx(row["above_idle_mj_per_token"])
        assert same.x[0] == pytest.approx(row["idle_mj_per_token"])
        whole = next(trace for trace in marks(variant.figure) if trace.xaxis == above.xaxis)
        assert whole.x[0] == pytest.approx(row["mj_per_token"])
        assert whole.x[0] + whole.error_x.array[0] == pytest.approx(row["mj_per_token_high"])
        assert whole.x[0] - whole.error_x.arrayminus[0] == pytest.approx(row["mj_per_token_low"])
        assert whole.x[0] == pytest.approx(truth, rel=0.03), "and that of the load"
    titles = [axis.title.text for axis in (variant.figure.layout.xaxis, variant.figure.layout.xaxis2)]
    assert titles == ["prefill: mJ per input token", "decode: mJ per output token"]


def test_the_parts_of_a_device_add_up_to_its_energy(frames: ReportFrames) -> None:
    (variant,) = figures(energy_section(frames))["energy-devices"].variants
    bars = {trace.name: trace.x[0] for trace in variant.figure.data if trace.type == "bar"}
    (whole,) = marks(variant.figure)
    assert sum(bars.values()) == pytest.approx(whole.x[0], rel=0.01)
    assert set(bars) >= {"prefill, above idle", "decode, above idle", "idle power during phases", "idle time"}
    assert bars["idle time"] == pytest.approx(1.5 * 80, rel=0.05)


def test_the_findings_give_energy_per_token_and_say_that_the_limit_binds(frames: ReportFrames) -> None:
    text = "\n".join(stated(frames))
    assert "In prefill, known takes 47." in text
    assert "per input token" in text
    assert "per output token" in text
    assert "binds: it holds the clock down" in text


def test_the_report_gives_the_clock_where_the_limit_holds_next_to_that_of_all_samples(tmp_path: Path) -> None:
    power = samples_of(a_load())
    power["sm_clock_mhz"] = power["sm_clock_mhz"].where(power["event_reasons"] != 0x1, 885)
    shown = frames_of(a_power_run(tmp_path / "run", power=power))
    (variant,) = figures(power_section(shown))["power-timeline"].variants
    sentence = "the SM clock is 1755 MHz: a lock above 1755 MHz would do nothing there"
    assert sentence in variant.note
    assert any(sentence in text for text in stated(shown))
    assert not any("moved between" in text for text in stated(shown)), "only what holds a clock"
    columns = [column.title for column in variant.numbers.columns]
    whole = dict(zip(columns, variant.numbers.rows[0], strict=True))
    assert (whole["Part"].text, whole["Part"].detail) == ("whole run", str(len(power)))
    busy = power[power["event_reasons"] != 0x1]
    assert whole["Clock while busy, MHz"].text == f"{busy['sm_clock_mhz'].median():.0f}"
    assert whole["Clock while busy, MHz"].detail == "1755"
    of_busy = 100 * float((busy["event_reasons"] == 0x4).mean())
    assert f"of the time, {of_busy:.0f} % of the busy time" in variant.note
    assert whole["Held by limit"].detail != whole["Held by limit"].text


def test_counter_and_power_that_disagree_are_flagged_everywhere(tmp_path: Path) -> None:
    shown = frames_of(a_power_run(tmp_path / "run", power=samples_of(a_load(), counter_gain=1.3)))
    flag = "counter and integrated power differ by +"
    assert flag in said(shown)
    assert any(flag in line for _, lines in problems(shown) for line in lines)
    assert any("It is flagged" in sentence for sentence in stated(shown))
    (variant,) = figures(energy_section(shown))["energy-tokens"].variants
    assert {trace.marker.symbol for trace in marks(variant.figure)} == {"x"}
    assert flag in variant.numbers.rows[0][-1].text


def test_steps_in_time_with_the_sensor_are_warned_of(tmp_path: Path) -> None:
    load = steps([("decode", 50.0, 500.0), ("", 50.0, 90.0)], seconds=12)
    shown = frames_of(a_power_run(tmp_path / "run", load=load))
    assert shown.power is not None
    assert (shown.power.aliasing["error"] > 0.02).any()
    warned = [text for text in energy_section(shown).lead if text.startswith("Warning:")]
    assert "steps of decode take 100.0 ms and move in time with the power sensor" in warned[0]
    assert "its integrated power may be off by up to" in warned[0]


def test_a_device_without_a_counter_has_energy_by_power_and_says_so(tmp_path: Path) -> None:
    shown = frames_of(a_power_run(tmp_path / "run", power=samples_of(a_load(), counter_ms=None)))
    assert shown.power is not None
    assert set(shown.power.devices["source"]) == {"integral"}
    (variant,) = figures(energy_section(shown))["energy-devices"].variants
    row = {
        column.title: cell.text
        for column, cell in zip(variant.numbers.columns, variant.numbers.rows[0], strict=True)
    }
    assert row["By counter"] == "n/a"
    assert row["By power"] != "n/a"


def test_a_device_that_tells_energy_alone_is_drawn_by_its_counter(tmp_path: Path) -> None:
    load = a_load()
    power = (
        SimulatedSensor().sample(load, poll_ms=50.0).assign(device_uuid="rapl:package-0@a", power_mw=np.nan)
    )
    spec = DeviceSpec(kind="rapl", name="package-0", uuid="rapl:package-0@a")
    shown = frames_of(a_power_run(tmp_path / "run", power=power, load=load, devices=(spec,)))
    (variant,) = figures(power_section(shown))["power-timeline"].variants
    trace = trace_named(variant.figure, "power by the counter")
    middle = np.array(
        [value for at, value in zip(trace.x, trace.y, strict=True) if at is not None and 2.6 < at < 5]
    )
    assert middle == pytest.approx(650, rel=0.25)
    assert middle.mean() == pytest.approx(650, rel=0.03)
    assert "The device reports energy only" in variant.note
    assert "The phases are those of rank 0, which sampled it" in variant.note
    assert "SM clock" in variant.note
    assert {trace.name for trace in variant.figure.data} == {"power by the counter", "prefill", "decode"}


def test_samples_that_end_before_the_phases_do_are_marked(tmp_path: Path) -> None:
    power = samples_of(a_load())
    power = power[power["time_ns"] < power["time_ns"].min() + 9e9]
    status = RankPower(sampled=(DEVICE,), period_s=0.05, notes=(f"{UUID} was lost after 180 samples",))
    path = a_power_run(tmp_path / "run", power=power)
    with RunWriter.create(tmp_path / "other", manifest()) as writer:
        writer.set_power(status)
    shown = frames_of(path)
    (variant,) = figures(power_section(shown))["power-timeline"].variants
    assert [note.text for note in variant.figure.layout.annotations] == [" samples end"]
    assert "The samples end at" in variant.note
    lost = frames_of(tmp_path / "other")
    assert "was lost after 180 samples" in power_section(lost).reason, "a run without rows gives its own "
    "reason"


def test_a_run_without_power_says_why_in_place_of_charts(tmp_path: Path) -> None:
    shown = frames_of(write_run(tmp_path / "run", manifest(), steps=4))
    sections = {section.id: section for section in build_sections(shown, gpus_per_node=4)}
    assert "none were asked for" in sections["power"].reason
    assert sections["power"].blocks == ()
    assert "energy" not in sections
    assert "clocks" not in sections


def test_a_device_that_tells_nothing_is_named_with_its_reason(tmp_path: Path) -> None:
    load = a_load()
    empty = SimulatedSensor().sample(load, poll_ms=50.0).assign(
        device_uuid="none", power_mw=np.nan, energy_mj=np.nan
    )  # fmt: skip
    path = a_power_run(
        tmp_path / "run", power=empty, load=load, devices=(DeviceSpec(kind="null", uuid="none"),)
    )
    reason = {"power_mw": "no device was asked for", "sm_clock_mhz": "no device was asked for"}
    with RunWriter.create(tmp_path / "second", manifest()) as writer:
        writer.set_power(RankPower(unavailable={"none": reason}))
        writer.append("power", _arrow(empty))
    for run in (path, tmp_path / "second"):
        section = power_section(frames_of(run))
        assert section.blocks == ()
        assert "No device reported its power, clock or temperature." in section.reason
    assert "power and SM clock: no device was asked for" in section.reason


def _arrow(frame: pd.DataFrame) -> Any:
    import pyarrow as pa

    own = frame.drop(columns="source_rank").astype({"power_mw": "Int64", "energy_mj": "Int64"})
    return pa.Table.from_pandas(own, preserve_index=False)


def test_hostile_names_of_devices_stay_text(tmp_path: Path) -> None:
    def a_page(kind: str, name: str, uuid: str) -> tuple[Path, Counter[str]]:
        power = samples_of(a_load()).assign(device_uuid=uuid)
        spec = DeviceSpec(kind=kind, name=name, uuid=uuid)
        path = a_power_run(tmp_path / str(len(kind)), power=power, devices=(spec,))
        parsed = Tags()
        parsed.feed(write_report([path], path.with_suffix(".html")).read_text(encoding="utf-8"))
        return path, Counter(tag for tag, _ in parsed.tags)

    path, tags = a_page(HOSTILE, HOSTILE, HOSTILE[:100])
    _, harmless = a_page("other", "a device", "an identifier")
    assert harmless["script"]
    assert harmless["table"]
    assert tags == harmless, "names make no elements"
    frames = frames_of(path)
    for section in (power_section(frames), energy_section(frames)):
        for block in figures(section).values():
            for variant in block.variants:
                text = variant.figure.to_json()
                assert "<img" not in text
                assert "<a href" not in text
                assert "javascript:hit()>%{x}" not in text


def test_figures_of_many_devices_and_ranks_stay_readable() -> None:
    tokens = pd.DataFrame(
        [
            {"source_rank": rank, "phase": "decode", "kind": "output", "tokens": 10, "mj_per_token": 5.0,
             "mj_per_token_low": 4.0, "mj_per_token_high": 6.0, "idle_mj_per_token": np.nan,
             "above_idle_mj_per_token": np.nan, "flag": None}
            for rank in range(24)
        ]
    )  # fmt: skip
    figure = token_energy(tokens)
    assert trace_named(figure, "decode, idle part not known").x[0] == 5.0
    assert figure.layout.height < 1200
    devices = pd.DataFrame(
        {"device_uuid": ["a", "b"], "energy_mj": [10.0, 20.0], "error": [0.1, np.nan], "flag": [None, "x"]}
    )
    parts = pd.DataFrame(
        {"device_uuid": ["a", "b"], "part": ["idle time"] * 2, "phase": [""] * 2, "mj": [10.0, 20.0]}
    )
    (energies,) = marks(device_energy(devices, parts))
    assert list(energies.marker.symbol) == ["diamond", "x"]
    nothing = pd.DataFrame({"quantity": [], "segment": [], "time_s": [], "value": []})
    bare = power_timeline(nothing, nothing.assign(phase=[], start_s=[], end_s=[]), nothing.assign(bit=[]))
    assert len(bare.data) == 0


def test_the_course_of_a_load_without_spans_says_that_no_phase_is_known(tmp_path: Path) -> None:
    power = samples_of(a_load())
    path = tmp_path / "telemetry"
    with RunWriter.create(path, manifest()) as writer:
        writer.append("power", _arrow(power))
        writer.update_manifest(devices=(DEVICE,))
    shown = frames_of(path)
    assert "it left no spans of phases" in said(shown)
    assert "has no energy per token" in said(shown)
    assert [section.id for section in build_sections(shown, gpus_per_node=4) if section.id != "plan"] == [
        "step-times", "energy", "power", "clocks",
    ]  # fmt: skip
    page = write_report([path], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<h1><bdi>Power of gqa-tiny</bdi></h1>" in page


def two_ranks(path: Path) -> Path:
    """Two ranks of one node, a device each; the second draws half. Spans inside are too short to tell."""
    loads = [steps([("decode", 40.0, watts)], seconds=6, jitter=0.1) for watts in (600.0, 300.0)]
    uuids = [UUID, UUID.replace("GPU-", "GPU-f")]
    sensors = [SimulatedSensor(device_uuid=uuid) for uuid in uuids]
    spans = []
    for load in loads:
        own = spans_of(load)
        own = own.assign(step=np.arange(len(own)))
        inside = [own.assign(name=name, end_ns=own["start_ns"] + 2_000_000) for name in ("pack", "route")]
        inside[1] = inside[1].assign(start_ns=own["start_ns"] + 3_000_000, end_ns=own["start_ns"] + 4_000_000)
        spans.append(pd.concat([own, *inside]))
    clock = ClockSpec(offset_ns=0, uncertainty_ns=0, method="shared clock", identity="host")
    power = pd.concat([sensor.sample(load) for sensor, load in zip(sensors, loads, strict=True)])
    return write_energy_run(
        path,
        power=power.sort_values("time_ns", kind="stable"),
        spans=spans,
        tokens={"decode": 16},
        clocks=[clock, clock],
        own_devices=[(uuid,) for uuid in uuids],
        devices=tuple(DeviceSpec(kind="gpu", name="NVIDIA H100 80GB HBM3", uuid=uuid) for uuid in uuids),
        topology={"ranks": 2, "node_of_rank": (0, 0)},
    )


@pytest.mark.slow
def test_all_ranks_together_stand_next_to_the_rank_that_takes_most(tmp_path: Path) -> None:
    run = two_ranks(tmp_path / "run")
    (total,) = energy_summary(open_run(run)).totals.to_dict("records")
    assert total["mj_per_token"] == pytest.approx((600 + 300) * 40 / 32, rel=0.02)
    frames = frames_of(run)
    (sentence,) = [text for text in stated(frames) if "per output token" in text]
    assert f"(rank 0, the most of 2; over all ranks: {millijoules(total['mj_per_token'])})" in sentence
    section = energy_section(frames)
    numbers = figures(section)["energy-tokens"].variants[0].numbers
    assert numbers is not None
    assert [row[1].text for row in numbers.rows] == ["all 2", "0", "1"]


def test_spans_that_are_not_known_for_one_reason_share_a_row(tmp_path: Path) -> None:
    frames = frames_of(two_ranks(tmp_path / "run"))
    assert frames.power is not None
    inside = frames.power.phases[frames.power.phases["span"].notna()]
    assert inside["power_mw"].isna().sum() >= 4
    table = next(block for block in energy_section(frames).blocks if isinstance(block, Table))
    joined = [row for row in table.rows if isinstance(row[0], Cell) and "spans" in row[0].text]
    assert joined
    for row in joined:
        words = [cell.text if isinstance(cell, Cell) else cell for cell in row]
        assert "pack" in words[-1]
        assert len(table.rows) < len(frames.power.phases)


@pytest.mark.parametrize("samples", [None, 40], ids=["whole", "too few samples"])
def test_every_link_of_a_page_leads_somewhere(samples: int | None, tmp_path: Path) -> None:
    run = a_power_run(tmp_path / "run", power=samples_of(a_load())[:samples])
    tags = Tags()
    tags.feed(write_report([run], tmp_path / "report.html").read_text(encoding="utf-8"))
    places = {given["id"] for _, given in tags.tags if "id" in given}
    led_to = {given["href"] for name, given in tags.tags if name == "a" and given.get("href")}
    assert ("#energy-tokens" in led_to) == (samples is None)
    assert {href for href in led_to if href and href[1:] not in places} == set()

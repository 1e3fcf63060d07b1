"""What a report and the command say about exchanges, and that they say nothing where there were none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from observatory.cli import main
from observatory.reports import write_report
from observatory.reports.figures.exchanges import layer_anatomy, rank_time, traffic_map, waiting_map
from observatory.reports.frames.collect import collect
from observatory.reports.frames.exchanges import collect_exchanges
from observatory.reports.frames.report import ReportFrames
from observatory.reports.outline import build_sections, questions
from observatory.reports.sections import exchange_sections
from observatory.reports.theme import css_colour, heat_level
from observatory.run import RunWriter, open_run
from observatory.run.manifest import Manifest, ModelSpec, Topology
from observatory.run.tables import EXCHANGE_SCHEMA, SPAN_SCHEMA
from tests.analysis.exchange.tables import collective, spans
from tests.reports.sample_runs import stated

SEND = [[10, 20], [30, 40]]
HOSTILE = "</script><script>hit()</script><img src=x onerror=hit()>%{x}"


def write(
    path: Path,
    exchanges: pd.DataFrame,
    timed: pd.DataFrame | None = None,
    *,
    name: str = "m",
    ranks: int = 2,
) -> Path:
    """A run of so many ranks with these rows."""
    manifest = Manifest(
        run_id="x", created_unix_s=1.0, model=ModelSpec(name=name), topology=Topology(ranks=ranks)
    )
    writers = [RunWriter.create(path, manifest), *(RunWriter.join(path, rank=r) for r in range(1, ranks))]
    for writer in writers:
        for table, frame, schema in (("exchange", exchanges, EXCHANGE_SCHEMA), ("spans", timed, SPAN_SCHEMA)):
            if frame is not None and len(frame):
                own = frame[frame["source_rank"] == writer.rank]
                known = pa.schema([field for field in schema if field.name in own.columns])
                writer.append(table, pa.Table.from_pandas(own, schema=known, preserve_index=False))
    for writer in reversed(writers):
        writer.close()
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Rank 1 is 60 us late at the combine of layer 0, because of its experts."""
    rows = pd.concat(
        [
            collective([0, 0], [40, 40], SEND),
            collective([100, 160], [200, 200], SEND, role="combine", sequence=1),
        ]
    )
    timed = spans(
        [
            (0, "dispatch", 0, 40), (1, "dispatch", 0, 40), (0, "experts", 40, 100), (1, "experts", 40, 160),
            (0, "combine", 100, 200), (1, "combine", 160, 200),
        ]
    )  # fmt: skip
    return write(tmp_path / "run", rows, timed)


def frames_of(*paths: Path) -> ReportFrames:
    return collect([open_run(path) for path in paths], ep_degrees=(2,), gpus_per_node=4)


def test_the_report_shows_anatomy_traffic_and_waiting_with_the_slowest_named(
    run: Path, tmp_path: Path
) -> None:
    anatomy, traffic, waiting = exchange_sections(frames_of(run))
    assert [section.id for section in (anatomy, traffic, waiting)] == ["anatomy", "traffic", "waiting"]
    figure = waiting.blocks[0]
    note = figure.variants[0].note  # type: ignore[union-attr]
    assert "Slowest is rank 1: 100 % of all waiting was for it (60.0 µs; it computed longer)." in note
    assert "Waiting is 27 % of the time in exchanges" in note  # 60 of 40 + 40 + 100 + 40
    layers = waiting.blocks[1].variants[0]  # type: ignore[union-attr]
    rows = [[cell.text for cell in row] for row in layers.numbers.rows]
    assert rows[1] == ["0", "combine", "1", "100", "40", "42.9 %", "1", "100 %", "compute load"]
    assert layers.note == "m, prefill. Most waiting: combine of layer 0, 43 %, mostly for rank 1."
    page = write_report([run], tmp_path / "report.html", ep_degrees=(2,)).read_text(encoding="utf-8")
    assert '<section id="waiting"' in page
    assert '<section id="anatomy"' in page


def test_a_report_of_runs_without_exchanges_says_nothing_about_them(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    frames = frames_of(make_run())
    assert frames.exchanges is None
    assert exchange_sections(frames) == []
    page = write_report([make_run("two")], tmp_path / "report.html", ep_degrees=(2,)).read_text(
        encoding="utf-8"
    )
    body = page[page.index("<body>") :]
    for word in ("anatomy", "traffic-map", "rank-waiting", "Who waits", "--replay", "network model"):
        assert word not in body


def test_one_run_with_exchanges_next_to_one_without_is_shown_alone(
    run: Path, make_run: Callable[..., Path]
) -> None:
    sections = exchange_sections(frames_of(make_run("other"), run))
    assert [len(section.blocks[0].variants) for section in sections[:1]] == [1]  # type: ignore[union-attr]
    assert "m" in sections[0].blocks[0].variants[0].label  # type: ignore[union-attr]


def test_bars_stack_what_the_phases_took_and_marks_show_it_without_waiting(run: Path) -> None:
    found = collect_exchanges([open_run(run)])
    assert found is not None
    figure = layer_anatomy(found.phases)
    heights = {trace.name: list(trace.y) for trace in figure.data}
    assert heights["dispatch"] == pytest.approx([0.040])
    assert heights["experts"] == pytest.approx([0.090])
    assert heights["combine"] == pytest.approx([0.070])
    assert heights["mean without waiting"] == pytest.approx([0.040 + 0.090 + 0.040])
    assert heights["slowest ranks without waiting"] == pytest.approx([0.040 + 0.120 + 0.040])


def test_the_traffic_map_has_senders_as_rows_and_leaves_unknown_pairs_open() -> None:
    traffic = pd.DataFrame(
        {"source_rank": [0, 1, 1], "peer_rank": [1, 0, 1], "bytes": [2_000_000, 0, 9_000_000]}
    )
    travels, kept = traffic_map(traffic, ranks=2).data
    assert np.array_equal(travels.z, [[np.nan, 2.0], [0.0, np.nan]], equal_nan=True)
    assert (travels.zmin, travels.zmax) == (0, 2.0), "what a rank keeps does not darken the links"
    assert np.array_equal(kept.z, [[np.nan, np.nan], [np.nan, 9.0]], equal_nan=True)


def test_the_waiting_map_has_exchanges_as_rows_and_leaves_what_is_not_known_open() -> None:
    layers = pd.DataFrame(
        {
            "layer": pd.array([0, 0, 1], "Int64"), "role": ["dispatch", "combine", "dispatch"],
            "wait_share": [0.25, np.nan, 0.5], "longest_p50_s": 0.002, "transfer_longest_p50_s": 0.001,
            "slowest_rank": pd.array([3, None, 1], "Int64"), "slowest_cause": ["clock", None, None],
        }
    )  # fmt: skip
    (heat,) = waiting_map(layers).data
    assert np.array_equal(heat.z, [[25.0, 50.0], [np.nan, np.nan]], equal_nan=True)
    assert list(heat.y) == ["dispatch", "combine"]
    assert heat.customdata[0][0] == (
        "longest rank 2.000 ms, of it transfer 1.000 ms<br>slowest: rank 3 (clock)"
    )


def test_every_rank_has_a_bar_of_its_shares_and_the_slowest_is_named() -> None:
    ranks = pd.DataFrame(
        {
            "source_rank": [0, 1], "transfer_s": [0.001, 0.002], "wait_s": [0.003, 0.0], "held_s": [0.0, 0.0],
            "idle_s": [0.0, 0.0], "unknown_s": [0.0, 0.004], "caused_wait_s": [0.0, 0.003],
            "cause": [None, "clock"],
        }
    )  # fmt: skip
    bars = {trace.name: trace for trace in rank_time(ranks).data}
    assert list(bars["transfer"].x) == pytest.approx([1, 2])
    assert list(bars["waiting for those it exchanges with"].x) == pytest.approx([3, 0])
    assert list(bars["not known"].x) == pytest.approx([0, 4])
    assert "kept by the backend for others" not in bars
    assert [("slowest" in label) for label in bars["transfer"].y] == [False, True]


def test_every_colour_has_a_dark_partner(run: Path) -> None:
    found = collect_exchanges([open_run(run)])
    assert found is not None
    figures = (
        layer_anatomy(found.phases),
        rank_time(found.ranks),
        traffic_map(found.traffic, ranks=2),
        waiting_map(found.layers),
    )

    def colours(value: object, key: str = "") -> set[str]:
        if isinstance(value, dict):
            return set().union(*(colours(item, name) for name, item in value.items()))
        if isinstance(value, list | tuple) and key == "colorscale":
            return {colour for _, colour in value}
        return {value} if "color" in key and isinstance(value, str) else set()

    used = set()
    for figure in figures:
        parts = figure.to_dict()
        used |= set().union(*(colours(part) for part in (parts["layout"], *parts["data"])))
    unknown = {colour for colour in used if css_colour(colour) == "none" and heat_level(colour) is None}
    assert unknown <= {"rgba(0,0,0,0)"}


def test_names_from_a_run_stay_text(tmp_path: Path) -> None:
    rows = collective([0, 9], [40, 40], SEND, role=HOSTILE, group=HOSTILE, algorithm=HOSTILE, backend=HOSTILE)
    hostile = write(tmp_path / "run", rows, spans([(0, HOSTILE, 0, 40), (1, "route", 0, 40)]), name=HOSTILE)
    page = write_report([hostile], tmp_path / "report.html", ep_degrees=(2,)).read_text(encoding="utf-8")
    assert "<script>hit()" not in page
    assert "<img" not in page


def test_splits_that_are_not_known_are_shown_as_such_with_the_reason(tmp_path: Path) -> None:
    rows = collective([0, 9], [40, 40], SEND).drop(index=1)
    (_, waiting) = exchange_sections(frames_of(write(tmp_path / "run", rows)))
    assert waiting.id == "waiting"
    note = waiting.blocks[0].variants[0].note  # type: ignore[union-attr]
    assert "How long ranks waited is not known." in note
    assert "Not split: rank 1, on which it depends, left no row (1 rows)." in note


def test_a_late_rank_is_named_where_no_time_could_be_split_in_full(tmp_path: Path) -> None:
    # 0 and 1 exchange, and gloo also keeps them for rank 2, whose row is missing.
    apart = [[0, 20, 0], [30, 0, 0], [0, 0, 5]]
    rows = collective([0, 60, 0], [100, 100, 100], apart, backend="gloo").drop(index=2)
    (_, waiting) = exchange_sections(frames_of(write(tmp_path / "run", rows, ranks=3)))
    note = waiting.blocks[0].variants[0].note  # type: ignore[union-attr]
    assert "No rank's time could be split in full. Slowest is rank 1: 100 % of all waiting" in note


def test_the_command_prints_one_document(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["exchanges", str(run), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    dispatch, combine = document["layers"]
    assert (dispatch["role"], combine["role"]) == ("dispatch", "combine")
    assert combine["wait_s"] == pytest.approx(60e-6)
    assert combine["transfer_s"] == pytest.approx(80e-6)
    assert (combine["slowest_rank"], combine["slowest_cause"]) == (1, "compute load")
    assert [rank["caused_wait_s"] for rank in document["ranks"]] == pytest.approx([0, 60e-6])
    assert [phase["name"] for phase in document["phases"]] == ["dispatch", "experts", "combine"]
    assert document["unknown"] == []


def test_the_command_prints_tables(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["exchanges", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "compute load" in shown
    combine = next(line for line in shown.splitlines() if "combine" in line)
    assert combine.split()[5] == "42.9"  # % waiting


def test_a_run_without_exchanges_is_told_how_to_get_some(
    make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["exchanges", str(make_run())]) == 1
    assert "holds no exchanges; profile with several ranks" in capsys.readouterr().err


def test_a_report_without_benchmark_files_says_once_how_to_get_them(run: Path) -> None:
    sections = exchange_sections(frames_of(run))
    assert [section.id for section in sections] == ["anatomy", "traffic", "waiting"]
    ((what, why),) = [part for section in sections for part in section.absent]
    assert what == "Mock traffic and predicted times"
    assert "--replay" in why


def test_sections_stand_in_the_order_of_the_questions(run: Path, make_run: Callable[..., Path]) -> None:
    sections = build_sections(frames_of(run, make_run("other")), gpus_per_node=4)
    shown = [section for section in sections if section.blocks]
    asked = questions(shown)
    assert [question.id for question in asked] == ["time", "who-waits", "which-experts", "what-if"]
    assert [section.id for question in asked for section in question.sections] == [s.id for s in shown]


def test_the_findings_say_where_the_time_goes_and_who_is_waited_for(run: Path) -> None:
    # dispatch 40, experts 90, combine 70 us as means over ranks, of them 30 waiting
    assert stated(frames_of(run)) == [
        "In prefill, m spends 55 % of its MoE layers' time in exchanges, 15 % waiting "
        "for each other. They wait longest for rank 1: 100 % of all waiting (it computed longer)."
    ]

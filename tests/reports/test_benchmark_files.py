"""Which benchmark files a report refuses, which numbers it leaves out, and how it states that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from observatory.cli import main
from observatory.errors import BenchmarkError
from observatory.reports import write_report
from observatory.reports.frames.benchmark_files import read_benchmark_files
from observatory.reports.frames.report import ReportFrames
from observatory.reports.page import FigureBlock, Table
from observatory.reports.sections import exchange_sections, file_records, problems
from observatory.run.documents.bench import BenchResult
from tests.reports.sample_benchmarks import (
    BACKEND,
    a_bench,
    a_model,
    a_replay,
    a_run,
    frames_of,
    hostile_files,
    saved,
    sections_of,
    table,
)
from tests.reports.test_report import Tags


def gaps(frames: ReportFrames) -> dict[str, list[str]]:
    return dict(problems(frames))


def test_a_replay_of_another_run_is_stated_and_not_mixed_in(tmp_path: Path, model_file: Path) -> None:
    replay = saved(tmp_path / "replay.json", a_replay(run_id="another"))
    nameless = saved(tmp_path / "nameless.json", a_replay(run_id=None))
    frames = frames_of(a_run(tmp_path / "run"), replays=(replay, nameless), networks=(model_file,))
    assert "realism" not in sections_of(frames)
    assert frames.benchmarks is not None
    assert set(frames.benchmarks.checked["pattern"]) == {"own"}
    assert gaps(frames)["replay.json"] == [
        "the replay is of run another, which is none of the runs in this report: left out"
    ]
    assert "does not say of which run it is" in gaps(frames)["nameless.json"][0]


def test_a_model_of_another_backend_is_stated_and_predicts_nothing(tmp_path: Path) -> None:
    other = saved(tmp_path / "nccl.json", a_model().model_copy(update={"backend": "nccl"}))
    replay = saved(tmp_path / "replay.json", a_replay())
    bench = saved(tmp_path / "bench.json", a_bench())
    frames = frames_of(a_run(tmp_path / "run"), bench=(bench,), replays=(replay,), networks=(other,))
    assert frames.benchmarks is not None
    assert frames.benchmarks.checked.empty
    assert frames.benchmarks.curves.empty
    for name in ("replay.json", "bench.json"):
        assert gaps(frames)[name] == [
            f"measured over {BACKEND}, the network models given are of nccl: nothing is predicted for it"
        ]
    assert "only its coefficients are shown" in gaps(frames)["nccl.json"][0]
    (left_out,) = sections_of(frames)["prediction"].blocks
    assert isinstance(left_out, Table)
    assert [cell.text for cell in left_out.rows[0]][2:] == [f"exchanged over {BACKEND}, not nccl", "3"]
    assert "realism" in sections_of(frames), "the replay itself is good"


def test_times_of_exchanges_that_went_wrong_are_not_shown(tmp_path: Path, model_file: Path) -> None:
    replay = saved(tmp_path / "replay.json", a_replay(correct=False))
    bench = saved(tmp_path / "bench.json", a_bench(correct=False))
    frames = frames_of(a_run(tmp_path / "run"), bench=(bench,), replays=(replay,), networks=(model_file,))
    assert frames.benchmarks is not None
    assert frames.benchmarks.points.empty
    assert frames.benchmarks.realism.empty
    for name in ("replay.json", "bench.json"):
        assert "delivered wrong bytes, so its times mean nothing" in gaps(frames)[name][0]


def test_an_algorithm_that_the_model_does_not_know_is_counted(tmp_path: Path, model_file: Path) -> None:
    replay = saved(tmp_path / "replay.json", a_replay(algorithms=("flat", "gather")))
    frames = frames_of(a_run(tmp_path / "run"), replays=(replay,), networks=(model_file,))
    section = sections_of(frames)["prediction"]
    assert {row[0].detail for row in table(section, 1).rows} == {"m, flat"}
    ((_, _, reason, exchanges),) = table(section, 4).rows
    assert "is of flat, not of 'gather'" in reason.text
    assert exchanges.text == "16", "captured and uniform, counted once"


@pytest.mark.parametrize(
    ("option", "made", "said"),
    [
        ("--bench", a_replay, "is a replay, where a benchmark was expected; give it with --replay"),
        ("--replay", a_bench, "is a benchmark, where a replay was expected; give it with --bench"),
        ("--network", a_bench, "is not valid"),
        ("--bench", a_model, "is not valid (kind: Field required)"),
    ],
)
def test_a_file_of_the_other_kind_is_one_clear_line(
    option: str, made: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = a_run(tmp_path / "run"), tmp_path / "report.html"
    file = saved(tmp_path / "file.json", made())
    assert main(["report", str(run), "--out", str(out), option, str(file)]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
    assert not out.exists()


def test_a_missing_or_damaged_file_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = a_run(tmp_path / "run"), tmp_path / "report.html"
    (tmp_path / "half.json").write_text(a_replay().model_dump_json()[:2000])
    for name, said in (("nowhere.json", "cannot be read"), ("half.json", "is not valid")):
        assert main(["report", str(run), "--out", str(out), "--replay", str(tmp_path / name)]) == 1
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert name in line
        assert said in line


def test_a_replay_that_lost_its_uniform_half_is_said_to_be_incomplete(tmp_path: Path) -> None:
    whole = a_replay()
    half = whole.model_copy(
        update={"cases": tuple(case for case in whole.cases if case.pattern == "captured")}
    )
    frames = frames_of(a_run(tmp_path / "run"), replays=(saved(tmp_path / "replay.json", half),))
    assert "realism" not in sections_of(frames)
    assert "do not pair up" in gaps(frames)["replay.json"][0]


def test_files_of_equal_names_are_distinguished_and_one_given_twice_counts_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, two = saved(tmp_path / "a" / "r.json", a_replay()), saved(tmp_path / "b" / "r.json", a_replay())
    files = read_benchmark_files(replays=(one, two, one))
    assert [given.name for given in files.replays] == [str(one), str(two)]
    assert files.options() == ["--replay", str(one), "--replay", str(two)]


def test_free_text_of_benchmark_files_stays_text(tmp_path: Path) -> None:
    run, files = hostile_files(tmp_path)
    page = write_report([run], tmp_path / "report.html", ep_degrees=(2,), **files).read_text(encoding="utf-8")
    parsed = Tags()
    parsed.feed(page)
    scripts = [attributes for tag, attributes in parsed.tags if tag == "script"]
    assert [each for each in scripts if "type" not in each] == [{}, {}]
    assert not [tag for tag, _ in parsed.tags if tag in ("img", "iframe", "object", "link")]
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    for section in ("realism", "prediction", "bandwidth"):
        assert f'<section id="{section}"' in page
    frames = frames_of(run, **files)
    for section in exchange_sections(frames):
        for block in section.blocks:
            for variant in block.variants if isinstance(block, FigureBlock) else ():
                drawn = variant.figure.to_json()
                assert "\\u003cscript" not in drawn
                assert "<script" not in drawn
                assert "<a href" not in drawn


def test_the_records_say_how_each_file_was_made_and_the_page_how_to_make_it_again(
    tmp_path: Path, model_file: Path
) -> None:
    replay = saved(tmp_path / "replay.json", a_replay())
    run, out = a_run(tmp_path / "run"), tmp_path / "report.html"
    frames = frames_of(run, replays=(replay,), networks=(model_file,))
    first, second = file_records(frames)
    assert (first.title, first.command) == ("replay.json: replay", "observatory replay")
    pairs = dict(first.pairs)
    assert pairs["of run"] == "run-1"
    assert pairs["warm-up rounds, repeats"] == "1, 3"
    assert pairs["host 1"] == "node-a"
    assert dict(second.pairs)["fitted to"] == "bench.json"
    argv = ["report", str(run), "--out", str(out), "--replay", str(replay), "--network", str(model_file)]
    assert main(argv) == 0
    page = out.read_text(encoding="utf-8")
    assert f"--replay {replay} --network {model_file}" in page
    assert "Full records of 2 files" in page


def test_a_replay_with_an_impossible_time_is_refused(tmp_path: Path) -> None:
    document = json.loads(a_replay().model_dump_json())
    document["cases"][0]["rank_us_RP"][0][0] = -5.0
    (tmp_path / "r.json").write_text(json.dumps(document))
    with pytest.raises(BenchmarkError, match="not valid"):
        read_benchmark_files(replays=(tmp_path / "r.json",))
    assert BenchResult.model_validate(document | {"cases": document["cases"][1:]}).ranks == 4

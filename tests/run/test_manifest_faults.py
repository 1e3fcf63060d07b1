"""Everything that can be wrong with run.json ends in one clear sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from observatory.errors import RunError, RunFormatError
from observatory.run import open_run
from observatory.run.manifest import SCHEMA_VERSION
from tests.run.conftest import WriteRun


def edited(path: Path, **changes: object) -> Path:
    document = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({**document, **changes}))
    return path


def test_a_missing_and_a_foreign_directory_are_distinguished(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="does not exist; expected a run directory"):
        open_run(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="is not a directory"):
        open_run(tmp_path / "file")
    with pytest.raises(RunError, match=r"is no run directory: it has no run\.json"):
        open_run(tmp_path)


def test_a_newer_major_schema_is_refused_with_both_versions(write_run: WriteRun) -> None:
    path = edited(write_run(), schema_version="2.3", model=7)
    with pytest.raises(
        RunFormatError, match=f"has schema 2.3 but this program reads up to {SCHEMA_VERSION}; install"
    ):
        open_run(path)


@pytest.mark.parametrize(
    "version", [None, 1, "1", "one.two", "1.0.0", "-1.0", "1.0\n", "9" * 5000, "\u0661.0", ["1.0"]]
)
def test_a_schema_version_that_is_none_is_refused(write_run: WriteRun, version: object) -> None:
    with pytest.raises(
        RunFormatError, match=f"schema_version is .*; expected like {SCHEMA_VERSION}"
    ) as caught:
        open_run(edited(write_run(), schema_version=version))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "text", ["", "{", '{"schema_version": "1.0", "run', "[" * 100_000, "[]", "7", "\x00\xff", "NaN"]
)
def test_a_corrupt_manifest_is_refused_in_one_line(write_run: WriteRun, text: str) -> None:
    path = write_run()
    (path / "run.json").write_text(text, encoding="latin-1")
    with pytest.raises(
        RunFormatError, match=r"run\.json of .* (is not whole JSON|holds no JSON object)"
    ) as caught:
        open_run(path)
    assert "\n" not in str(caught.value)


def test_deep_values_and_wrong_types_are_refused(write_run: WriteRun) -> None:
    path = write_run()
    whole = (path / "run.json").read_text()
    deep = whole.replace('"config":{}', '"config": {"a": ' + "[" * 900 + "]" * 900 + "}")
    (path / "run.json").write_text(
        deep.replace('"config": {}', '"config": {"a": ' + "[" * 900 + "]" * 900 + "}")
    )
    assert "[" * 900 in (path / "run.json").read_text()
    with pytest.raises(RunFormatError, match=r"not a valid manifest|not whole JSON"):
        open_run(path)
    (path / "run.json").write_text(whole)
    with pytest.raises(
        RunFormatError, match=r"not a valid manifest: topology\.ranks: .*greater than or equal to 1"
    ):
        open_run(edited(path, topology={"ranks": 0}))
    with pytest.raises(RunFormatError, match=r"is not whole JSON .NaN is not a JSON number"):
        open_run(edited(path, created_unix_s=float("nan")))


def test_a_gigantic_manifest_is_not_loaded(write_run: WriteRun) -> None:
    path = write_run()
    with (path / "run.json").open("r+b") as file:
        file.truncate(1 << 30)  # sparse: takes no space
    with pytest.raises(RunFormatError, match="larger than 16 MiB"):
        open_run(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        '{"rank": 1, "state": "complete"}',
        '{"rank": 0, "state": "asleep"}',
        "[[[",
        '{"rank": 0, "state": "complete", "clock": {"method": "ping-pong", "offset_ns": 1%s}}' % ("0" * 30),
        '{"rank": 0, "state": "complete", "clock": {"method": "ping-pong", "drift_ppm": 1e300}}',
    ],
)
def test_a_rank_status_that_cannot_be_used_is_a_stated_problem(write_run: WriteRun, text: str) -> None:
    path = write_run()
    (path / "ranks/rank-00000.json").write_text(text)
    run = open_run(path)
    (problem,) = run.problems
    assert problem.startswith("ranks/rank-00000.json ")
    assert run.manifest.ranks[0].state == "complete"  # as rank 0 wrote into run.json
    assert next(run.iter_loads()).step_S.size == 6


def test_the_manifest_of_a_failed_run_gives_its_reason(write_run: WriteRun) -> None:
    path = write_run()
    status = {"rank": 0, "state": "failed", "error": "out of memory", "steps": 3}
    (path / "ranks/rank-00000.json").write_text(json.dumps(status))
    assert open_run(path).problems == ("rank 0 failed: out of memory",)
    assert open_run(path).manifest.ranks[0].steps == 3

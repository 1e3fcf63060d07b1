"""Damaged, foreign and half-written files: what is whole is read, what is missing is said."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from observatory.errors import RunError, RunFormatError
from observatory.run import RunWriter, open_run, routing_rows
from tests.run.conftest import WriteRun, manifest_of, one_step


def steps_of(path: Path, rank: int = 0) -> list[int]:
    """Steps of a rank that can be read, layer 0."""
    found: list[int] = []
    for block in open_run(path).iter_loads(layers=[0]):
        p = block.source_rank_P.tolist().index(rank)
        found += block.step_S[block.present_SP[:, p]].tolist()
    return found


def only_problem(path: Path) -> str:
    (problem,) = open_run(path).problems
    return problem


@pytest.mark.parametrize("keep", [0, 3, 4, 100, 0.5, 0.9, -1])
def test_a_truncated_part_is_left_out_and_named(write_run: WriteRun, keep: float) -> None:
    path = write_run(steps=6, steps_per_part=2)
    part = path / "routing/rank-00000/part-000001.parquet"
    content = part.read_bytes()
    part.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    assert only_problem(path).startswith(
        "routing/rank-00000/part-000001.parquet is truncated or corrupt and was left out"
    )
    assert steps_of(path) == [0, 1, 4, 5]


@pytest.mark.usefixtures("part_per_flush")
def test_a_flipped_bit_in_the_data_is_noticed_while_reading(tmp_path: Path) -> None:
    with RunWriter.create(tmp_path / "run", manifest_of()) as writer:
        load = np.random.default_rng(0).integers(0, 1000, (500, 64))
        for first in (0, 500):
            steps = np.arange(first, first + 500)
            writer.append(
                "routing",
                routing_rows(
                    step_N=steps, phase_N="decode", layer_N=0, source_rank=0, tokens_N=1, load_NE=load
                ),
            )
            writer.flush()
    part = tmp_path / "run/routing/rank-00000/part-000000.parquet"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    run = open_run(tmp_path / "run")
    assert run.problems == ()
    assert [step for block in run.iter_loads() for step in block.step_S.tolist()] == [*range(500, 1000)]
    (problem,) = run.problems
    assert problem.startswith("routing/rank-00000/part-000000.parquet: row group 0 (500 rows) is corrupt")


def test_data_that_cannot_be_read_at_all_is_an_error(write_run: WriteRun) -> None:
    path = write_run(steps=3)
    part = path / "routing/rank-00000/part-000000.parquet"
    content = bytearray(part.read_bytes())
    footer = int.from_bytes(content[-8:-4], "little") + 8
    content[4:-footer] = bytes(len(content) - footer - 4)
    part.write_bytes(content)
    run = open_run(path)
    with pytest.raises(RunFormatError, match=r"no routing rows of run .* can be read: .* is corrupt"):
        list(run.iter_loads())


def test_random_damage_never_ends_in_a_foreign_exception(write_run: WriteRun) -> None:
    path = write_run(steps=4, steps_per_part=2)
    part = path / "routing/rank-00000/part-000000.parquet"
    whole = part.read_bytes()
    random = np.random.default_rng(5)
    noticed = 0
    for _ in range(150):
        content = bytearray(whole)
        for at in random.integers(0, len(content), 3):
            content[at] = random.integers(0, 256)
        part.write_bytes(content)
        try:
            run = open_run(path)
            list(run.iter_loads())
            noticed += bool(run.problems)
        except RunError:
            noticed += 1
    assert noticed > 75


def test_nothing_readable_at_all_is_an_error(write_run: WriteRun) -> None:
    path = write_run(steps=6)
    for part in (path / "routing/rank-00000").iterdir():
        part.write_bytes(part.read_bytes()[:50])
    with pytest.raises(
        RunFormatError, match=r"none of the 2 parts of run .* can be read \(.*\); capture it again"
    ):
        open_run(path)


def test_a_half_written_temporary_file_is_mentioned_and_not_read(write_run: WriteRun) -> None:
    path = write_run(steps=3)
    (path / "routing/rank-00000/.part-000001.parquet.4711.tmp").write_bytes(b"PAR1half")
    assert only_problem(path) == "routing/rank-00000/.part-000001.parquet.4711.tmp was never finished"
    assert steps_of(path) == [0, 1, 2]


def test_missing_parts_in_the_middle_are_said(write_run: WriteRun) -> None:
    path = write_run(steps=6, steps_per_part=2)
    (path / "routing/rank-00000/part-000001.parquet").unlink()
    assert only_problem(path) == "routing/rank-00000: part 1 is missing"
    assert steps_of(path) == [0, 1, 4, 5]


def test_a_missing_rank_folder_is_said_and_the_others_are_read(write_run: WriteRun) -> None:
    path = write_run(steps=3, ranks=3)
    shutil.rmtree(path / "routing/rank-00001")
    assert only_problem(path) == "rank 1 left no routing rows"
    assert [block.source_rank_P.tolist() for block in open_run(path).iter_loads(layers=[0])] == [[0, 2]]


def test_a_rank_that_never_joined_is_said(tmp_path: Path) -> None:
    first = RunWriter.create(tmp_path / "run", manifest_of(3))
    second = RunWriter.join(tmp_path / "run", rank=2)
    for writer in (second, first):
        writer.append("routing", one_step(0, writer.rank))
        writer.close()
    assert only_problem(tmp_path / "run") == "rank 1 of 3 left nothing: they never joined or are missing"


def test_an_absurd_number_of_ranks_is_counted_not_listed(write_run: WriteRun) -> None:
    path = write_run(steps=3)
    manifest = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({**manifest, "topology": {"ranks": 10**15}}))
    assert only_problem(path) == (
        "999999999999999 ranks (1, 2, 3, 4, 5, 6, 7, 8, ...) of 1000000000000000 left nothing: "
        "they never joined or are missing"
    )


def test_a_rank_that_never_closed_is_said(tmp_path: Path) -> None:
    first = RunWriter.create(tmp_path / "run", manifest_of(2))
    second = RunWriter.join(tmp_path / "run", rank=1)
    for writer in (first, second):
        writer.append("routing", one_step(0, writer.rank))
        writer.flush()
    first.close()
    assert only_problem(tmp_path / "run").startswith("rank 1 never closed: it still runs or was killed")
    assert steps_of(tmp_path / "run", rank=1) == [0]


def test_links_are_not_followed(write_run: WriteRun, tmp_path: Path) -> None:
    path = write_run(steps=3)
    other = write_run(steps=3, name="other")
    (path / "routing/rank-00000/part-000001.parquet").symlink_to(
        other / "routing/rank-00000/part-000000.parquet"
    )
    (path / "routing/rank-00001").symlink_to(other / "routing/rank-00000")
    (path / "power").symlink_to(tmp_path)
    assert set(open_run(path).problems) == {
        "routing/rank-00000/part-000001.parquet (a symbolic link, not followed) was passed over",
        "routing/rank-00001 (a symbolic link, not followed) was passed over",
        "power/ is a symbolic link, not followed",
    }
    (path / "run.json").unlink()
    (path / "run.json").symlink_to(other / "run.json")
    with pytest.raises(RunError, match=r"run\.json of .* cannot be read: Too many levels of symbolic links"):
        open_run(path)


def test_foreign_names_are_passed_over_by_name(write_run: WriteRun) -> None:
    path = write_run(steps=3)
    for name in ("rank-1", "rank-00000 ", "rank-99999999", "rank-\u0661\u0661\u0661\u0661\u0661", "..rank"):
        (path / "routing" / name).mkdir()
    (path / "routing/rank-00009").mkdir()
    shutil.copy(path / "routing/rank-00000/part-000000.parquet", path / "routing/rank-00009")
    (path / "routing/rank-00000/evil\n\x1b[31m.parquet").write_text("x")
    os.mkfifo(path / "routing/rank-00000/part-000001.parquet")
    problems = open_run(path).problems
    assert len(problems) == 8
    assert "routing: rank 9 is outside the run's 1 ranks and was passed over" in problems
    assert "routing/rank-00000/evil [31m.parquet is no part; passed over" in problems
    assert steps_of(path) == [0, 1, 2]


def test_a_part_with_an_oversized_row_group_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("observatory.run.parts.MAX_ROW_GROUP_BYTES", 4 << 20)
    RunWriter.create(tmp_path / "run", manifest_of()).close()
    folder = tmp_path / "run/routing/rank-00000"
    folder.mkdir(parents=True)
    rows = 20
    zeros = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(rows * 65536, np.int64)), 65536)
    columns = {
        "step": pa.array(np.arange(rows)),
        "window_steps": pa.array(np.ones(rows, np.int32)),
        "phase": pa.array(["decode"] * rows),
        "layer": pa.array(np.zeros(rows, np.int32)),
        "source_rank": pa.array(np.zeros(rows, np.int32)),
        "tokens": pa.array(np.zeros(rows, np.int64)),
        "assignments": pa.array(np.zeros(rows, np.int64)),
        "load": zeros,
    }
    pq.write_table(pa.table(columns), folder / "part-000000.parquet")
    assert (folder / "part-000000.parquet").stat().st_size < 1e6
    with pytest.raises(RunFormatError, match=r"row group 0 says 20 rows of .* bytes; expected at most 4 MiB"):
        open_run(tmp_path / "run")

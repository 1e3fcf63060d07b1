"""Making, joining, overwriting and closing runs."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import threading
from pathlib import Path

import pyarrow as pa
import pytest

from observatory.errors import RunError, RunFormatError
from observatory.run import RunWriter, open_run
from tests.run.conftest import WriteRun, expected_load, manifest_of, one_step


def test_an_existing_run_is_not_overwritten_unless_asked(write_run: WriteRun) -> None:
    path = write_run(steps=6)
    with pytest.raises(
        RunError, match="exists and is not empty; choose another place, or pass overwrite=True"
    ):
        RunWriter.create(path, manifest_of())
    assert open_run(path).row_count("routing") == 12
    RunWriter.create(path, manifest_of(), overwrite=True).close()
    assert open_run(path).row_count("routing") == 0


def test_overwriting_never_removes_what_is_no_run(write_run: WriteRun, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match=r"is not overwritten: it also holds thesis\.tex"):
        RunWriter.create(home, manifest_of(), overwrite=True)
    run = write_run()
    (run / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"it also holds notes\.txt"):
        RunWriter.create(run, manifest_of(), overwrite=True)
    assert (home / "thesis.tex").exists()
    assert open_run(run).row_count("routing") == 12
    (run / "notes.txt").unlink()
    (run / "power").symlink_to(home)
    RunWriter.create(run, manifest_of(), overwrite=True).close()
    assert (home / "thesis.tex").exists()


def test_a_file_in_the_way_and_an_unwritable_place_are_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="exists and is not a directory"):
        RunWriter.create(tmp_path / "file", manifest_of())
    with pytest.raises(RunError, match="cannot be made: Not a directory; choose a writable place"):
        RunWriter.create(tmp_path / "file" / "run", manifest_of())


def test_an_exception_closes_the_run_as_failed_with_its_reason(tmp_path: Path) -> None:
    def capture() -> None:
        with RunWriter.create(tmp_path / "run", manifest_of()) as writer:
            writer.append("routing", one_step(0))
            raise KeyError("first line\nsecond line")

    with pytest.raises(KeyError, match="first line"):
        capture()
    run = open_run(tmp_path / "run")
    assert run.manifest.state == "failed"
    assert run.problems[0] == "the run failed; it does not hold everything"
    assert run.problems[1].startswith("rank 0 failed: KeyError: 'first line")
    assert run.row_count("routing") == 2


def test_closing_states_steps_and_merges_the_ranks(write_run: WriteRun) -> None:
    path = write_run(steps=4, ranks=3)
    manifest = open_run(path).manifest
    assert manifest.state == "complete"
    assert manifest.ended_unix_s is not None
    assert [(status.rank, status.state, status.steps) for status in manifest.ranks] == [
        (0, "complete", 4),
        (1, "complete", 4),
        (2, "complete", 4),
    ]


def test_closing_twice_is_harmless_and_late_rows_are_refused(tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path / "run", manifest_of())
    writer.close(steps=1)
    writer.close(state="failed")
    assert open_run(tmp_path / "run").manifest.state == "complete"
    with pytest.raises(RunError, match="is closed; rows of routing came too late"):
        writer.append("routing", one_step(0))


def test_a_rank_waits_for_the_run_and_must_fit_it(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with pytest.raises(RunError, match=r"holds not a running run after 0\.1 s; rank 0 must create"):
        RunWriter.join(path, rank=1, timeout_s=0.1)
    joined: list[RunWriter] = []
    waiter = threading.Thread(target=lambda: joined.append(RunWriter.join(path, rank=1, run_id="new")))
    RunWriter.create(path, manifest_of(2, run_id="old"))
    waiter.start()
    RunWriter.create(path, manifest_of(2, run_id="new"), overwrite=True)
    waiter.join(timeout=30)
    assert joined[0].manifest.run_id == "new"
    with pytest.raises(RunError, match="rank 1 has already written"):
        RunWriter.join(path, rank=1)
    with pytest.raises(RunError, match=r"rank 2 does not fit run .* of 2 ranks"):
        RunWriter.join(path, rank=2)
    with pytest.raises(RunError, match="rank 1 cannot change the manifest"):
        joined[0].update_manifest(notes=("x",))


def test_ranks_that_wrote_on_storage_of_their_own_are_one_run_when_copied_together(tmp_path: Path) -> None:
    nodes = [tmp_path / f"node{rank}" / "run" for rank in range(2)]
    writers = [
        RunWriter.create(nodes[0], manifest_of(2, run_id="r")),
        RunWriter.join(nodes[1], rank=1, run_id="r", ranks=2),
    ]
    for rank, writer in enumerate(writers):
        writer.append("routing", one_step(0, rank=rank))
        writer.close(steps=1)
    assert not (nodes[1] / "run.json").exists()
    for node in nodes:
        shutil.copytree(node, tmp_path / "all", dirs_exist_ok=True)
    run = open_run(tmp_path / "all")
    assert (run.manifest.state, run.problems) == ("complete", ())
    assert [block.load_SPE.shape[1] for block in run.iter_loads()] == [2, 2]  # ranks, of two layers
    with pytest.raises(RunError, match="rank 1 has already written"):
        RunWriter.join(nodes[1], rank=1, run_id="r", ranks=2)


def test_the_manifest_can_be_changed_while_running(tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path / "run", manifest_of())
    writer.update_manifest(notes=("layer 3 was not understood",))
    assert open_run(tmp_path / "run").manifest.notes == ("layer 3 was not understood",)
    with pytest.raises(RunError, match="manifest change is not valid"):
        writer.update_manifest(window_steps=0)
    assert open_run(tmp_path / "run").manifest.window_steps == 1


def test_threads_may_append_and_flush_at_once(tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path / "run", manifest_of())

    def work(first: int) -> None:
        for step in range(first, 60, 3):
            writer.append("routing", one_step(step))
            if step % 10 == 0:
                writer.flush()

    threads = [threading.Thread(target=work, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    blocks = list(open_run(tmp_path / "run").iter_loads(layers=[1]))
    assert [step for block in blocks for step in block.step_S.tolist()] == list(range(60))
    assert sum(int(block.load_SPE.sum()) for block in blocks) == sum(
        int(expected_load(step, 0)[1].sum()) for step in range(60)
    )


def test_flushes_write_the_last_part_again_and_who_opened_it_before_reads_on(tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path / "run", manifest_of())
    opened = []
    for step in range(3):
        writer.append("routing", one_step(step))
        writer.flush()
        opened.append(open_run(tmp_path / "run"))
    parts = [path.name for path in (tmp_path / "run/routing/rank-00000").iterdir()]
    assert parts == ["part-000000.parquet"]
    for steps, run in enumerate(opened, start=1):
        (block,) = run.iter_loads(layers=[1])
        assert block.load_SPE[:, 0].tolist() == [expected_load(step, 0)[1].tolist() for step in range(steps)]


@pytest.mark.parametrize("limit", ["_GROWING_GROUPS", "_GROWING_BYTES"])
def test_a_part_that_has_grown_enough_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    most = {"_GROWING_GROUPS": 2, "_GROWING_BYTES": 2 * one_step(0).nbytes}
    monkeypatch.setattr(f"observatory.run.appender.{limit}", most[limit])
    writer = RunWriter.create(tmp_path / "run", manifest_of())
    folder = tmp_path / "run/routing/rank-00000"
    for step in range(5):
        writer.append("routing", one_step(step))
        writer.flush()
        if step == 1:
            first = (folder / "part-000000.parquet").stat()
    assert sorted(path.name for path in folder.iterdir()) == [
        f"part-00000{number}.parquet" for number in range(3)
    ]
    assert (folder / "part-000000.parquet").stat().st_mtime_ns == first.st_mtime_ns
    run = open_run(tmp_path / "run")
    steps = [step for block in run.iter_loads(layers=[1]) for step in block.step_S.tolist()]
    assert steps == [0, 1, 2, 3, 4]


def test_a_part_that_was_replaced_is_not_written_twice_where_its_folder_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = RunWriter.create(tmp_path / "run", manifest_of())
    writer.append("routing", one_step(0))
    writer.flush()
    sync = os.fsync

    def limited(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", limited)
    writer.append("routing", one_step(1))
    with pytest.raises(RunError, match="Input/output error; 2 rows are lost"):
        writer.flush()
    monkeypatch.undo()
    writer.append("routing", one_step(2))
    writer.close(steps=3)
    run = open_run(tmp_path / "run")
    steps = [step for block in run.iter_loads(layers=[1]) for step in block.step_S.tolist()]
    assert steps == [0, 2]


def test_where_no_part_can_be_written_again_new_rows_begin_another_and_a_quota_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = RunWriter.create(tmp_path / "run", manifest_of())
    writer.append("routing", one_step(0))
    writer.flush()
    size = (tmp_path / "run/routing/rank-00000/part-000000.parquet").stat().st_size
    most = [size + 64]
    sync = os.fsync

    def limited(descriptor: int) -> None:
        there = os.fstat(descriptor)
        if stat.S_ISREG(there.st_mode) and there.st_size > most[0]:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", limited)
    writer.append("routing", one_step(1))
    writer.flush()
    most[0] = 100
    writer.append("routing", one_step(2))
    with pytest.raises(RunError, match="Disk quota exceeded; 2 rows are lost, parts written before are int"):
        writer.flush()
    monkeypatch.undo()
    writer.append("routing", one_step(3))
    writer.close(steps=4)
    names = sorted(path.name for path in (tmp_path / "run/routing/rank-00000").iterdir())
    assert names == ["part-000000.parquet", "part-000001.parquet"]
    run = open_run(tmp_path / "run")
    assert run.problems == ("rank 0 could not write 2 rows",)
    steps = [step for block in run.iter_loads(layers=[1]) for step in block.step_S.tolist()]
    assert steps == [0, 1, 3]


@pytest.mark.usefixtures("part_per_flush")
def test_a_part_is_written_when_enough_has_gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("observatory.run.appender.PART_BYTES", 3 * one_step(0).nbytes)
    writer = RunWriter.create(tmp_path / "run", manifest_of())
    for step in range(7):
        writer.append("routing", one_step(step))
    parts = sorted(file.name for file in (tmp_path / "run/routing/rank-00000").iterdir())
    assert parts == ["part-000000.parquet", "part-000001.parquet"]
    assert open_run(tmp_path / "run").row_count("routing") == 12
    writer.close()
    assert open_run(tmp_path / "run").row_count("routing") == 14


@pytest.mark.parametrize(
    ("table", "rows", "message"),
    [
        ("rooting", {"step": [0]}, "table 'rooting' is unknown; expected one of routing, exchange"),
        ("routing", {"step": [0]}, r"no fixed-size list column load; build the rows with routing_rows\(\)"),
        ("spans", {"step": [0]}, "column phase is there 0 times; expected once"),
        ("power", {"time_ns": ["now"], "device_uuid": ["a"]}, "column time_ns is string; expected int64"),
        ("power", {"time_ns": pa.array([None], pa.int64()), "device_uuid": ["a"]}, "time_ns holds nulls"),
    ],
)
def test_rows_of_another_shape_are_refused(
    tmp_path: Path, table: str, rows: dict[str, object], message: str
) -> None:
    with (
        RunWriter.create(tmp_path / "run", manifest_of()) as writer,
        pytest.raises(RunFormatError, match=message),
    ):
        writer.append(table, pa.table(rows))

"""Ranks of a process group are given word of the run; they neither ask the file system meanwhile nor hang."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import HashStore, TCPStore

from observatory.errors import CaptureError, RunError
from observatory.host.ranks import RankOf
from observatory.probes import run_news
from observatory.probes.run_news import RunNews
from observatory.run import RunWriter, writer
from observatory.run.manifest import Manifest, ModelSpec, Topology


def manifest() -> Manifest:
    return Manifest(run_id="r", created_unix_s=1.0, model=ModelSpec(name="m"), topology=Topology(ranks=2))


@pytest.mark.parametrize("kind", ["hash", "tcp"])
def test_a_rank_looks_at_files_before_and_after_the_news_and_not_between(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_FIRST_PAUSE_S", 60.0)  # only the news can end it earlier
    looks: list[Path] = []
    read = writer.read_manifest
    monkeypatch.setattr(writer, "read_manifest", lambda path: (looks.append(path), read(path))[1])
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if kind == "tcp" else None
    store = HashStore() if server is None else server
    first, second = (RunNews(store, tmp_path / "run", tried=1) for _ in range(2))

    def make() -> None:
        while not looks:
            time.sleep(0.01)
        RunWriter.create(tmp_path / "run", manifest())
        first.announce(None)

    rank_0 = threading.Thread(target=make)
    rank_0.start()
    joined = RunWriter.join(tmp_path / "run", rank=1, wait=second.wait)
    rank_0.join()
    assert joined.manifest.run_id == "r"
    assert len(looks) == 2


def test_all_ranks_have_the_place_that_rank_0_chose_or_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = HashStore()
    monkeypatch.setattr(run_news, "default_store", lambda: store)
    # The ranks are calls of one process here, and each counts its own.
    numbers = {rank: Counter[str]() for rank in range(2)}

    def place_of(rank: int, choice: Callable[[], Path]) -> Path:
        monkeypatch.setattr(run_news, "_tries", numbers[rank])
        return run_news.agreed_by_ranks(RankOf(rank=rank, world=2), choice)

    def refuse() -> Path:
        raise RunError("the disk is full")

    assert place_of(0, lambda: tmp_path / "a") == tmp_path / "a"
    assert place_of(1, refuse) == tmp_path / "a"
    with pytest.raises(RunError, match="the disk is full"):
        place_of(0, refuse)
    with pytest.raises(CaptureError, match="rank 0 has no place for its run: the disk is full"):
        place_of(1, refuse)
    monkeypatch.setattr(run_news, "_PATIENCE", timedelta(milliseconds=10))
    with pytest.raises(CaptureError, match="rank 0 has not named a run directory"):
        place_of(1, refuse)


def test_what_keeps_rank_0_from_making_the_run_ends_the_others_at_once(tmp_path: Path) -> None:
    store = HashStore()
    RunNews(store, tmp_path, tried=1).announce("no space left")
    with pytest.raises(CaptureError, match="no space left"):
        RunNews(store, tmp_path, tried=1).wait(60.0)
    since = time.monotonic()
    RunNews(store, tmp_path, tried=2).wait(0.2)  # of which nothing was said
    assert time.monotonic() - since >= 0.2


def test_without_news_or_a_store_the_time_is_waited_and_no_longer(tmp_path: Path) -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=5))
    news = RunNews(client, tmp_path / "run", tried=1)
    news.wait(0.05)
    del server
    since = time.monotonic()
    news.wait(0.2)
    assert 0.2 <= time.monotonic() - since < 10.0

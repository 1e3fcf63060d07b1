"""That rank 0 has made the run, through the store that the ranks' process group met at.

Without it the other ranks of a program would all ask the file system for ``run.json``, again and again, for
as long as rank 0 needs to come there.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from observatory.errors import CaptureError, ObservatoryError
from observatory.host.ranks import RankOf
from observatory.probes.store_alignment import default_store
from observatory.run.files import one_line

_FIRST_S, _LONGEST_S = 0.02, 0.5
_PATIENCE = timedelta(minutes=1)
_tries: Counter[str] = Counter()


def news_of(path: Path) -> RunNews | None:
    """Of the run that is begun now; None where this process is in no process group."""
    store = default_store()
    if store is None:
        return None
    place = os.path.abspath(path)
    _tries[place] += 1
    return RunNews(store, path, tried=_tries[place])


def agreed_by_ranks(where: RankOf, choose: Callable[[], Path]) -> Path:
    """The place that rank 0 chooses; all ranks call it as often. Without a process group, each its own.

    Raises:
        CaptureError: rank 0 could not choose, or did not within a minute.
    """
    store = default_store() if where.world > 1 else None
    if store is None:
        return choose()
    _tries["place"] += 1
    key = f"observatory-place/{_tries['place']}"
    try:
        if where.rank == 0:
            return _announced(store, key, choose)
        store.wait([key], _PATIENCE)
        said = os.fsdecode(store.get(key))
    except RuntimeError as error:
        raise CaptureError(f"rank 0 has not named a run directory: {one_line(error, 160)}") from error
    if not os.path.isabs(said):
        raise CaptureError(said)
    return Path(said)


def _announced(store: Any, key: str, choose: Callable[[], Path]) -> Path:
    """The place, or why there is none, is made known to the other ranks."""
    try:
        place = choose().absolute()
    except ObservatoryError as error:
        store.set(key, f"rank 0 has no place for its run: {one_line(error, 1000)}")
        raise
    store.set(key, os.fspath(place))
    return place


class RunNews:
    """One key of a store, written by rank 0 when it has made a run or has failed to.

    Args:
        store: of ``torch.distributed``, which all ranks reach.
        path: of the run; ranks that name the same place otherwise have no news and look at the files.
        tried: how often this process has begun a run there: what was said of an earlier try is not news.
    """

    def __init__(self, store: Any, path: Path, *, tried: int) -> None:
        self._store: Any | None = None
        with contextlib.suppress(RuntimeError):
            # A connection of our own, where there are any: another thread may wait on that of the program.
            self._store = store.clone() if hasattr(store, "clone") else store
        self._key = f"observatory-run/{os.path.abspath(path)}/{tried}"

    def announce(self, problem: str | None) -> None:
        """As rank 0: the run is made, or why it is not. A store that is gone reaches no rank."""
        if self._store is not None:
            with contextlib.suppress(RuntimeError):
                self._store.set(self._key, one_line(problem or "", 1000))

    def wait(self, seconds: float) -> None:
        """Until there is news, and no longer than that; always as long once the news is known or lost.

        Raises:
            CaptureError: rank 0 could not make the run.
        """
        until = time.monotonic() + seconds
        pause_s = _FIRST_S
        while (left_s := until - time.monotonic()) > 0:
            if self._has_come():
                return
            time.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, _LONGEST_S)

    def _has_come(self) -> bool:
        store = self._store
        if store is None:
            return False
        try:
            if not store.check([self._key]):
                return False
            self._store = None
            problem = store.get(self._key).decode(errors="replace")
        except RuntimeError:
            self._store = None
            return False
        if problem:
            raise CaptureError(problem)
        return True

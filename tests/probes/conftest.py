"""Whoever watches a model leaves no thread and no environment change behind."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    threads, environment = set(threading.enumerate()), dict(os.environ)
    yield
    left = [t.name for t in set(threading.enumerate()) - threads if t.name.startswith("observatory")]
    assert left == []
    changed = {
        key for key in environment.keys() | os.environ.keys() if environment.get(key) != os.environ.get(key)
    }
    torch_sets_it_when_its_compiler_is_imported = "TORCHINDUCTOR_CACHE_DIR"
    changed.discard(torch_sets_it_when_its_compiler_is_imported)
    assert {key for key in changed if not key.startswith("PYTEST")} == set()

"""What all tests share."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from observatory.run import RunWriter, routing_rows
from observatory.run.manifest import DataSpec, Manifest, ModelSpec, MoeLayerSpec
from tests.processes import MARK, descendants, end_all

_SESSION = str(os.getpid())
_numbers = itertools.count()
#: Fixtures of the whole session that are expensive to make.
_SHARED = ("browser", "outcome", "frameworks")
_terminations: list[bool] = []

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Writes a small run: 4 experts, top-2; every step of layer 3 has loads 1, 1, 2, 4 (4 tokens)."""

    def make(
        name: str = "run", *, model: str = "hand-made", steps: int = 6, condition: str = "prose"
    ) -> Path:
        path = tmp_path / name
        manifest = Manifest(
            run_id=f"id-{name}",
            created_unix_s=1.0,
            model=ModelSpec(
                name=model, moe_layers=(MoeLayerSpec(layer=3, module="m.3", experts=4, top_k=2),)
            ),
            data=DataSpec(condition=condition, real=condition != "mock"),
        )
        with RunWriter.create(path, manifest) as writer:
            if steps:
                writer.append(
                    "routing",
                    routing_rows(
                        step_N=np.arange(steps),
                        phase_N="prefill",
                        layer_N=np.full(steps, 3),
                        source_rank=0,
                        tokens_N=np.full(steps, 4),
                        load_NE=np.tile(np.array([1, 1, 2, 4]), (steps, 1)),
                    ),
                )
        return path

    return make


@pytest.fixture
def part_per_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are not written again: each flush makes a new one."""
    monkeypatch.setattr("observatory.run.appender._GROWING_GROUPS", 1)


def pytest_configure() -> None:
    """End in order, fixtures included, when the time of a whole suite is up."""
    os.environ[MARK] = _SESSION  # of what fixtures of a wider scope start
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminated)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(number) is signal.SIG_IGN:
            # A script's background job or nohup: the suite itself stays deaf, what it starts is not.
            signal.signal(number, lambda *_: None)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist puts the groups into the names of the tests
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run side by side, those that share started ranks, a cluster or a browser share a worker."""
    for item in items:
        group = _group_of(item)
        item.add_marker(pytest.mark.xdist_group(group))
        if group in _SHARED:
            item.add_marker("slow")
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # the long ones start first


def _group_of(item: pytest.Item) -> str:
    shared = [name for name in _SHARED if name in getattr(item, "fixturenames", ())]
    return shared[0] if shared else item.nodeid.partition("::")[0]


def pytest_unconfigure() -> None:
    """End what fixtures of a wider scope have left."""
    end_all(_SESSION)


def _terminated(*_: object) -> None:
    _terminations.append(True)
    raise KeyboardInterrupt  # what is tested takes it as its own end; then the fixture ends the suite


@pytest.fixture(autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    """Ends what a test has started, however the test ends."""
    mark = f"{_SESSION}-{next(_numbers)}"
    before = descendants(os.getpid())  # of fixtures of a wider scope
    os.environ[MARK] = mark
    try:
        yield
    finally:
        os.environ[MARK] = _SESSION
        end_all(mark, but=before)
    if _terminations:
        pytest.exit("terminated", returncode=143)

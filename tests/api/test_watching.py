"""``observatory.watch`` without a directory, and what it shows while it runs."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import observatory
from observatory.api.watching import Watch
from observatory.errors import CaptureError, RunError
from tests.probes.tiny import HIDDEN, RoutedModel, routed_adapter


def watch(out: Path | None = None, **options: object) -> Watch:
    torch.manual_seed(0)
    return observatory.watch(RoutedModel(), out, adapters=[routed_adapter()], **options)


def run_steps(watching: Watch, steps: int) -> None:
    for _ in range(steps):
        watching._model(torch.randn(8, HIDDEN))
        watching.step()


@pytest.mark.parametrize(
    ("origin", "name"), [("/site/models/my-moe/", "my-moe"), ("org/model", "org/model"), ("", "RoutedModel")]
)
def test_the_model_of_a_run_is_named_after_what_it_was_loaded_from(
    origin: str, name: str, tmp_path: Path
) -> None:
    model = RoutedModel()
    model.config = SimpleNamespace(_name_or_path=origin)  # type: ignore[assignment]
    with observatory.watch(model, tmp_path / "run", adapters=[routed_adapter()]) as watching:
        run_steps(watching, 1)
    assert f": model {name}, data" in repr(observatory.open_run(tmp_path / "run"))


def test_without_a_directory_the_run_lives_as_long_as_the_watch() -> None:
    watching = watch()
    with watching:
        run_steps(watching, 3)
    place = watching.run_path
    frame = watching.summary()
    assert frame["layer"].tolist() == [0, 1]
    assert set(frame["assignments"]) == {3 * 8 * 2}  # steps x tokens x top-2
    assert place.is_dir()
    del watching
    gc.collect()
    assert not place.parent.exists()


def test_the_summary_is_there_inside_the_block_and_with_a_directory_too(tmp_path: Path) -> None:
    with watch(tmp_path / "run") as watching:
        run_steps(watching, 2)
        assert set(watching.summary()["assignments"]) == {2 * 8 * 2}
        run_steps(watching, 1)
    assert set(watching.summary()["assignments"]) == {3 * 8 * 2}
    assert watching.run().imbalance().equals(watching.summary())
    assert observatory.open_run(tmp_path / "run").manifest.state == "complete"


def test_a_fork_leaves_the_temporary_run_alone() -> None:
    watching = watch()
    with watching:
        run_steps(watching, 1)
    child = os.fork()
    if child == 0:
        del watching
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    assert len(watching.summary()) == 2


def test_a_summary_of_a_watch_that_was_never_entered_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError):
        watch(tmp_path / "run").summary()


def test_ranks_need_a_common_directory() -> None:
    with pytest.raises(CaptureError, match="give all ranks the same one"):
        watch(rank=0, world=2)

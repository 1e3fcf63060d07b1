"""The live view: once, on a terminal, of a run that grows, of a folder."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import observatory
from observatory.analysis.live import live_view
from observatory.cli import main
from observatory.run.manifest import Manifest, ModelSpec, MoeLayerSpec
from observatory.run.rows import routing_rows
from observatory.run.writer import RunWriter
from tests.paths import ROOT
from tests.probes.tiny import ScriptedModel, ids, scripted_adapter
from tests.processes import wait_until

_LIMIT_S = 400.0


def last_step(run: Path) -> int | None:
    return next((phase.last_step for phase in live_view(run, steps=1).phases), None)


def watching_share(run: Path) -> float | None:
    (rank,) = live_view(run, steps=1).ranks
    return rank.watching_share


def test_the_last_steps_of_a_run_that_is_written_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ScriptedModel()
    with observatory.watch(model, tmp_path / "run", adapters=[scripted_adapter(2)], flush_s=0.01) as watch:
        for step in range(20):
            model([ids([1 if step < 15 else 0] * 3)])
            watch.step()
        assert wait_until(lambda: last_step(tmp_path / "run") == 19, within_s=_LIMIT_S)
        view = live_view(tmp_path / "run", steps=2)
        assert view.state == "running"
        (phase,) = view.phases
        assert (phase.steps, phase.last_step) == (2, 19)
        assert phase.steps_per_s is not None
        assert phase.steps_per_s > 0
        assert {layer.busiest_expert for layer in view.layers} == {0}
        assert [layer.tokens for layer in view.layers] == [2] * len(view.layers)
        assert main(["top", str(tmp_path / "run"), "--steps", "2"]) == 0
        said = capsys.readouterr().out
        assert "running" in said
        assert "expert 0" in said
        assert main(["top", str(tmp_path), "--once"]) == 0
        assert "running" in capsys.readouterr().out
        assert "cost of watching" in said
        # Stated after the rows were flushed.
        assert wait_until(lambda: watching_share(tmp_path / "run") is not None, within_s=_LIMIT_S)
        assert 0 < (watching_share(tmp_path / "run") or 0) < 1
    assert live_view(tmp_path / "run", steps=2).state == "complete"


@pytest.mark.usefixtures("part_per_flush")
def test_only_the_newest_parts_are_opened(tmp_path: Path) -> None:
    """A damaged old part is none of its business; a run of many parts costs as much as a short one."""
    layer = MoeLayerSpec(layer=0, module="m", experts=2, top_k=1)
    manifest = Manifest(run_id="id", created_unix_s=1.0, model=ModelSpec(name="made", moe_layers=(layer,)))
    with RunWriter.create(tmp_path / "run", manifest) as writer:
        for step in range(6):
            row = routing_rows(
                step_N=np.array([step]), phase_N="decode", layer_N=np.array([0]), source_rank=0,
                tokens_N=np.array([4]), load_NE=np.array([[3, 1] if step > 3 else [1, 3]]),
            )  # fmt: skip
            writer.append("routing", row)
            writer.flush()
    (tmp_path / "run" / "routing" / "rank-00000" / "part-000000.parquet").write_bytes(b"damaged")
    (shown,) = live_view(tmp_path / "run", steps=100).layers
    assert (shown.tokens, shown.busiest_expert, shown.expert_max_over_mean) == (8, 0, 1.5)


def test_what_holds_no_run_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", str(tmp_path)]) == 1
    assert "is no run and holds none" in capsys.readouterr().err
    assert main(["top", str(tmp_path / "absent")]) == 1
    assert "cannot be read" in capsys.readouterr().err


def test_a_terminal_is_refreshed_until_it_is_interrupted(make_run: Callable[..., Path]) -> None:
    run = make_run(model="first\x1b[31mname")
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "observatory", "top", str(run), "--interval", "0.5"]
    environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": str(ROOT), "COLUMNS": "100", "LINES": "40"}
    process = subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment, close_fds=True
    )
    os.close(terminal)
    seen = b""
    deadline = time.monotonic() + _LIMIT_S
    while seen.count(b"last step") < 2:
        assert time.monotonic() < deadline, seen
        seen += os.read(controller, 65536)
    process.send_signal(signal.SIGINT)
    try:
        while True:
            seen += os.read(controller, 65536)
    except OSError:  # the terminal is closed
        pass
    assert process.wait(_LIMIT_S) == 0, seen
    assert b"\x1b[31mname" not in seen
    os.close(controller)

"""Captures of a running program are started, stopped and marked: by command, by HTTP, by signal."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from observatory.campaign.control_server import RunsControl, control_port
from observatory.cli import main
from observatory.errors import CaptureError
from observatory.run import RunWriter, open_run
from observatory.run.control import Answer, open_control, read_answer, write_answer
from observatory.run.manifest import Manifest, ModelSpec

PROGRAM = str(Path(__file__).with_name("program.py"))
OBSERVATORY = [sys.executable, "-m", "observatory"]
PATIENCE_S = 400.0


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "not within two minutes"
        time.sleep(0.02)


def word(run: Path, rank: int = 0) -> Any:
    return read_answer(run, rank)


def post(port: int, path: str, body: str = "", **headers: str) -> tuple[int, dict[str, Any]]:
    connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    connection.request("POST", path, body, {"Content-Length": str(len(body)), **headers})
    response = connection.getresponse()
    document: dict[str, Any] = json.loads(response.read())
    connection.close()
    return response.status, document


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


@pytest.mark.slow
def test_two_ranks_obey_commands_http_and_signals(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, port = tmp_path / "run", free_port()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--stopped", "--control-port", str(port), "--control-signal", "USR2"]
    program = subprocess.Popen(
        [*OBSERVATORY, "run", "--out", str(path), *options, "--", *launcher, PROGRAM, "serves"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until(lambda: word(path) is not None and word(path, 1) is not None and word(path).steps >= 0)
        assert main(["ctl", str(path), "start", "--wait", str(PATIENCE_S)]) == 0
        until(lambda: word(path).state == "capturing" and word(path, 1).state == "capturing")
        assert main(["ctl", str(path), "mark", "busy hour", "--wait", str(PATIENCE_S)]) == 0
        status, document = post(port, "/stop")
        assert (status, document["runs"][0]["ranks"][1]["rank"]) == (200, 1)
        until(lambda: word(path).state == "stopped" and word(path, 1).state == "stopped")
        capfd.readouterr()
        assert main(["ctl", str(path), "status", "--json", "--wait", str(PATIENCE_S)]) == 0
        shown = json.loads(capfd.readouterr().out)
        assert [rank["state"] for rank in shown["ranks"]] == ["stopped", "stopped"]
        assert shown["ranks"][0]["rows"] > 0
        program.send_signal(signal.SIGUSR2)
        until(lambda: word(path).state == "capturing" and word(path, 1).state == "capturing")
        program.send_signal(signal.SIGUSR2)
        until(lambda: word(path).state == "stopped" and word(path, 1).state == "stopped")
        out, err = program.communicate("end\n", timeout=PATIENCE_S)
    finally:
        program.kill()
    assert program.returncode == 0, err
    steps = json.loads(out)["steps"]
    assert "the capture starts with step" in err
    assert "the capture stops with step" in err
    run = open_run(path)
    assert run.problems == ()
    assert [mark.name for mark in run.manifest.ranks[0].marks] == ["busy hour"]
    tokens = run.routed_tokens()
    for rank in run.manifest.ranks:
        assert rank.captured is not None
        ends = [(item.first_step, item.end_step or steps + 1) for item in rank.captured]
        assert len(ends) == 2
        assert ends[1][1] <= steps
        wanted = {step for first, end in ends for step in range(first, end)}
        assert set(tokens[tokens.source_rank == rank.rank].step) == wanted
    assert main(["ctl", str(path), "stop"]) == 1
    assert "has ended and takes no commands" in capfd.readouterr().err


def answer(**changes: Any) -> Answer:
    values = {"rank": 0, "host": socket.gethostname(), "pid": os.getpid(), "state": "stopped", "steps": 3}
    return Answer.model_validate({**values, "unix_s": time.time() - 400, **changes})


def running(path: Path) -> Path:
    manifest = Manifest(run_id="r", created_unix_s=1.0, model=ModelSpec(name="m"))
    RunWriter.create(path, manifest)
    return path


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_run_that_cannot_answer_is_refused_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def refused(run: Path, *more: str) -> str:
        assert main(["ctl", str(run), "start", "--wait", "0.2", *more]) == 1
        error = capfd.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "does not exist" in refused(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "is no run directory" in refused(tmp_path / "empty")
    run = running(tmp_path / "run")
    assert "takes no commands: neither `observatory run`" in refused(run)
    open_control(run)
    write_answer(run, answer(state="ended"))
    assert "has ended" in refused(run)
    write_answer(run, answer(pid=dead_process()))
    assert "ended without closing it" in refused(run)
    write_answer(run, answer(host="another"))
    error = refused(run)
    assert "has not answered within 0.2 s: process" in error
    assert "on another" in error
    assert list((run / "control" / "requests").iterdir()) == []  # it takes no effect later
    (run / "control" / "rank-00000.json").write_text("{")
    assert "takes no commands" in refused(run)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("jump",), "ACTION is 'jump'; expected one of start, stop, mark, flush, status"),
        (("mark",), "mark is given no name"),
        (("stop", "now"), "stop is given a name"),
        (("mark", "a\nb"), "cannot be kept"),
        (("mark", "x" * 300), "cannot be kept"),
    ],
)
def test_commands_that_mean_nothing_ask_for_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], words: tuple[str, ...], expected: str
) -> None:
    run = running(tmp_path / "run")
    open_control(run)
    write_answer(run, answer())
    assert main(["ctl", str(run), *words]) == 1
    assert expected in capfd.readouterr().err
    assert list((run / "control" / "requests").iterdir()) == []


@pytest.fixture
def port() -> Iterator[int]:
    with control_port(0, RunsControl(lambda: ())) as chosen:
        yield chosen


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        ("/start", "", {"Host": "evil.example"}, 403),
        ("/start", "", {"Host": "evil.example:127.0.0.1"}, 403),
        ("/start", "", {"Origin": "http://127.0.0.1"}, 403),
        ("/start", "", {"Origin": "null"}, 403),
        ("/end", "", {}, 404),
        ("/../etc/passwd", "", {}, 404),
        ("/mark", "", {}, 400),
        ("/mark", "[" * 4000, {}, 400),
        ("/mark", '{"name": 1}', {}, 400),
        ("/mark", "x" * 5000, {}, 413),
        ("/start", "", {"Content-Length": "00000000000009999999"}, 413),
        ("/start", "", {"Transfer-Encoding": "chunked"}, 411),
        ("/start", "", {}, 409),
        ("/start", "", {"Host": "localhost:80"}, 409),
    ],
)
def test_the_port_refuses_what_is_no_command_of_this_machine(
    port: int, path: str, body: str, headers: dict[str, str], status: int
) -> None:
    assert post(port, path, body, **headers)[0] == status


def test_the_port_reads_nothing(port: int) -> None:
    connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    connection.request("GET", "/status")
    assert connection.getresponse().status == 501


def test_a_port_that_is_taken_is_named_and_the_command_runs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], port: int
) -> None:
    with pytest.raises(CaptureError, match=f"no commands are taken on port {port}"):
        control_port(port, RunsControl(lambda: ())).__enter__()
    options = ["--out", str(tmp_path / "run"), "--control-port", str(port)]
    assert main(["run", *options, "--", "sh", "-c", "exit 3"]) == 3
    error = capfd.readouterr().err
    assert f"no commands are taken on port {port} of 127.0.0.1: Address already in use" in error

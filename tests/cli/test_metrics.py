"""Metrics of a run for monitoring, read back by the readers of their formats."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from observatory.analysis.live import live_view
from observatory.cli import main
from observatory.interchange.exporters.live_metrics import HELP, line_protocol, live_samples
from observatory.run import RunWriter, open_run
from observatory.run.manifest import Manifest, ModelSpec
from tests.paths import ROOT
from tests.processes import wait_until
from tests.reports.sample_power import a_power_run

#: A line of ClusterCockpit's: metric names and tag values of these characters alone, one value, seconds.
LINE = re.compile(
    r"observatory_[a-z_]+,hostname=[\w.:/-]+,type=(node,type-id=0|accelerator,type-id=[\w.:/-]+)"
    r",stype=[\w-]+,stype-id=[\w.:/-]+ value=-?[\d.e+-]+ \d{10}",
    re.ASCII,
)
LIMIT_S = 400.0


def parsed(text: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    return {
        family.name.removeprefix("observatory_"): {
            tuple(sorted(sample.labels.items())): sample.value for sample in family.samples
        }
        for family in text_string_to_metric_families(text)
    }


def test_a_textfile_holds_what_the_live_view_shows(tmp_path: Path) -> None:
    run = a_power_run(tmp_path / 'hostile "name"\\ {x="1"}')
    assert main(["metrics", str(run), "--textfile", str(tmp_path / "o.prom"), "--once"]) == 0
    found = parsed((tmp_path / "o.prom").read_text())
    view = live_view(run, steps=50)
    label = ("run", run.name)
    assert found["up"] == {(label,): 1.0}
    for layer in view.layers:
        key = (("layer", str(layer.layer)), ("phase", layer.phase), label)
        assert found["expert_max_over_mean"][key] == layer.expert_max_over_mean
    devices = [device for rank in view.ranks for device in rank.devices]
    assert devices
    for device in devices:
        key = (("device", device.uuid), ("rank", str(device.rank)), label)
        assert found["power_watts"][key] == device.power_w
    assert set(found) <= set(HELP)


def test_lines_are_those_that_clustercockpit_takes(tmp_path: Path) -> None:
    run = a_power_run(tmp_path / "run of, someone=else")
    samples = list(live_samples(live_view(run, steps=50)))
    lines = line_protocol(samples, run=run.name, unix_s=1_796_000_000).splitlines()
    assert len(lines) == len(samples)
    assert [line for line in lines if LINE.fullmatch(line) is None] == []
    assert any("type=accelerator" in line for line in lines)
    for _ in range(2):
        assert main(["metrics", str(run), "--line-protocol", str(tmp_path / "lines"), "--once"]) == 0
    written = (tmp_path / "lines").read_text().splitlines()
    assert len(written) == 2 * len(lines)
    ended_s = open_run(run).manifest.ended_unix_s
    assert ended_s is not None
    assert {line.rsplit(" ", 1)[1] for line in written} == {str(int(ended_s))}, "the run is over"


def test_a_socket_is_sent_the_lines(make_run: Callable[..., Path], tmp_path: Path) -> None:
    got: list[bytes] = []
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen(1)

        def take() -> None:
            stream, _ = listening.accept()
            with stream:
                while part := stream.recv(65536):
                    got.append(part)

        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        run = str(make_run())
        assert main(["metrics", run, "--line-protocol", f"unix:{tmp_path / 's'}", "--once"]) == 0
        thread.join(LIMIT_S)
    assert b"observatory_last_step," in b"".join(got)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_a_port_serves_a_run_until_it_ends(tmp_path: Path) -> None:
    manifest = Manifest(run_id="id", created_unix_s=1.0, model=ModelSpec(name="made"))
    port = free_port()
    options = ["--port", str(port), "--interval", "1"]
    with RunWriter.create(tmp_path / "run", manifest):
        command = [sys.executable, "-m", "observatory", "metrics", str(tmp_path / "run"), *options]
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        try:
            assert f"http://127.0.0.1:{port}/metrics" in process.stderr.readline()
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
                found = parsed(answer.read().decode())
            assert list(found["run_is_running"].values()) == [1.0]
        except BaseException:
            process.kill()
            raise
    assert wait_until(lambda: process.poll() is not None, within_s=LIMIT_S)
    assert process.returncode == 0
    process.stderr.close()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "no place to publish to"),
        (["--textfile", "/proc/no/such/file"], "/proc/no/such/file cannot be written"),
        (["--line-protocol", "/proc/no/such/file"], "/proc/no/such/file cannot be written"),
        (["--line-protocol", "unix:/proc/no/such/socket"], "socket cannot be written"),
    ],
)
def test_what_cannot_be_published_is_one_sentence(
    options: list[str], said: str, make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["metrics", str(make_run()), *options, "--once"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_port_that_is_taken_is_one_sentence(
    make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["metrics", str(make_run()), "--port", str(port)]) == 1
    assert f"port {port} of 127.0.0.1 cannot be opened" in capsys.readouterr().err

"""A full disk: one sentence that names the file, nothing half written, and older files stay."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from observatory.campaign.sweep.journal import JournalPoint, append_line
from observatory.run import RunWriter, routing_rows
from observatory.run.manifest import ModelSpec, MoeLayerSpec
from tests.run.conftest import manifest_of
from tests.run.test_hostile_documents import bench_document

pytestmark = pytest.mark.slow

#: A command on a disk that takes only so many bytes into one file.
_SMALL_DISK = """
import resource, sys
sys.dont_write_bytecode = True  # Python keeps files of bytecode that were cut off
from observatory.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:]))
"""


def on_a_small_disk(limit: int, *words: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _SMALL_DISK, str(limit), *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done
    (line,) = [line for line in done.stderr.splitlines() if "File too large" in line]
    assert "Traceback" not in done.stderr
    return line


@pytest.fixture
def run(tmp_path: Path) -> Path:
    layer = MoeLayerSpec(layer=0, module="m", experts=64, top_k=1)
    model = ModelSpec(name="m", hidden_size=64, dtype="float32", moe_layers=(layer,))
    path = tmp_path / "run"
    with RunWriter.create(path, manifest_of(model=model)) as writer:
        load_NE = np.random.default_rng(0).integers(0, 99, (9, 64))
        rows = routing_rows(
            step_N=np.arange(9), phase_N="decode", layer_N=0, source_rank=0, tokens_N=999, load_NE=load_NE
        )
        writer.append("routing", rows)
        count = 300
        spans = {
            "step": range(count), "phase": ["decode"] * count, "name": ["x"] * count,
            "start_ns": [index * 1000 for index in range(count)],
            "end_ns": [index * 1000 + 9 for index in range(count)],
        }  # fmt: skip
        ranks = pa.array([0] * count, pa.int32())
        writer.append("spans", pa.table({**spans, "source_rank": ranks}))
    return path


def left_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("chrome-trace", "--out", "t.json"), "t.json"),
        (("chrome-trace", "--out", "t.json.gz"), "t.json.gz"),
        (("chrome-trace", "--out", "traces"), "rank-00000.json"),
        (("nccl-tests", "--ep", "32", "--out", "matrices"), "index.json"),
    ],
)
def test_an_export_that_does_not_fit_leaves_nothing(run: Path, words: tuple[str, ...], name: str) -> None:
    out = run.parent / "out"
    out.mkdir()
    line = on_a_small_disk(2000, "export", run, *words[:-1], out / words[-1])
    assert f"{out / words[-1]}" in line
    assert name in line or name == "index.json"
    assert left_in(out) == []


def test_a_report_that_does_not_fit_leaves_the_older_one(run: Path) -> None:
    out = run.parent / "out"
    out.mkdir()
    (out / "report.html").write_text("older")
    line = on_a_small_disk(5000, "report", run, "--out", out / "report.html", "--force")
    assert str(out / "report.html") in line
    assert left_in(out) == ["report.html"]
    assert (out / "report.html").read_text() == "older"


def test_a_model_that_does_not_fit_leaves_the_older_one(tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text(json.dumps(bench_document(60)))
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.json").write_text("older")
    line = on_a_small_disk(1000, "fit", tmp_path / "bench.json", "--out", out / "model.json", "--force")
    assert str(out / "model.json") in line
    assert left_in(out) == ["model.json"]
    assert (out / "model.json").read_text() == "older"


def test_half_a_line_is_taken_out_of_a_journal(tmp_path: Path) -> None:
    path = tmp_path / "sweep.points.jsonl"
    point = JournalPoint(order=0, repeat=0, series=0, start_ns=0, end_ns=1, iterations=1)
    append_line(path, point, fresh=True)
    first = path.read_text()
    program = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from observatory.campaign.sweep.journal import JournalPoint, append_line\n"
        "point = JournalPoint(order=1, repeat=0, series=0, start_ns=0, end_ns=1, iterations=1)\n"
        "sys.dont_write_bytecode = True\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(first) + 10}, resource.RLIM_INFINITY))\n"
        "append_line(Path(sys.argv[1]), point)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=False
    )
    assert f"ClockError: {path} cannot be written (File too large)" in done.stderr
    assert path.read_text() == first


def test_a_run_that_cannot_be_begun_leaves_nothing(run: Path) -> None:
    out = run.parent / "out"
    out.mkdir()
    line = on_a_small_disk(
        10,
        "power",
        "--out",
        out / "new",
        "--device",
        f"replay:{run}",
        "--calibrate-s",
        "0",
        "--seconds",
        "0.1",
    )
    assert str(out / "new") in line
    assert left_in(out) == []

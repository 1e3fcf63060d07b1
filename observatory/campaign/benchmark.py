"""Runs a benchmark plan: on local ranks started here, or as one rank of those a launcher started."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from observatory.errors import ExchangeError, alike
from observatory.host.children import python_module
from observatory.host.ranks import check_backend, find_rank
from observatory.run.bounded import MAX_DOCUMENT_BYTES
from observatory.run.documents.bench import NODES_AS_STATED, BenchPlan, BenchResult, load_bench
from observatory.run.documents.route_fetch import RouteFetchPlan, RouteFetchResult, load_route_fetch
from observatory.run.documents.writing import write_text

Plan = BenchPlan | RouteFetchPlan
Result = TypeVar("Result", BenchResult, RouteFetchResult)

#: Of a point of routes and fetches: options, their stages and the total, and one time, as JSON.
_MOST_OPTIONS, _MOST_STAGES, _BYTES_OF_STAGE = 3, 5, 20
#: Time and waiting of one rank in one repeat, as JSON.
_BYTES_OF_TIMES = 40


def ranks_of_benchmark(requested: int | None, *, default: int = 4) -> int:
    """The launcher's number of ranks, else the requested one.

    Raises:
        ExchangeError: both are there and differ.
    """
    where = find_rank()
    if where.launcher == "alone":
        return default if requested is None else requested
    if requested not in (None, where.world):
        raise alike(
            ExchangeError(
                f"{requested} ranks were asked for, but {where.launcher} started {where.world}; leave the "
                "number out or start as many"
            )
        )
    return where.world


def run_benchmark(
    plan: BenchPlan, *, ranks: int, backend: str, ranks_per_node: int | None, timeout_s: float = 60.0
) -> BenchResult | None:
    """Run a plan and return the result; None on the other ranks of a launcher.

    Args:
        plan: what to exchange.
        ranks: P.
        backend: auto, gloo, nccl or mpi.
        ranks_per_node: nodes to emulate; None takes the hosts as they are.
        timeout_s: how long one exchange or barrier may take.

    Raises:
        ExchangeError: a rank failed or is missing, backend or nodes do not fit, or the result would be larger
            than what is read.
    """
    from observatory.collectives.bench.measure import run_plan

    _check_size(plan, ranks)
    if ranks_per_node is not None:
        plan = plan.model_copy(update={"notes": (*plan.notes, NODES_AS_STATED)})
    return _run_on_ranks(
        plan,
        run_plan,
        load_bench,
        ranks=ranks,
        backend=backend,
        ranks_per_node=ranks_per_node,
        timeout_s=timeout_s,
    )


def run_route_fetch_benchmark(
    plan: RouteFetchPlan, *, ranks: int, backend: str, timeout_s: float = 60.0
) -> RouteFetchResult | None:
    """Run a plan of routes and fetches and return the result; None on the other ranks of a launcher.

    Args:
        plan: what to measure.
        ranks: P, two or more.
        backend: auto, gloo, nccl or mpi.
        timeout_s: how long one exchange or barrier may take.

    Raises:
        ExchangeError: fewer than two ranks, a rank failed or is missing, the backend does not fit, or points
            exceed the memory of this machine.
    """
    from observatory.collectives.bench.route_fetch import run_route_fetch
    from observatory.collectives.bench.route_fetch_plan import least_bytes
    from observatory.host.provenance import find_host

    points = sum(map(len, (*plan.points, *plan.edits)))
    expected = points * _MOST_OPTIONS * plan.repeats * _MOST_STAGES * _BYTES_OF_STAGE
    if expected > MAX_DOCUMENT_BYTES:
        raise alike(
            ExchangeError(
                f"the result of {points} points and {plan.repeats} repeats would be {expected >> 20} MiB, "
                f"over {MAX_DOCUMENT_BYTES >> 20}; measure fewer points or repeats"
            )
        )
    here = ranks if find_rank().launcher == "alone" else 1
    needed, memory = least_bytes(plan, here), find_host().memory_bytes
    if memory is not None and needed > memory:
        raise alike(
            ExchangeError(
                f"the largest points of this plan take at least {needed / 1e9:,.0f} GB, this machine has "
                f"{memory / 1e9:,.0f}; give smaller --rows, --sizes, --layers or --shape"
            )
        )
    return _run_on_ranks(
        plan,
        run_route_fetch,
        load_route_fetch,
        ranks=ranks,
        backend=backend,
        ranks_per_node=None,
        timeout_s=timeout_s,
    )


def _run_on_ranks(
    plan: Plan,
    run: Callable[..., Result | None],
    load: Callable[[Path], Result],
    *,
    ranks: int,
    backend: str,
    ranks_per_node: int | None,
    timeout_s: float,
) -> Result | None:
    """Run a plan here, on the ranks of a launcher, or on local ranks that are started for it."""
    from observatory.collectives.bench.rank import RankJob
    from observatory.collectives.layout import split_into_nodes
    from observatory.collectives.transport.open import open_transport

    check_backend(backend)
    if find_rank().launcher != "alone" or ranks == 1:
        with open_transport(
            backend,  # type: ignore[arg-type]  # checked there, naming the choices
            ranks_per_node=ranks_per_node,
            timeout_s=timeout_s,
        ) as transport:
            return run(transport, plan, barrier_timeout_s=timeout_s)
    if backend == "mpi":
        raise ExchangeError(
            f"MPI starts its own ranks; run the same command under it: mpiexec -n {ranks} observatory ..."
        )
    if ranks_per_node is not None:
        split_into_nodes(ranks, ranks_per_node)
    from observatory.hpc.launch import start_local_ranks

    with tempfile.TemporaryDirectory(prefix="observatory-bench-") as folder:
        job, out = Path(folder) / "job.json", Path(folder) / "result.json"
        rank_job = RankJob(
            plan=plan, backend=backend, ranks_per_node=ranks_per_node, timeout_s=timeout_s, out=str(out)
        )
        job.write_text(rank_job.model_dump_json(), encoding="utf-8")
        start_local_ranks(python_module("observatory.collectives.bench.rank", str(job)), ranks)
        return load(out)


def _check_size(plan: BenchPlan, ranks: int) -> None:
    """Refuse a plan whose result could not be read, before hours are spent on it."""
    matrices = len(plan.model_dump_json(include={"traffic"}))
    times = len(plan.traffic) * plan.repeats * ranks * _BYTES_OF_TIMES
    expected = len(plan.algorithms) * (matrices + times)
    if expected > MAX_DOCUMENT_BYTES:
        raise alike(
            ExchangeError(
                f"the result of {len(plan.traffic)} matrices, {plan.repeats} repeats on {ranks} ranks would "
                f"be {expected >> 20} MiB, over {MAX_DOCUMENT_BYTES >> 20}; measure fewer matrices or repeats"
            )
        )


def check_out(path: Path, *, force: bool) -> None:
    """Refuse to replace a result, before hours are spent on a new one.

    Raises:
        ExchangeError: the file is there already, is no plain file, or its folder is not there.
    """
    if path.exists() and not path.is_file():
        # Renaming over a device would replace it, for all users of the machine when root does it.
        raise ExchangeError(f"{path} is there and no plain file; give the name of a result file")
    if path.exists() and not force:
        raise ExchangeError(f"{path} is there already; give another --out, or --force to replace it")
    if not path.parent.is_dir():
        raise ExchangeError(f"{path} cannot be written: {path.parent} is no directory; make it first")


def write_result(result: BenchResult | RouteFetchResult, path: Path) -> None:
    """Write a result; raises ExchangeError, after writing, when bytes arrived wrong or a result is wrong."""
    text = result.model_dump_json(indent=1)
    write_text(path, text if len(text) <= MAX_DOCUMENT_BYTES else result.model_dump_json())
    if isinstance(result, RouteFetchResult):
        _check_results(result, path)
        return
    wrong = [case for case in result.cases if not case.correct]
    if wrong:
        raise ExchangeError(
            f"{len(wrong)} of {len(result.cases)} exchanges went wrong, first {wrong[0].algorithm} "
            f"with {wrong[0].pattern}; {path} names them all: repair the fabric before trusting any run on it"
        )


def _check_results(result: RouteFetchResult, path: Path) -> None:
    wrong = [case for case in result.cases if not case.correct]
    if wrong:
        first = wrong[0]
        raise ExchangeError(
            f"{len(wrong)} of {len(result.cases)} cases gave other results than one rank alone, first "
            f"{first.option} of {result.shapes[first.shape].name} with {first.rows} rows and size "
            f"{first.size} (off by {first.worst_error:.2g}); {path} names them all: repair the fabric or the "
            "kernels before trusting its times"
        )

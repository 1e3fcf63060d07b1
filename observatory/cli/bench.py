"""``observatory bench``: micro-benchmarks of exchanges."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from observatory.cli.options import (
    AlgorithmsOption,
    BackendOption,
    ForceOption,
    IterationsOption,
    JsonOption,
    RanksPerNodeOption,
    RankTimeoutOption,
    RepeatsOption,
    WarmupOption,
)
from observatory.cli.parsing import parse_algorithms, parse_names, parse_sizes

_COLUMNS = (
    "algorithm",
    "pattern",
    "seed",
    "size",
    "time us",
    "p90 us",
    "algbw GB/s",
    "busbw GB/s",
    "correct",
)


def alltoall(
    out: Annotated[Path, typer.Option("--out", help="Result file (JSON) to write.")],
    ranks: Annotated[
        int | None,
        typer.Option(min=1, max=4096, help="Ranks to start here; under a launcher, those it started."),
    ] = None,
    backend: BackendOption = "auto",
    algorithm: AlgorithmsOption = "flat",
    sizes: Annotated[
        str, typer.Option(help="Mean bytes each rank sends, e.g. 1KiB,64KiB,1MiB.")
    ] = "1KiB,8KiB,64KiB,512KiB,4MiB",
    patterns: Annotated[
        str,
        typer.Option(
            help="uniform, routed, skewed, hot, random, sparse, one-sided, neighbour, local, empty; or all."
        ),
    ] = "uniform,routed,skewed,random,sparse,empty",
    seeds: Annotated[int, typer.Option(min=1, help="Matrices of each pattern that is drawn.")] = 1,
    repeats: RepeatsOption = 20,
    warmup: WarmupOption = 2,
    iterations: IterationsOption = 1,
    ranks_per_node: RanksPerNodeOption = None,
    timeout_s: RankTimeoutOption = 60.0,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Time all-to-all exchanges of several sizes, splits and algorithms, and check every byte."""
    from observatory.campaign.benchmark import check_out, ranks_of_benchmark, run_benchmark, write_result
    from observatory.cli.output import print_json, print_table, say, say_cores
    from observatory.collectives.bench.measure import alltoall_plan
    from observatory.collectives.bench.patterns import PATTERNS
    from observatory.host.provenance import command_line
    from observatory.run.usable_cores import share_document, short_of_cores

    check_out(out, force=force)
    world = ranks_of_benchmark(ranks)
    plan = alltoall_plan(
        ranks=world,
        sizes_bytes=parse_sizes(sizes),
        patterns=parse_names(patterns, every=tuple(PATTERNS)),
        algorithms=parse_algorithms(algorithm),
        seeds=range(seeds),
        warmup=warmup,
        repeats=repeats,
        iterations=iterations,
    ).model_copy(update={"argv": command_line()})
    result = run_benchmark(
        plan, ranks=world, backend=backend, ranks_per_node=ranks_per_node, timeout_s=timeout_s
    )
    if result is None:
        return
    short = short_of_cores(result.cores_P or ())
    say_cores(short)
    for note in result.notes:
        say(f"note: {note}")
    rows = [
        (
            case.algorithm,
            case.pattern,
            case.seed,
            int(case.bytes_PP.sum()) // case.ranks,
            case.median_us,
            case.p90_us,
            case.algbw_gb_per_s,
            case.busbw_gb_per_s,
            case.correct,
        )
        for case in result.cases
    ]
    if json:
        names = (
            "algorithm", "pattern", "seed", "mean_send_bytes", "median_us", "p90_us",
            "algbw_gb_per_s", "busbw_gb_per_s", "correct",
        )  # fmt: skip
        print_json(
            {
                "backend": result.backend,
                "ranks": result.ranks,
                "node_of_rank": list(result.node_of_P),
                "timing": result.timing,
                "notes": list(result.notes),
                "short_of_cores": [share_document(share) for share in short],
                "rows": [dict(zip(names, row, strict=True)) for row in rows],
            }
        )
    else:
        print_table(
            list(_COLUMNS),
            [(*row[:6], _significant(row[6]), _significant(row[7]), row[8]) for row in rows],
            title=f"all-to-all of {result.ranks} ranks over {result.backend}: last start "
            f"to last end, median of {repeats}",
        )
    write_result(result, out)
    say(f"result written to {out}; next: observatory fit {out} --out fit.json")


def _significant(gb_per_s: float) -> str:
    """Three digits, also of a small exchange: 1 KiB in 2 ms is no 0.000 GB/s."""
    return f"{gb_per_s:.3g}"


def bench_group() -> typer.Typer:
    """The ``bench`` command and its benchmarks."""
    group = typer.Typer(help="Micro-benchmarks of exchanges.", no_args_is_help=True)
    group.callback()(lambda: None)
    group.command("alltoall")(alltoall)
    return group

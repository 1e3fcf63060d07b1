"""``observatory bench``: micro-benchmarks of exchanges."""

from __future__ import annotations

from typing import Annotated

import typer

from observatory.cli.options import (
    RANKS,
    AlgorithmsOption,
    BackendOption,
    CsvOption,
    ForceOption,
    IterationsOption,
    JsonOption,
    RanksPerNodeOption,
    RankTimeoutOption,
    RepeatsOption,
    ResultOption,
    WarmupOption,
    WideOption,
)
from observatory.cli.parsing import parse_names, parse_sizes


def alltoall(
    out: ResultOption,
    ranks: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=4096,
            rich_help_panel=RANKS,
            help="Ranks to start here, 4 by default; under a launcher, those it started.",
        ),
    ] = None,
    backend: BackendOption = "auto",
    algorithm: AlgorithmsOption = "flat",
    sizes: Annotated[
        str,
        typer.Option(metavar="SIZE,...", help="Mean bytes that each rank sends, such as 1KiB,64KiB,1MiB."),
    ] = "1KiB,8KiB,64KiB,512KiB,4MiB",
    patterns: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="uniform, routed, skewed, hot, random, sparse, one-sided, neighbour, local, empty, or all.",
        ),
    ] = "uniform,routed,skewed,random,sparse,empty",
    seeds: Annotated[int, typer.Option(min=1, help="Matrices of each random pattern.")] = 1,
    repeats: RepeatsOption = 20,
    warmup: WarmupOption = 2,
    iterations: IterationsOption = 1,
    ranks_per_node: RanksPerNodeOption = None,
    timeout_s: RankTimeoutOption = 60.0,
    force: ForceOption = False,
    wide: WideOption = False,
    csv: CsvOption = False,
    json: JsonOption = False,
) -> None:
    """Time all-to-all exchanges of several sizes, splits and algorithms, and check every byte."""
    from observatory.advice.conclusions import conclude_bench, conclusion_document
    from observatory.analysis.network.documents import bench_document, bench_tables
    from observatory.campaign.benchmark import check_out, ranks_of_benchmark, run_benchmark, write_result
    from observatory.campaign.preflight import check_libraries
    from observatory.cli.output import print_conclusion, print_data, print_tables, say, say_cores
    from observatory.collectives.bench.patterns import PATTERNS
    from observatory.host.provenance import command_line
    from observatory.run.exchange_algorithms import ALGORITHMS
    from observatory.run.usable_cores import short_of_cores

    check_out(out, force=force)
    check_libraries(["torch"])
    world = ranks_of_benchmark(ranks)
    sizes_bytes = parse_sizes(sizes)
    chosen = parse_names("pattern", patterns, every=tuple(PATTERNS))
    algorithms = parse_names("algorithm", algorithm, every=ALGORITHMS)
    from observatory.collectives.bench.measure import alltoall_plan  # loads torch

    plan = alltoall_plan(
        ranks=world,
        sizes_bytes=sizes_bytes,
        patterns=chosen,
        algorithms=algorithms,
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
    say_cores(short_of_cores(result.cores_P or ()))
    for note in result.notes:
        say(f"note: {note}")
    try:
        document = bench_document(result)
        conclusion = conclude_bench(document, out)
        document["conclusion"] = conclusion_document(conclusion)
        tables = bench_tables(document)
        if not print_data(document, tables, json=json, csv=csv):
            print_tables(tables, wide=wide)
            print_conclusion(conclusion)
    finally:  # a failure to print does not lose the measurement
        write_result(result, out)
    say(f"result written to {out}; next: observatory fit {out} --out fit.json")

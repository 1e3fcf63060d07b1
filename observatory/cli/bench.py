"""``observatory bench``: micro-benchmarks of exchanges and of experts."""

from __future__ import annotations

from typing import Annotated

import typer

from observatory.cli.options import (
    DATA,
    RANKS,
    TIMING,
    AlgorithmsOption,
    BackendOption,
    CsvOption,
    DtypeOption,
    ForceOption,
    IterationsOption,
    JsonOption,
    RanksPerNodeOption,
    RankTimeoutOption,
    RepeatsOption,
    ResultOption,
    TableOption,
    WarmupOption,
    WideOption,
)
from observatory.cli.parsing import parse_counts, parse_names, parse_sizes


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


_MOST_ASSIGNMENTS = 1 << 24
_MOST_EXPERTS = 65536


def experts(
    out: ResultOption,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Bundled model (listed by `doctor`), checkpoint directory, or hub id; or give --shape.",
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="H,F,E,K",
            rich_help_panel=DATA,
            help="Instead of a model: hidden size, intermediate size, experts, experts per token; gated, "
            "with random weights.",
        ),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(min=0, rich_help_panel=DATA, help="MoE layer of the model; its first by default."),
    ] = None,
    dtype: DtypeOption = None,
    device: Annotated[
        str, typer.Option(metavar="NAME", rich_help_panel=DATA, help="Torch device, such as cpu or cuda.")
    ] = "cpu",
    ep: Annotated[
        int,
        typer.Option(
            min=1,
            max=_MOST_EXPERTS,
            rich_help_panel=RANKS,
            help="Ranks over which the experts are spread; those of one are timed.",
        ),
    ] = 1,
    assignments: Annotated[
        str, typer.Option(metavar="N,...", help="Token-expert assignments of a call.")
    ] = "1,4,16,64,256,1024,2048,4096,8192,16384",
    activated: Annotated[
        str, typer.Option(metavar="N,...", help="Experts of a call with at least one of them.")
    ] = "1,2,4,8,16,32,64,128",
    repeats: Annotated[
        int, typer.Option(min=1, max=100_000, rich_help_panel=TIMING, help="Timed rounds over all points.")
    ] = 9,
    warmup: WarmupOption = 2,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order and of the rows.")] = 0,
    force: ForceOption = False,
    wide: WideOption = False,
    csv: CsvOption = False,
    table: TableOption = None,
    json: JsonOption = False,
) -> None:
    """Time the experts that a rank holds over assignments and activated experts, and fit their cost."""
    from observatory.advice.conclusions import conclude_experts, conclusion_document
    from observatory.analysis.experts.cost import fit_experts, try_forms
    from observatory.analysis.experts.document import experts_document, experts_tables
    from observatory.campaign.benchmark import check_out
    from observatory.campaign.expert_bench import bench_experts, check_experts_bench
    from observatory.cli.output import counting, print_conclusion, print_data, print_tables, say, say_cores
    from observatory.host.provenance import command_line
    from observatory.run.documents.writing import write_text
    from observatory.run.usable_cores import short_of_cores

    check_out(out, force=force)
    rows = parse_counts("--assignments", assignments, most=_MOST_ASSIGNMENTS)
    each = parse_counts("--activated", activated, most=_MOST_EXPERTS)
    sizes = None if shape is None else parse_counts("--shape", shape, most=_MOST_ASSIGNMENTS)
    check_experts_bench(model, sizes, device=device, dtype=dtype)
    from observatory.collectives.bench.experts import ExpertGrid  # loads torch

    grid = ExpertGrid(assignments=(0, *rows), activated=each, warmup=warmup, repeats=repeats, seed=seed)
    with counting("bench experts") as progress:
        result = bench_experts(
            grid,
            model=model,
            shape=sizes,
            layer=layer,
            ep=ep,
            device=device,
            dtype=dtype,
            argv=command_line(),
            progress=progress,
        )
    write_text(out, result.model_dump_json(indent=1))
    say_cores(short_of_cores([result.cores] if result.cores else ()))
    document = experts_document(result, fit_experts(result, source=out.name), try_forms(result))
    conclusion = conclude_experts(document, out)
    document["conclusion"] = conclusion_document(conclusion)
    tables = experts_tables(document)
    if not print_data(document, tables, json=json, csv=csv, table=table):
        print_tables(tables if wide else tables[:2], wide=wide)
        print_conclusion(conclusion)
    say(f"result written to {out}")

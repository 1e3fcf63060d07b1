"""``observatory route-fetch`` and ``observatory bench route-fetch``: send rows, or bring data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from observatory.cli.options import (
    RANKS,
    BackendOption,
    CsvOption,
    ForceOption,
    JsonOption,
    OnlyPhaseOption,
    RankTimeoutOption,
    RepeatsOption,
    ResultOption,
    TableOption,
    WarmupOption,
    WideOption,
    refuse_ignored,
)
from observatory.cli.parsing import parse_counts, parse_range, parse_shape

_MOST_ROWS = 1 << 24

ShapeOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KIND:N,...",
        help="mha:HEADS,DIM; gqa:HEADS,KV_HEADS,DIM; mla:HEADS,LATENT,ROTARY; "
        "sparse:HEADS,LATENT,ROTARY,SELECTED; expert:HIDDEN. May be repeated.",
    ),
]
ElementOption = Annotated[str, typer.Option("--dtype", metavar="NAME", help="float32, bfloat16 or float16.")]

ConstantsOption = Annotated[
    str,
    typer.Option(
        metavar="FILE|published:NAME",
        help="Result of `bench route-fetch`, or published constants: published:h100-ndr200.",
    ),
]


def route_fetch(
    context: typer.Context,
    constants: ConstantsOption,
    run: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN]", help="Run directory, to decide about the experts of its model."),
    ] = None,
    ranks: Annotated[
        int | None,
        typer.Option(min=2, max=65536, rich_help_panel=RANKS, help="With RUN: expert-parallel ranks."),
    ] = None,
    copies: Annotated[
        int,
        typer.Option(
            min=0,
            max=65536,
            rich_help_panel=RANKS,
            help="With RUN: experts that a rank may keep besides its own.",
        ),
    ] = 0,
    phase: OnlyPhaseOption = None,
    shape: ShapeOption = None,
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="NAME", help="Of --shape: float32, bfloat16 or float16.")
    ] = "bfloat16",
    layers: Annotated[int, typer.Option(min=1, max=4096, help="Layers of the cache.")] = 1,
    uses: Annotated[
        float, typer.Option(min=1.0, max=1e9, help="Steps that one fetch or prefill serves.")
    ] = 1.0,
    rows: Annotated[
        str, typer.Option(metavar="LOW,HIGH", help="Query rows, or tokens of an expert, of the map.")
    ] = "16,4096",
    sizes: Annotated[
        str, typer.Option(metavar="LOW,HIGH", help="Tokens of a chunk, or inner width, of the map.")
    ] = "16,4096",
    reuse: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Result of `reuse measure`: what making a chunk here costs."),
    ] = None,
    bootstrap: Annotated[int, typer.Option(min=20, max=10_000, help="Bootstrap samples over points.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Seed of folds and bootstrap.")] = 0,
    wide: WideOption = False,
    csv: CsvOption = False,
    table: TableOption = None,
    json: JsonOption = False,
) -> None:
    """Send rows to the data, bring the data, or make it here: what costs less, and from where on."""
    from observatory.advice.route_fetch import conclude_maps, known_constants
    from observatory.advice.route_fetch_words import route_fetch_sentences
    from observatory.analysis.route_fetch.document import (
        Question,
        map_tables,
        route_fetch_document,
        route_fetch_tables,
    )
    from observatory.analysis.route_fetch.reuse import measured_prefill
    from observatory.cli.output import print_data, print_tables, print_text, say
    from observatory.run.documents.prefix_cache import load_reuse

    if run is not None:
        refuse_ignored(context, ("shape", "dtype", "layers", "uses", "rows", "sizes", "reuse"), "with RUN")
        _decide(
            run,
            constants,
            ranks=ranks,
            copies=copies,
            phase=phase,
            bootstrap=bootstrap,
            seed=seed,
            wide=wide,
            csv=csv,
            table=table,
            json=json,
        )
        return
    refuse_ignored(context, ("ranks", "copies", "phase"), "without RUN")
    question = Question(
        rows=parse_range("--rows", rows, most=_MOST_ROWS),
        sizes=parse_range("--sizes", sizes, most=_MOST_ROWS),
        layers=layers,
        uses=uses,
    )
    shapes = [parse_shape(text, dtype=dtype) for text in shape or ()]
    answers, notes = known_constants(constants, shapes, bootstrap=bootstrap, seed=seed)
    prefill = None
    if reuse is not None:
        prefill = measured_prefill(load_reuse(reuse))
        notes.append(
            f"local is the prefill of {prefill.model} on one device, all layers, up to its "
            f"{prefill.prompt_tokens} tokens"
        )
    document = route_fetch_document(answers, question, notes, prefill=prefill)
    conclusion = conclude_maps(document)
    document["conclusion"] = [reason.document() for reason in conclusion]
    tables = route_fetch_tables(document)
    for note in notes:
        say(f"note: {note}")
    if not print_data(document, tables, json=json, csv=csv, table=table):
        print_tables([*tables[:-1], *map_tables(document)], wide=wide)
        print_text(["", *route_fetch_sentences(conclusion)])


def _decide(
    path: Path,
    name: str,
    *,
    ranks: int | None,
    copies: int,
    phase: str | None,
    bootstrap: int,
    seed: int,
    wide: bool,
    csv: bool,
    table: str | None,
    json: bool,
) -> None:
    """Decide about the experts of a run."""
    from observatory.advice.route_fetch import advise_experts, known_constants, run_shape
    from observatory.advice.route_fetch_document import expert_document, expert_tables
    from observatory.advice.route_fetch_words import route_fetch_sentences
    from observatory.analysis.parallel.step_loads import step_loads
    from observatory.cli.output import print_data, print_tables, print_text, say
    from observatory.errors import BenchmarkError
    from observatory.run import open_run

    opened = open_run(path)
    if ranks is None:
        raise BenchmarkError(
            f"over how many ranks the experts of {path} are spread is not given; give --ranks"
        )
    answers, notes = known_constants(name, [run_shape(opened.manifest.model)], bootstrap=bootstrap, seed=seed)
    loads = step_loads(opened, phase=phase)
    if phase is None and len(loads.phases) > 1:
        loads = loads.of_phase(loads.largest_phase)
        notes.append(f"decided for {loads.phases[0]}, which has most assignments; give --phase for another")
    _, known, held_out = answers[0]
    advice = advise_experts(opened, loads, known, ranks=ranks, held_out=held_out, copies=copies, seed=seed)
    document = expert_document(advice, opened.problems)
    tables = expert_tables(document)
    for note in (*notes, *opened.problems):
        say(f"note: {note}")
    if not print_data(document, tables, json=json, csv=csv, table=table):
        print_tables(tables, wide=wide)
        print_text(["", *route_fetch_sentences(advice.verdict)])


def bench(
    out: ResultOption,
    ranks: Annotated[
        int | None,
        typer.Option(
            min=2,
            max=4096,
            rich_help_panel=RANKS,
            help="Ranks to start here, 2 by default: one asks, the others hold. Under a launcher, those it "
            "started.",
        ),
    ] = None,
    backend: BackendOption = "auto",
    shape: ShapeOption = None,
    dtype: ElementOption = "float32",
    rows: Annotated[
        str, typer.Option(metavar="LOW,HIGH", help="Query rows, or tokens of an expert: fewest and most.")
    ] = "16,1024",
    sizes: Annotated[
        str,
        typer.Option(
            metavar="LOW,HIGH", help="Tokens of a chunk, or inner width of an expert: fewest and most."
        ),
    ] = "16,1024",
    layers: Annotated[
        str, typer.Option(metavar="N,...", help="Layers of the cache, dealt out to points in turns.")
    ] = "1,3",
    points: Annotated[int, typer.Option(min=8, max=4096, help="Points of each shape.")] = 64,
    prefill: Annotated[
        str | None,
        typer.Option(
            metavar="HIDDEN,INNER",
            help="Also measure making the cache here, by decoder layers of this hidden size and inner width, "
            "and editing it in place.",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="NAME", help="Torch device that computes: cpu, cuda.")
    ] = "cpu",
    seed: Annotated[int, typer.Option(min=0, help="Seed of points and data.")] = 0,
    repeats: RepeatsOption = 7,
    warmup: WarmupOption = 1,
    timeout_s: RankTimeoutOption = 60.0,
    force: ForceOption = False,
    wide: WideOption = False,
    csv: CsvOption = False,
    table: TableOption = None,
    json: JsonOption = False,
) -> None:
    """Time sending rows to cached keys and values, or to an expert, against bringing these here."""
    from observatory.analysis.route_fetch.document import measured_document, measured_tables
    from observatory.campaign.benchmark import (
        check_out,
        ranks_of_benchmark,
        run_route_fetch_benchmark,
        write_result,
    )
    from observatory.campaign.preflight import check_libraries
    from observatory.cli.output import print_data, print_tables, say, say_cores
    from observatory.errors import BenchmarkError
    from observatory.host.provenance import command_line
    from observatory.run.usable_cores import short_of_cores

    check_out(out, force=force)
    if device not in ("cpu", "cuda"):
        raise BenchmarkError(f"device {device[:40]!r} is unknown", expected="cpu or cuda")
    decoder = None if prefill is None else parse_counts("--prefill", prefill, most=_MOST_ROWS)
    shapes = [
        parse_shape(text, dtype=dtype, decoder=decoder) for text in shape or ("mla:4,128,32", "expert:256")
    ]
    row_ends = parse_range("--rows", rows, most=_MOST_ROWS)
    size_ends = parse_range("--sizes", sizes, most=_MOST_ROWS)
    layer_counts = parse_counts("--layers", layers, most=4096)
    check_libraries(["torch"])
    world = ranks_of_benchmark(ranks, default=2)
    from observatory.collectives.bench.route_fetch_plan import route_fetch_plan

    plan = route_fetch_plan(
        shapes,
        points=points,
        rows=row_ends,
        sizes=size_ends,
        layers=layer_counts,
        edits=points // 2,
        warmup=warmup,
        repeats=repeats,
        seed=seed,
        device="cuda" if device == "cuda" else "cpu",
    ).model_copy(update={"argv": command_line()})
    result = run_route_fetch_benchmark(plan, ranks=world, backend=backend, timeout_s=timeout_s)
    if result is None:
        return
    say_cores(short_of_cores(result.cores_P or ()))
    try:
        document = measured_document(result)
        tables = measured_tables(document)
        if not print_data(document, tables, json=json, csv=csv, table=table):
            print_tables(tables[:1], wide=wide)
    finally:  # a failure to print does not lose the measurement
        write_result(result, out)
    say(f"result written to {out}; next: observatory route-fetch --constants {out}")

"""``observatory replay``: captured traffic on this fabric, against uniform traffic."""

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
    MostStepsOption,
    OnlyLayersOption,
    OnlyPhaseOption,
    PlacementOption,
    RanksPerNodeOption,
    RankTimeoutOption,
    RepeatsOption,
    ResultOption,
    RoleOption,
    RowBytesOption,
    RunArgument,
    WarmupOption,
    WideOption,
    parse_placement,
)
from observatory.cli.parsing import parse_names, parse_roles


def replay(
    run: RunArgument,
    out: ResultOption,
    ep: Annotated[
        int | None,
        typer.Option(
            "--ep",
            min=1,
            max=4096,
            rich_help_panel=RANKS,
            help="Ranks to start, or those of the launcher; by default as many as the run had, or 4.",
        ),
    ] = None,
    placement: PlacementOption = "auto",
    backend: BackendOption = "auto",
    algorithm: AlgorithmsOption = "flat",
    phase: OnlyPhaseOption = None,
    layer: OnlyLayersOption = None,
    steps: MostStepsOption = None,
    role: RoleOption = "both",
    row_bytes: RowBytesOption = None,
    repeats: RepeatsOption = 9,
    warmup: WarmupOption = 1,
    iterations: IterationsOption = 1,
    ranks_per_node: RanksPerNodeOption = None,
    timeout_s: RankTimeoutOption = 60.0,
    force: ForceOption = False,
    wide: WideOption = False,
    csv: CsvOption = False,
    json: JsonOption = False,
) -> None:
    """Replay a run's traffic step by step and layer by layer, against uniform traffic of equal volume."""
    from observatory.advice.conclusions import conclude_replay, conclusion_document
    from observatory.analysis.network.documents import replay_document, replay_tables
    from observatory.analysis.parallel.captured import captured_traffic, traffic_notes
    from observatory.campaign.benchmark import check_out, ranks_of_benchmark, run_benchmark, write_result
    from observatory.campaign.preflight import check_libraries
    from observatory.cli.output import print_conclusion, print_data, print_tables, say, say_cores
    from observatory.host.provenance import command_line
    from observatory.run import open_run
    from observatory.run.exchange_algorithms import ALGORITHMS
    from observatory.run.usable_cores import short_of_cores

    check_out(out, force=force)
    check_libraries(["torch"])
    algorithms, roles = parse_names("algorithm", algorithm, every=ALGORITHMS), parse_roles(role)
    opened = open_run(run)
    captured_ranks = opened.manifest.topology.ranks
    world = ranks_of_benchmark(ep, default=captured_ranks if captured_ranks > 1 else 4)
    captured = list(
        captured_traffic(
            opened,
            ep=world,
            placement=parse_placement(placement),
            bytes_per_row=row_bytes,
            phase=phase,
            layers=layer,
            steps=steps,
        )
    )
    from observatory.collectives.bench.replay import replay_plan  # loads torch

    plan = replay_plan(
        (item.traffic() for item in captured),
        algorithms=algorithms,
        roles=roles,  # type: ignore[arg-type]  # the two names, checked there
        warmup=warmup,
        repeats=repeats,
        iterations=iterations,
        run_id=opened.manifest.run_id,
        notes=traffic_notes(opened, captured, ep=world, placement=parse_placement(placement)),
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
        document = replay_document(result)
        conclusion = conclude_replay(document, run)
        document["conclusion"] = conclusion_document(conclusion)
        tables = replay_tables(document, opened.manifest.model.name)
        if not print_data(document, tables, json=json, csv=csv):
            print_tables(tables, wide=wide)
            print_conclusion(conclusion)
    finally:  # a failure to print does not lose the measurement
        write_result(result, out)
    say(f"result written to {out}")

"""``observatory quickstart``: everything once, with no arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def quickstart(
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Directory of runs and the report.")
    ] = Path("observatory-quickstart"),
) -> None:
    """Profile the bundled models on the bundled texts and write the report, without network or GPU."""
    from observatory.advice.conclusions import conclude_advice
    from observatory.advice.mitigations.models import advise_by_itself
    from observatory.advice.words import conclusion_sentences
    from observatory.analysis.network import load_network
    from observatory.campaign.documents import quickstart_table
    from observatory.campaign.preflight import check_libraries
    from observatory.campaign.quickstart import (
        EXCHANGE_DATA,
        EXCHANGE_MODEL,
        quickstart_exchanges,
        quickstart_grid,
        quickstart_simulated,
    )
    from observatory.campaign.quickstart_network import quickstart_network, quickstart_route_fetch
    from observatory.campaign.quickstart_plan import quickstart_plan
    from observatory.campaign.ranks import refuse_ranks
    from observatory.cli.cells import run_cells
    from observatory.cli.output import print_table, say
    from observatory.errors import ObservatoryError
    from observatory.reports import write_report
    from observatory.run import open_run

    refuse_ranks("quickstart")
    check_libraries()
    config = quickstart_grid()
    results = run_cells(config, out)
    failed = [result for result in results if result.state == "failed"]
    if failed:
        raise ObservatoryError(
            f"{failed[0].cell.job.model} on {failed[0].cell.job.data} failed: {failed[0].error}; "
            f"{len(failed)} of {len(results)} cells failed, the others are kept in {out}"
        )
    runs = quickstart_exchanges(out / "exchanges", report=say)
    network = quickstart_network(runs, out / "exchanges", report=say)
    route_fetch = quickstart_route_fetch(out / "exchanges", report=say)
    alone = [
        result.run
        for result in results
        if (result.cell.job.model, result.cell.job.data) == (EXCHANGE_MODEL, EXCHANGE_DATA)
    ]
    plan = quickstart_plan([*alone, *runs], network.model, out / "exchanges", report=say)
    simulated = quickstart_simulated(out / "simulated-device", report=say)
    report = write_report(
        [*(result.run for result in results), *runs, *simulated],
        out / "report.html",
        title="Quickstart: five trained MoE models, six data conditions, 1 to 4 ranks",
        ep_degrees=config.ep,
        gpus_per_node=config.gpus_per_node,
        bench=network.bench,
        replays=(network.replay,),
        networks=(network.model,),
        route_fetch=(route_fetch,),
        plans=(plan,),
        overwrite=True,
    )
    print_table(quickstart_table(config, results))
    for path in runs:
        advised = advise_by_itself(open_run(path), [load_network(network.model)])
        if advised is not None:
            conclusion = conclude_advice({"runs": [advised]})
            say(f"{path.name}: {'; '.join(conclusion_sentences(conclusion))}")
    typer.echo(f"report: {report.resolve()}")

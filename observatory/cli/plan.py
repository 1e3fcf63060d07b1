"""``observatory plan``: how many devices serve a model at given targets, and in which set-up."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from observatory.cli.options import OUTPUT, RANKS, CsvOption, ForceOption, JsonOption, TableOption, WideOption

if TYPE_CHECKING:
    from observatory.run import Run

_TARGETS = "Targets"
_MODELS = "What predicts times"
_MOST_TOKENS = 1 << 30


def plan(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN|CONFIG...", help="Runs of the model, or its config.json for assumed routing."
        ),
    ],
    target_tokens_per_s: Annotated[
        float,
        typer.Option(
            min=1e-3, max=1e12, metavar="N", rich_help_panel=_TARGETS, help="Generated tokens per second."
        ),
    ],
    context: Annotated[
        int, typer.Option(min=1, max=_MOST_TOKENS, rich_help_panel=_TARGETS, help="Tokens of a prompt.")
    ],
    output: Annotated[
        int, typer.Option(min=1, max=_MOST_TOKENS, rich_help_panel=_TARGETS, help="Tokens generated for it.")
    ],
    max_ms_per_token: Annotated[
        float | None,
        typer.Option(
            min=1e-6,
            max=1e9,
            metavar="MS",
            rich_help_panel=_TARGETS,
            help="Most time between tokens of a user.",
        ),
    ] = None,
    max_ttft_ms: Annotated[
        float | None,
        typer.Option(
            "--max-ttft-ms",
            min=1e-6,
            max=1e9,
            rich_help_panel=_TARGETS,
            help="Most time to the first token, without queueing.",
        ),
    ] = None,
    max_gpus: Annotated[
        int | None, typer.Option(min=1, max=_MOST_TOKENS, rich_help_panel=_TARGETS, help="Devices there are.")
    ] = None,
    hardware: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|TOML",
            rich_help_panel=_MODELS,
            help="Devices to compare, such as h100-sxm, or files of rates, one each; by default this machine "
            "as its runs measured it.",
        ),
    ] = None,
    network: Annotated[
        Path | None,
        typer.Option(metavar="FILE", rich_help_panel=_MODELS, help="Network model of `fit` of such devices."),
    ] = None,
    experts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", rich_help_panel=_MODELS, help="Result of `bench experts` on such a device."
        ),
    ] = None,
    clocks: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", rich_help_panel=_MODELS, help="Clock model of `clocks fit` of such a device."
        ),
    ] = None,
    site: Annotated[
        Path | None,
        typer.Option(
            metavar="TOML", rich_help_panel=_MODELS, help="Links, nodes and power of the site (docs/plan.md)."
        ),
    ] = None,
    price: Annotated[
        Path | None, typer.Option(metavar="TOML", rich_help_panel=_MODELS, help="Prices of device hours.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="CONFIG", rich_help_panel=_MODELS, help="config.json of the runs' model, if they lack it."
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=_MODELS,
            help="Torch dtype of the weights, such as bfloat16; by default as in the configuration.",
        ),
    ] = None,
    routing: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=_MODELS,
            help="captured, balanced or power-law; by default captured where a run is given.",
        ),
    ] = None,
    overlap: Annotated[
        bool,
        typer.Option(
            "--overlap",
            rich_help_panel=_MODELS,
            help="Exchanges run under another micro-batch's computation.",
        ),
    ] = False,
    mode: Annotated[
        str,
        typer.Option(
            metavar="NAME", rich_help_panel=RANKS, help="Prefill and decode together, apart, or both tried."
        ),
    ] = "both",
    gpus_per_node: Annotated[
        int | None,
        typer.Option(min=1, max=65536, rich_help_panel=RANKS, help="Devices that fast links join."),
    ] = None,
    chunk: Annotated[
        int,
        typer.Option(min=1, max=1 << 20, rich_help_panel=RANKS, help="Prompt tokens of a group in one step."),
    ] = 8192,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", rich_help_panel=OUTPUT, help="Also write the JSON document."),
    ] = None,
    force: ForceOption = False,
    wide: WideOption = False,
    csv: CsvOption = False,
    table: TableOption = None,
    json: JsonOption = False,
) -> None:
    """Plan devices, set-up and batch for a service, from captured routing and described devices."""
    from observatory.advice.capacity.document import plan_tables
    from observatory.advice.capacity.make import Request, make_plan
    from observatory.advice.capacity.plan import MODES
    from observatory.advice.capacity.site import Site, load_prices, load_site
    from observatory.advice.capacity.targets import Targets
    from observatory.advice.conclusions import conclude_plan
    from observatory.analysis.capacity.loads import ROUTING_KINDS
    from observatory.analysis.capacity.model_shape import model_shape, stored_as
    from observatory.campaign.benchmark import check_out
    from observatory.cli.output import print_conclusion, print_data, print_tables
    from observatory.errors import PlanError
    from observatory.run.documents.writing import write_json

    modes = tuple(name for name in MODES if mode in (name, "both"))
    kinds = tuple(kind for kind in ROUTING_KINDS if routing in (kind, None))
    if not modes:
        raise PlanError(f"--mode {mode[:40]!r} is not known", expected="together, apart or both")
    if not kinds:
        raise PlanError(f"--routing {str(routing)[:40]!r} is not known", expected=", ".join(ROUTING_KINDS))
    if out is not None:
        check_out(out, force=force)
    runs, config = _opened(sources, model)
    shape = model_shape(config)
    request = Request(
        model=shape if dtype is None else stored_as(shape, dtype),
        runs=runs,
        targets=Targets(
            tokens_per_s=target_tokens_per_s,
            context=context,
            output=output,
            max_ms_per_token=max_ms_per_token,
            max_ttft_ms=max_ttft_ms,
            most_gpus=max_gpus,
            chunk=chunk,
        ),
        hardware=hardware or [],
        modes=modes,
        site=Site() if site is None else load_site(site),
        routing=None if routing is None else kinds[0],
        overlap=overlap,
        gpus_per_node=gpus_per_node,
        prices=None if price is None else load_prices(price),
        experts=experts,
        network=network,
        clocks=clocks,
    )
    document = make_plan(request)
    tables = plan_tables(document)
    is_printed = print_data(document, tables, json=json, csv=csv, table=table)
    if out is not None:
        write_json(out, document)
    if not is_printed:
        print_tables([item for item in tables if item.rows and (wide or item.name != "alphas")], wide=wide)
        print_conclusion(conclude_plan(document))
    if not document["candidates"]:
        raise typer.Exit(2)


def _opened(sources: list[Path], model: Path | None) -> tuple[list[Run], dict[str, Any]]:
    """The runs, and the configuration of their model.

    Raises:
        PlanError: no configuration, or two; or a folder is of neither a run nor a model.
    """
    from observatory.analysis.capacity.model_shape import load_config
    from observatory.errors import ModelError, PlanError
    from observatory.run import open_run
    from observatory.zoo.models import find_checkpoint

    runs, configs = [], [] if model is None else [load_config(model)]
    for path in sources:
        if (path / "run.json").exists():
            runs.append(open_run(path))
        elif path.is_dir() and not (path / "config.json").exists():
            raise PlanError(f"{path} is neither a run nor the folder of a model: no run.json, no config.json")
        else:
            configs.append(load_config(path))
    if len(configs) > 1:
        raise PlanError(f"{len(configs)} model configurations are given", expected="one")
    if configs:
        return runs, configs[0]
    stated = next((run.manifest.model.config for run in runs if run.manifest.model.config), None)
    if stated is not None:
        return runs, dict(stated)
    try:
        folder = find_checkpoint(runs[0].manifest.model.name)
    except ModelError:  # as of a run that was imported, whose model has any name
        folder = None
    if folder is None:
        raise PlanError(
            f"run {runs[0].path} does not state the sizes of its model",
            remedy="give its config.json with --model",
        )
    return runs, load_config(folder)

"""``observatory place``: which placement of experts, chosen and judged on different steps of a run."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from observatory.cli.options import RANKS, CsvOption, ForceOption, JsonOption, WideOption, refuse_ignored

if TYPE_CHECKING:
    from observatory.advice.placement_scores import PlacementRules
    from observatory.advice.placement_times import StepTimer
    from observatory.analysis.parallel.step_loads import StepLoads
    from observatory.run import Run


def place(
    context: typer.Context,
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="Run directory.")] = None,
    ranks: Annotated[
        int | None,
        typer.Option("--ranks", min=2, max=65536, rich_help_panel=RANKS, help="Expert-parallel ranks."),
    ] = None,
    replicas: Annotated[
        int,
        typer.Option(min=0, max=65536, rich_help_panel=RANKS, help="Copies beyond one of each expert."),
    ] = 0,
    slots_per_rank: Annotated[
        int | None,
        typer.Option(
            min=1, max=65536, rich_help_panel=RANKS, help="Experts that a rank holds, in place of --replicas."
        ),
    ] = None,
    gpus_per_node: Annotated[
        int | None,
        typer.Option(min=1, max=65536, rich_help_panel=RANKS, help="Ranks per node; by default one node."),
    ] = None,
    groups: Annotated[
        int,
        typer.Option(
            min=1,
            max=65536,
            rich_help_panel=RANKS,
            help="Contiguous groups of experts that each stay on a node.",
        ),
    ] = 1,
    rank_speed: Annotated[
        Path | None,
        typer.Option(metavar="FILE", rich_help_panel=RANKS, help="Speed of each rank (JSON list or CSV)."),
    ] = None,
    objective: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="load of the busiest rank, its activated experts (activated), nodes per token, or time.",
        ),
    ] = "load",
    experts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Result of `bench experts`: times of steps are predicted as well."),
    ] = None,
    network: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --experts: a network model of `fit`.")
    ] = None,
    dispatch: Annotated[
        str,
        typer.Option(metavar="NAME", help="How copies share an expert's load: equal, weighted, or per-step."),
    ] = "equal",
    max_moves: Annotated[
        int | None,
        typer.Option(min=0, max=1 << 17, help="Experts that ranks may receive, in each layer."),
    ] = None,
    move_cost: Annotated[
        float,
        typer.Option(
            min=0.0, help="Least gain that a change of a layer must have, in times the mean rank's load."
        ),
    ] = 0.0,
    current: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            rich_help_panel=RANKS,
            help="Placement of today: linear, round-robin or a file; by default that of the run.",
        ),
    ] = None,
    phase: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Steps to place for: a phase, or all; by default the one of most assignments.",
        ),
    ] = None,
    train_share: Annotated[
        float,
        typer.Option(
            min=0.05,
            max=0.95,
            help="Share of the steps of each phase that placements are made on, the first ones.",
        ),
    ] = 0.5,
    problem: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Solve a problem given as arrays (.npz, docs/placement.md) instead.",
        ),
    ] = None,
    evaluate: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND",
            help="Judge a solver on a fixed set of problems; {problem} and {out} stand for its two files.",
        ),
    ] = None,
    on: Annotated[
        list[Path] | None,
        typer.Option(
            "--on", metavar="RUN", help="With --evaluate: captured steps, in place of bundled models'."
        ),
    ] = None,
    generated_only: Annotated[
        bool, typer.Option("--generated-only", help="With --evaluate: no captured steps.")
    ] = False,
    timeout_s: Annotated[
        float, typer.Option(min=0.1, max=86400.0, help="With --evaluate: longest time of a problem.")
    ] = 300.0,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the chosen placement (JSON).")
    ] = None,
    force: ForceOption = False,
    wide: WideOption = False,
    csv: CsvOption = False,
    json: JsonOption = False,
) -> None:
    """Choose a placement of experts on some steps and judge it on the others."""
    from observatory.errors import PlacementError

    if sum(given is not None for given in (run, problem, evaluate)) != 1:
        raise PlacementError("place takes a run, or --problem, or --evaluate; expected one of them")
    _refuse_ignored(context)
    if out is not None:
        from observatory.campaign.benchmark import check_out

        check_out(out, force=force)
    if evaluate is not None:
        _evaluate(evaluate, on or [], generated_only, timeout_s, out, wide=wide, csv=csv, json=json)
        return
    if problem is not None:
        _solve(problem, out, wide=wide, csv=csv, json=json)
        return
    from observatory.advice.placement import advise_placement
    from observatory.advice.placement_document import placement_document, placement_file, placement_tables
    from observatory.advice.placement_layouts import (
        current_layout,
        current_shares,
        replicas_of_slots,
        token_samples,
    )
    from observatory.advice.placement_scores import placement_rules
    from observatory.advice.words import placement_sentences
    from observatory.analysis.parallel.balancing.problem import read_speeds
    from observatory.cli.output import print_data, print_tables, say
    from observatory.run import open_run
    from observatory.run.documents.writing import write_json

    if run is None or ranks is None:
        raise PlacementError("place has no --ranks; expected the number of expert-parallel ranks")
    opened = open_run(run)
    loads = _loads(opened, phase, by_source=experts is not None)
    current_file = None if current in (None, "linear", "round-robin") else Path(str(current))
    today, name = current_layout(opened, loads, ranks=ranks, given=current_file or current)
    rules = placement_rules(
        ranks,
        objective=objective,
        dispatch=dispatch,
        gpus_per_node=gpus_per_node,
        groups=groups,
        speed_P=None if rank_speed is None else read_speeds(rank_speed, ranks),
        max_moves=max_moves,
        move_cost=move_cost,
    )
    if slots_per_rank is not None:
        replicas = replicas_of_slots(loads.load_SLE.shape[2], ranks, slots_per_rank, replicas)
    timer = None if experts is None else _timer(opened, loads, ranks, rules, experts, network)
    advice = advise_placement(
        loads,
        ranks=ranks,
        today=today,
        named_today=name,
        today_share_LPK=None if current_file is None else current_shares(current_file, loads, today),
        replicas=replicas,
        train_share=train_share,
        rules=rules,
        tokens=token_samples(opened, loads) if rules.nodes > 1 else None,
        timer=timer,
    )
    document = placement_document(advice, opened.problems)
    tables = placement_tables(document)
    for text in opened.problems:
        say(f"note: {text}")
    is_printed = print_data(document, tables, json=json, csv=csv)
    if out is not None:
        write_json(out, placement_file(advice, loads.load_SLE.shape[2]))
    if is_printed:
        return
    print_tables(tables, wide=wide)
    for sentence in placement_sentences(advice.verdict):
        say(sentence)
    if out is not None:
        say(f"placement written to {out}")
    if out is not None and advice.is_better:
        say(f"try it: observatory profile MODEL --ep {ranks} --placement {quote(str(out))}")


def _refuse_ignored(context: typer.Context) -> None:
    """Refuse options that do nothing for what is placed: a run, a problem, or a solver's problems."""
    given = context.params
    for_all = {"run", "problem", "evaluate", "out", "force", "wide", "csv", "json"}
    of_evaluate = {"on", "generated_only", "timeout_s"}
    of_run = set(given) - for_all - of_evaluate
    if given["run"] is not None:
        refuse_ignored(context, of_evaluate, "without --evaluate")
    elif given["problem"] is not None:
        refuse_ignored(context, of_run | of_evaluate, "with --problem")
    else:
        refuse_ignored(context, of_run, "with --evaluate")
    if given["experts"] is None:
        refuse_ignored(context, {"network"}, "without --experts")


def _loads(run: Run, phase: str | None, *, by_source: bool) -> StepLoads:
    """Loads of the phase that is asked for, or of the largest one."""
    from observatory.analysis.parallel.step_loads import step_loads
    from observatory.cli.output import say
    from observatory.errors import PlacementError
    from observatory.run.manifest import PHASES

    if phase not in (None, *PHASES, "all"):
        raise PlacementError(f"--phase {phase!r} is not known; expected one of {', '.join(PHASES)}, all")
    loads = step_loads(run, phase=None if phase == "all" else phase, by_source=by_source)
    if phase is not None or len(loads.phases) < 2:
        return loads
    phase = loads.largest_phase
    say(f"note: placed for {phase}, which has most assignments; give --phase for another, or all")
    return loads.of_phase(phase)


def _timer(
    run: Run, loads: StepLoads, ranks: int, rules: PlacementRules, experts: Path, network: Path | None
) -> StepTimer:
    from observatory.advice.mitigations.advise import check_shape
    from observatory.advice.placement_times import StepTimer
    from observatory.analysis.experts.cost import fit_experts
    from observatory.analysis.network import load_network
    from observatory.run.documents.expert_bench import load_expert_bench

    cost = fit_experts(load_expert_bench(experts), source=experts.name)
    check_shape(run, loads, cost)
    return StepTimer(loads, ranks, rules, cost, None if network is None else load_network(network))


def _solve(path: Path, out: Path | None, *, wide: bool, csv: bool, json: bool) -> None:
    from time import process_time

    from observatory.advice.placement_problem import layout_file, problem_document, problem_tables
    from observatory.analysis.parallel.balancing.problem import read_problem
    from observatory.analysis.parallel.balancing.solving import solve
    from observatory.cli.output import print_data, print_tables, say
    from observatory.run.documents.writing import write_json

    problem = read_problem(path)
    began_s = process_time()
    solution = solve(problem)
    document = problem_document(problem, solution, process_time() - began_s)
    tables = problem_tables(document)
    is_printed = print_data(document, tables, json=json, csv=csv)
    if out is not None:
        _, layers, experts = problem.load_SLE.shape
        write_json(out, layout_file(solution.slot_LPK, experts, tuple(range(layers))))
    if is_printed:
        return
    print_tables(tables if wide else tables[:1], wide=wide)
    from observatory.advice.words import problem_sentences

    for sentence in problem_sentences(document["verdict"]):
        say(sentence)
    if out is not None:
        say(f"placement written to {out}")


def _evaluate(
    command: str,
    runs: list[Path],
    generated_only: bool,
    timeout_s: float,
    out: Path | None,
    *,
    wide: bool,
    csv: bool,
    json: bool,
) -> None:
    from observatory.advice.words import evaluation_sentences
    from observatory.campaign.placement_evaluation import (
        all_trials,
        evaluate,
        evaluation_document,
        evaluation_tables,
    )
    from observatory.cli.output import print_data, print_tables, say
    from observatory.run.documents.writing import write_json

    trials = all_trials(runs, captured=not generated_only)
    judged = list(evaluate(command, trials, timeout_s=timeout_s, progress=say))
    document = evaluation_document(command, judged, seed=0)
    tables = evaluation_tables(document)
    is_printed = print_data(document, tables, json=json, csv=csv)
    if out is not None:
        write_json(out, document)
    if not is_printed:
        print_tables(tables, wide=wide)
        for sentence in evaluation_sentences(document):
            say(sentence)
    if not document["valid"]:
        raise typer.Exit(1)

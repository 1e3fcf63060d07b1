"""What a user gives to predict times with, read and held against the run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from observatory.advice.mitigations.setup import Setup, first_problem, load_setup, setup_of_run
from observatory.analysis.experts.cost import ExpertCost, fit_experts, of_hardware
from observatory.analysis.experts.run_experts import experts_of_run, shape_of_model
from observatory.analysis.hardware.profiles import load_profile
from observatory.analysis.network.network import NetworkModel, load_network
from observatory.analysis.network.own_fit import network_of_run
from observatory.errors import AdviceError
from observatory.run.documents.expert_bench import load_expert_bench

if TYPE_CHECKING:
    from observatory.run import Run


def setup_of(run: Run, topology: Path | None, *, ranks: int | None, gpus_per_node: int | None) -> Setup:
    """The set-up of today: a file, else the run's, with what the command line changes.

    Raises:
        AdviceError: a file that is none, or numbers that no machine has.
    """
    if topology is None:
        setup = setup_of_run(run.manifest.topology, dict(run.manifest.config), ranks=ranks)
    else:
        setup = load_setup(topology)
        if ranks is not None and ranks != setup.ranks:
            raise AdviceError(
                f"--ranks {ranks} and a topology of {setup.ranks} ranks", expected="the same, or one of both"
            )
    if gpus_per_node is None:
        return setup
    try:
        return Setup.model_validate({**setup.model_dump(), "gpus_per_node": gpus_per_node})
    except ValidationError as error:
        raise AdviceError(f"no set-up of {gpus_per_node} ranks on a node ({first_problem(error)})") from error


def exchange_model(run: Run, network: Path | None) -> tuple[NetworkModel | None, str | None]:
    """A network model and its name: of a file, else of the run's own exchanges; None without either.

    Raises:
        BenchmarkError: the file cannot be read.
    """
    if network is not None:
        return load_network(network), network.name
    own = network_of_run(run)
    return own, None if own is None else "the run's own exchanges"


def expert_cost(run: Run, bench: Path | None, hardware: str | None) -> ExpertCost:
    """Expert times of a benchmark, of published rates, or of the run's own spans.

    Raises:
        AdviceError: none is given, and the run has no spans of experts.
        BenchmarkError: a file that cannot be read or used.
    """
    if bench is not None:
        return fit_experts(load_expert_bench(bench), source=bench.name)
    if hardware is not None:
        return of_hardware(load_profile(hardware), shape_of_model(run.manifest.model))
    own = experts_of_run(run)
    if own is None:
        raise AdviceError(
            f"run {run.path} has no expert times of its own",
            expected="a run with exchanges (profile --ep), a benchmark or a hardware profile",
            remedy="give --experts or --hardware",
        )
    return fit_experts(own, source="the run's own spans")

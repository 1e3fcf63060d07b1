"""What a user gives to predict times with, read and held against the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from observatory.advice.mitigations.advise import advise_run
from observatory.advice.mitigations.document import advice_document
from observatory.advice.mitigations.setup import Setup, load_setup, setup_of_run
from observatory.analysis.experts.cost import ExpertCost, fit_experts, of_hardware
from observatory.analysis.experts.run_experts import experts_of_run, shape_of_model
from observatory.analysis.hardware.profiles import load_profile
from observatory.analysis.network.network import NetworkModel, load_network
from observatory.analysis.network.own_fit import network_of_run
from observatory.errors import AdviceError
from observatory.run.bounded import first_problem
from observatory.run.documents.expert_bench import load_expert_bench

if TYPE_CHECKING:
    from observatory.run import Run

_OWN_SPANS = "the run's own spans"


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
        if gpus_per_node not in (None, setup.gpus_per_node) and "gpus_per_node" in setup.model_fields_set:
            raise AdviceError(
                f"--gpus-per-node {gpus_per_node} and a topology of {setup.gpus_per_node}",
                expected="the same, or one of both",
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
    return fit_experts(own, source=_OWN_SPANS)


def advise_by_itself(run: Run, networks: Sequence[NetworkModel] = ()) -> dict[str, Any] | None:
    """What is advised for a run by the expert times that its own ranks took, as in the printed document.

    Args:
        run: an open run.
        networks: network models; the first that was measured on about as many ranks is taken, else one of the
            run's own exchanges.

    Returns:
        The part of the document about this run; None for runs whose ranks did not time their experts.

    Raises:
        ObservatoryError: it cannot be advised on.
    """
    ranks = run.manifest.topology.ep
    experts = experts_of_run(run) if ranks > 1 else None
    if experts is None:
        return None
    fitting = (
        network
        for network in networks
        if any(min(fit.domain.ranks) <= ranks <= max(fit.domain.ranks) for fit in network.fits)
    )
    given = next(fitting, None)
    network, source = (given, "the network model") if given is not None else exchange_model(run, None)
    advice = advise_run(
        run,
        setup_of(run, None, ranks=None, gpus_per_node=None),
        experts=fit_experts(experts, source=_OWN_SPANS),
        network=network,
        network_source=source,
    )
    document: dict[str, Any] = advice_document([(str(run.path), advice, run.problems)])["runs"][0]
    return document

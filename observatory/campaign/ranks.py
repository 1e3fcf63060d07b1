"""Profiles on several ranks: starting them here, or joining those that a launcher started.

Shapes: P ranks, B sequences per step and rank.

Each rank reads its own B of the P * B sequences, routes them, and sends them to the ranks that hold their
experts. One run directory takes the rows of all ranks.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue

from observatory.campaign.job import ProfileJob, profile_argv
from observatory.campaign.preflight import check_job
from observatory.errors import ExchangeError, PlacementError, PlaceTakenError, RunError, alike
from observatory.host.children import python_module
from observatory.host.ranks import RankOf, check_backend, find_rank
from observatory.run.manifest import Topology

if TYPE_CHECKING:
    from torch import nn

    from observatory.collectives.expert_parallel import ShardedModel
    from observatory.collectives.transport.protocol import Transport
    from observatory.probes.watch import Watch


def requested_ep(requested: int | None) -> int:
    """Ranks to spread the experts over; where a launcher has started several, they must be asked for.

    Raises:
        ExchangeError: the launcher's ranks would each run the whole model, and nothing says that it is meant.
    """
    where = find_rank()
    if requested is None and where.world > 1:
        raise alike(
            ExchangeError(
                f"{where.launcher} started {where.world} ranks, but --ep is not given; give --ep "
                f"{where.world} to spread the experts over them, or --ep 1 to run the whole model on each"
            )
        )
    return 1 if requested is None else requested


def refuse_ranks(command: str, *, each_node: bool = False) -> None:
    """Refuse to run a command of one process on several ranks, which would all do and write the same.

    Args:
        command: its name.
        each_node: it makes sense once on each node.

    Raises:
        ExchangeError: a launcher has started several ranks, or several on this node.
    """
    where = find_rank()
    if where.world > 1 and not (each_node and where.local_world == 1):
        fitting = "with one process on each node" if each_node else "without the launcher"
        raise alike(
            ExchangeError(
                f"{command} runs in one process, but {where.launcher} started {where.world}; run it {fitting}"
            )
        )


def needs_ranks(job: ProfileJob) -> bool:
    """Whether this process has to start the ranks: several are asked for, and no launcher has been here.

    Raises:
        ExchangeError: no such backend, or a launcher started another number of ranks than the job asks for.
    """
    check_backend(job.backend)
    where = find_rank()
    if job.ep > 1 and where.world not in (1, job.ep):
        raise alike(
            ExchangeError(
                f"--ep {job.ep} was asked for on {where.world} ranks of {where.launcher}; expected --ep "
                f"{where.world}, or as many ranks as --ep says"
            )
        )
    return job.ep > 1 and where.world == 1


def start_ranks(job: ProfileJob, out: Path, *, overwrite: bool = False) -> None:
    """Run the profile on ``job.ep`` processes of this machine.

    Args:
        job: what to profile.
        out: run directory to make.
        overwrite: replace an existing run, once the model is loaded on all ranks.

    Raises:
        CaptureError: ``rank_devices`` does not fit the ranks.
        ExchangeError: backend or nodes do not fit local ranks, or a rank failed, died or hung; names it.
        RunError: something is in the place of the run.
        ModelError, DataError, PlacementError: as of :func:`observatory.campaign.preflight.check_job`.
    """
    from observatory.collectives.layout import split_into_nodes
    from observatory.hpc.launch import start_local_ranks
    from observatory.run.replacing import check_free

    if job.backend == "mpi":
        raise ExchangeError(
            f"MPI starts its own ranks; run the same command under it: mpiexec -n {job.ep} observatory ..."
        )
    if job.ranks_per_node is not None:
        split_into_nodes(job.ep, job.ranks_per_node)
    job.own_devices(rank=0, ranks=job.ep)
    check_free(out, overwrite=overwrite)
    check_job(job)
    argv = [*profile_argv(job, out), *(["--force"] if overwrite else [])]
    start_local_ranks(python_module("observatory", *argv), job.ep)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """The ranks of a profile, as one of them sees them.

    Attributes:
        where: this rank.
        transport: joins the ranks; None when experts are not spread.
    """

    where: RankOf
    transport: Transport | None

    def agree_on_place(self, out: Path, *, overwrite: bool) -> str | None:
        """Make sure that the place of the run is free: rank 0 looks, and all receive the answer.

        Returns:
            The id of the run to be made, by which ranks distinguish it from an old one; None where they
            cannot agree on one because they exchange nothing.

        Raises:
            RunError: it is not free, on every rank.
        """
        from observatory.run.replacing import check_free

        if self.transport is None:
            if overwrite and self.where.world > 1:
                raise alike(
                    RunError(
                        f"--force was requested on {self.where.world} ranks that exchange nothing, so that "
                        f"none could distinguish the old run from the new one; remove {out} yourself, or "
                        "choose another place"
                    )
                )
            if self.where.rank == 0:
                check_free(out, overwrite=overwrite)
            return None
        problem: dict[str, JsonValue] | None = None
        if self.where.rank == 0:
            try:
                check_free(out, overwrite=overwrite)
            except RunError as error:
                is_taken = isinstance(error, PlaceTakenError)
                problem = {"text": error.what if is_taken else str(error), "is_taken": is_taken}
        (first, *_) = self.transport.all_gather_json({"problem": problem, "run_id": uuid.uuid4().hex})
        if first["problem"] is not None:
            kind = PlaceTakenError if first["problem"]["is_taken"] else RunError
            raise alike(kind(first["problem"]["text"]))
        return str(first["run_id"])

    def made(self, problem: str | None) -> str | None:
        """Why rank 0 could not make the run, on all ranks once it has tried; None where it is made."""
        assert self.transport is not None
        (first, *_) = self.transport.all_gather_json({"problem": problem})
        return None if first["problem"] is None else str(first["problem"])

    @contextlib.contextmanager
    def spread(self, model: nn.Module, job: ProfileJob) -> Iterator[ShardedModel | None]:
        """Spread the experts of the model over the ranks, inside the block.

        Raises:
            ModelError: a layer cannot be spread.
            PlacementError: the number of ranks does not fit the experts.
        """
        if self.transport is None:
            yield None
            return
        from observatory.collectives.expert_parallel import shard_experts

        with shard_experts(
            model,
            self.transport,
            placement=_placement(model, job.placement, self.transport.size),
            shares=_shares(model, job.placement),
            algorithm=job.algorithm,  # type: ignore[arg-type]  # shard_experts names the choices
            deduplicate=job.deduplicate,
        ) as sharded:
            yield sharded

    def topology(self, sharded: ShardedModel | None) -> Topology:
        """The ranks as the manifest states them."""
        if self.transport is None or sharded is None:
            return Topology(ranks=self.where.world)
        layout = self.transport.layout
        per_node = {len(layout.ranks_of_node(node)) for node in range(layout.nodes)}
        return Topology(
            ranks=self.where.world,
            ep=self.where.world,
            gpus_per_node=per_node.pop() if len(per_node) == 1 else None,
            node_of_rank=self.transport.node_of_P,
            placement=sharded.placement(),
        )

    @contextlib.contextmanager
    def aligned(self, watch: Watch) -> Iterator[None]:
        """Align the ranks' time bases before and after the block; only several hosts exchange much."""
        if self.transport is None:
            yield
            return
        from observatory.collectives.bench.pairs import align_transport
        from observatory.probes.alignment import with_drift

        first = align_transport(self.transport)
        watch.set_clock(first.record())
        yield
        watch.set_clock(with_drift(first, align_transport(self.transport)).record())

    def report(self, sharded: ShardedModel | None, watch: Watch) -> None:
        """Report phases and exchanges to the watch."""
        if sharded is not None:
            sharded.report_to(watch.exchange_sink)


def _placement(model: nn.Module, placement: str, ranks: int) -> dict[int, list[tuple[int, ...]]] | None:
    """Ranks that hold each expert, by layer; None for contiguous blocks."""
    from observatory.analysis.parallel.placement import load_placement, round_robin
    from observatory.probes.routing.discover import find_sites

    if placement == "linear":
        return None
    specs = [site.spec for site in find_sites(model)]
    try:
        if placement == "round-robin":
            return {
                spec.layer: [(int(rank),) for rank in round_robin(spec.experts, ranks).rank_of_E]
                for spec in specs
            }
        file = load_placement(placement)
        return {spec.layer: file.holders(spec.layer, experts=spec.experts, ep=ranks) for spec in specs}
    except PlacementError as error:
        raise alike(error) from None


def _shares(model: nn.Module, placement: str) -> dict[int, tuple[tuple[float, ...], ...]] | None:
    """Shares of the holders of each expert, by layer; None where the placement states none."""
    from observatory.analysis.parallel.placement import load_placement
    from observatory.probes.routing.discover import find_sites

    if placement in ("linear", "round-robin"):
        return None
    file = load_placement(placement)
    by_layer = {site.spec.layer: file.shares_of(site.spec.layer) for site in find_sites(model)}
    return {layer: shares for layer, shares in by_layer.items() if shares is not None} or None


@contextlib.contextmanager
def join_ranks(job: ProfileJob) -> Iterator[Ranks]:
    """Join the other ranks, if there are any.

    Raises:
        ExchangeError: no such backend; a rank does not join, named; or the ranks were given different jobs.
        CaptureError: launchers disagree.
    """
    where = find_rank()
    check_backend(job.backend)
    if job.ep == 1:
        yield Ranks(where=where, transport=None)
        return
    from observatory.collectives.transport.open import open_transport

    with open_transport(
        job.backend,  # type: ignore[arg-type]  # open_transport names the choices
        ranks_per_node=job.ranks_per_node,
        timeout_s=job.exchange_timeout_s,
    ) as transport:
        from observatory.collectives.transport.base import agree

        # Each rank may have a device of its own; the launcher has seen to their number.
        agree(transport, {name: value for name, value in asdict(job).items() if name not in ("device", "ep")})
        yield Ranks(where=where, transport=transport)

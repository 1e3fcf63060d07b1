"""The machine and the set-up that changes are compared on, from a TOML file or from the run itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, ValidationError

from observatory.analysis.parallel.topology import MAX_RANKS, ParallelTopology
from observatory.errors import AdviceError
from observatory.run.bounded import first_problem, read_toml
from observatory.run.exchange_algorithms import Algorithm
from observatory.run.manifest import Topology
from observatory.run.records import Record

_MOST_TOML_BYTES = 1 << 20
#: What the dispatchers of this package announce to each rank: rows, layer and call.
_ANNOUNCED = 24
_Bytes = Annotated[float, Field(gt=0.0, le=1e18)]


class Setup(Record):
    """Where the experts run, and how tokens get there.

    Attributes:
        ranks: P, expert-parallel ranks.
        gpus_per_node: ranks of each node; the last may have fewer.
        algorithm: of the exchanges.
        deduplicate: whether a token is sent once per destination rank.
        placement: ``linear``, ``round-robin``, ``recorded``, or a placement file; None for that of the run.
        announce_bytes: what each rank announces to each other before it sends rows; 0 where nothing is.
        memory_bytes: of one rank's device; None where it is not known.
        kv_bytes_per_token: bytes of the key-value cache for one token of context, all layers; None likewise.
        move_bytes_per_s: rate at which weights of experts reach a rank; None for that of the network model.
        host_bytes_per_s: rate at which weights are fetched from the host's memory; None where not known.
        stall_s: how long the program stands still for a change of the placement, beyond the transfer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    ranks: Annotated[int, Field(ge=2, le=MAX_RANKS)]
    gpus_per_node: Annotated[int, Field(ge=1, le=MAX_RANKS)] = 8
    algorithm: Algorithm = "flat"
    deduplicate: bool = False
    placement: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    announce_bytes: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    memory_bytes: _Bytes | None = None
    kv_bytes_per_token: _Bytes | None = None
    move_bytes_per_s: _Bytes | None = None
    host_bytes_per_s: _Bytes | None = None
    stall_s: Annotated[float, Field(ge=0.0, le=1e6)] = 0.0

    @property
    def node_of_P(self) -> tuple[int, ...]:
        """Node of each rank."""
        return node_of_ranks(self.ranks, self.gpus_per_node)

    @property
    def nodes(self) -> int:
        """Nodes that hold a rank."""
        return -(-self.ranks // self.gpus_per_node)


def node_of_ranks(ranks: int, gpus_per_node: int) -> tuple[int, ...]:
    """Node of each rank, nodes filled one after another."""
    topology = ParallelTopology(ep=ranks, gpus_per_node=gpus_per_node)
    return tuple(topology.node_of_rank_R.tolist())


def load_setup(path: Path | str) -> Setup:
    """Read a topology file (docs/advise.md).

    Raises:
        AdviceError: it cannot be read, is no TOML, or says something that no machine has.
    """
    return read_toml(
        Path(path),
        Setup,
        most_bytes=_MOST_TOML_BYTES,
        failure=AdviceError,
        what="topology",
        remedy="docs/advise.md has its keys, such as ranks = 8",
    )


def setup_of_run(topology: Topology, config: dict[str, object], *, ranks: int | None) -> Setup:
    """The set-up that a run had; at another number of ranks, what of it still holds.

    Raises:
        AdviceError: the run was on one rank and no number is given.
    """
    wanted = ranks or topology.ep
    if wanted < 2:
        raise AdviceError(
            "the run had all experts on one rank, and no set-up is given; "
            "expected expert-parallel ranks: give --ranks, or --topology"
        )
    algorithm = config.get("algorithm")
    known: Algorithm = algorithm if algorithm in ("flat", "hierarchical", "gather") else "flat"
    try:
        return Setup(
            ranks=wanted,
            gpus_per_node=min((topology.gpus_per_node if wanted == topology.ep else None) or 8, wanted),
            algorithm=known,
            deduplicate=config.get("deduplicate") is True,
            announce_bytes=_ANNOUNCED if algorithm == known else 0,
        )
    except ValidationError as error:
        raise AdviceError(f"no set-up of {wanted} ranks ({first_problem(error)})") from error

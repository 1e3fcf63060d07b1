"""Which rank holds which expert.

Shapes: E experts, R expert-parallel ranks.

A placement file is JSON: ``{"expert_to_rank": [0, 0, 1, ...]}`` for all layers, or
``{"layers": {"0": [...], "1": [...]}}`` for each layer its own; ``"ranks"`` states R when the last ranks
hold no expert. Ranks may hold different numbers of experts; results then say so. Instead of a rank there may
be a list of ranks, the holders of an expert that is replicated; the lowest is its home.

Holders share the load of their expert equally, unless ``"shares"`` gives the share of each: a list like that
of the ranks, with a list of numbers that add up to 1 for each expert of several holders.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from observatory.analysis.parallel.topology import MAX_RANKS
from observatory.errors import PlacementError
from observatory.run.bounded import MAX_DOCUMENT_BYTES, parse_json, read_at_most

#: Shares of an expert add up to 1 within this.
_SHARE_ERROR = 1e-6

#: Placements by name; ``recorded`` is the run's own, ``auto`` that at its own degree and linear at others.
PLACEMENT_NAMES = ("auto", "linear", "round-robin", "recorded")

#: What a user may ask for: a placement by name, or the path of a placement file.
PlacementChoice = Literal["auto", "linear", "round-robin", "recorded"] | str | Path


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Placement:
    """The rank of every expert of one layer.

    Attributes:
        name: ``linear``, ``round-robin``, or the name of the file.
        ep: R, ranks.
        rank_of_E: rank that holds each expert, its home where it has replicas, (E,), values 0..R-1.
        holders_E: all ranks that hold each expert; None where no expert has replicas.
        shares_E: share of its expert's load for each of these ranks; None: all alike.
    """

    name: str
    ep: int
    rank_of_E: NDArray[np.int64]
    holders_E: tuple[tuple[int, ...], ...] | None = None
    shares_E: tuple[tuple[float, ...], ...] | None = None

    @property
    def experts_per_rank_R(self) -> NDArray[np.int64]:
        """Experts each rank holds, replicas included, (R,)."""
        held = self.rank_of_E if self.holders_E is None else np.concatenate(self.holders_E).astype(np.int64)
        return np.bincount(held, minlength=self.ep).astype(np.int64)

    @property
    def even(self) -> bool:
        """Whether all ranks hold equally many experts, and no expert has replicas."""
        held_R = self.experts_per_rank_R
        return self.holders_E is None and bool(held_R.min() == held_R.max())


def linear(experts: int, ep: int) -> Placement:
    """Contiguous blocks of E / R experts: what most frameworks do.

    Raises:
        PlacementError: R does not divide E.
    """
    _check_divides(experts, ep)
    return Placement(name="linear", ep=ep, rank_of_E=np.arange(experts, dtype=np.int64) // (experts // ep))


def round_robin(experts: int, ep: int) -> Placement:
    """Expert e on rank e mod R.

    Raises:
        PlacementError: R does not divide E.
    """
    _check_divides(experts, ep)
    return Placement(name="round-robin", ep=ep, rank_of_E=np.arange(experts, dtype=np.int64) % ep)


_Rank = Annotated[int, Field(ge=0, lt=MAX_RANKS)]
_Holders = Annotated[list[_Rank], Field(min_length=1, max_length=MAX_RANKS)]
_Ranks = Annotated[list[_Rank | _Holders], Field(min_length=1, max_length=65536)]
_Share = Annotated[float, Field(ge=0, le=1, strict=False)]
_Shares = Annotated[
    list[_Share | Annotated[list[_Share], Field(min_length=1, max_length=MAX_RANKS)]],
    Field(min_length=1, max_length=65536),
]
_Layer = Annotated[str, Field(pattern=r"^\d{1,6}$")]


class PlacementFile(BaseModel):
    """A validated placement file.

    Attributes:
        name: name of the file, without its folder.
        expert_to_rank: rank of each expert in every layer, or a list of ranks; None when layers differ.
        layers: the same per layer index; None when all layers agree.
        ranks: R; None for the highest rank plus one.
        shares: of the holders of each expert, in every layer or per layer like the ranks; None: equal shares.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = "file"
    expert_to_rank: _Ranks | None = None
    layers: dict[_Layer, _Ranks] | None = None
    ranks: Annotated[int, Field(ge=1, le=MAX_RANKS)] | None = None
    shares: _Shares | dict[_Layer, _Shares] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> PlacementFile:
        if (self.expert_to_rank is None) == (self.layers is None) or self.layers == {}:
            raise ValueError('give either "expert_to_rank" or "layers", and not an empty one')
        if self.ranks is not None and self.highest_rank >= self.ranks:
            raise ValueError(f"rank {self.highest_rank} is named, but ranks is {self.ranks}")
        self._check_shares()
        return self

    def _check_shares(self) -> None:
        if self.shares is None:
            return
        if isinstance(self.shares, dict) != (self.layers is not None):
            raise ValueError("shares are given in another form than the ranks")
        ranks_by = self.layers if self.layers is not None else {"all": self.expert_to_rank or []}
        shares_by = self.shares if isinstance(self.shares, dict) else {"all": self.shares}
        for layer, shares in shares_by.items():
            ranks = ranks_by.get(layer)
            if ranks is None or list(map(len, map(_holders, ranks))) != list(map(len, map(_parts, shares))):
                raise ValueError(f"shares of layer {layer} do not name one for each holder of each expert")
            if any(abs(sum(_parts(entry)) - 1) > _SHARE_ERROR for entry in shares):
                raise ValueError(f"shares of an expert of layer {layer} do not add up to 1")

    @property
    def highest_rank(self) -> int:
        """Largest rank that holds an expert anywhere."""
        lists = [self.expert_to_rank] if self.expert_to_rank else list((self.layers or {}).values())
        return max(max(_holders(entry)) for ranks in lists for entry in ranks)

    def for_layer(self, layer: int, *, experts: int, ep: int) -> Placement:
        """The placement of one layer.

        Raises:
            PlacementError: the file has no such layer, another number of experts, or another R.
        """
        holders_E = tuple(self.holders(layer, experts=experts, ep=ep))
        return Placement(
            name=self.name,
            ep=ep,
            rank_of_E=np.array([min(ranks) for ranks in holders_E], dtype=np.int64),
            holders_E=holders_E if any(len(ranks) > 1 for ranks in holders_E) else None,
            shares_E=self.shares_of(layer),
        )

    def shares_of(self, layer: int) -> tuple[tuple[float, ...], ...] | None:
        """Shares of the holders of each expert of one layer; None: all alike."""
        shares = self.shares
        if isinstance(shares, dict):
            shares = {int(key): value for key, value in shares.items()}.get(layer)
        if shares is None:
            return None
        return tuple(tuple(part / sum(_parts(entry)) for part in _parts(entry)) for entry in shares)

    def holders(self, layer: int, *, experts: int, ep: int) -> list[tuple[int, ...]]:
        """Ranks that hold each expert of one layer.

        Raises:
            PlacementError: the file has no such layer, another number of experts, or another R.
        """
        ranks = self.ranks or self.highest_rank + 1
        if ranks != ep:
            raise PlacementError(
                f"placement {self.name} is for {ranks} ranks, not {ep}; expected one for {ep} ranks"
            )
        entries = self.expert_to_rank
        if self.layers is not None:
            by_layer = {int(key): value for key, value in self.layers.items()}
            if layer not in by_layer:
                raise PlacementError(
                    f"placement {self.name} has no layer {layer}; expected one list per MoE layer"
                )
            entries = by_layer[layer]
        assert entries is not None
        if len(entries) != experts:
            raise PlacementError(
                f"placement {self.name} places {len(entries)} experts, but layer {layer} has {experts}; "
                "list one rank per routed expert"
            )
        return [_holders(entry) for entry in entries]


def _holders(entry: int | list[int]) -> tuple[int, ...]:
    return (entry,) if isinstance(entry, int) else tuple(entry)


def _parts(entry: float | list[float]) -> tuple[float, ...]:
    return tuple(entry) if isinstance(entry, list) else (entry,)


def load_placement(path: Path | str) -> PlacementFile:
    """Read and check a placement file of at most 16 MiB.

    Raises:
        PlacementError: not readable, too large, not JSON of the described form.
    """
    path = Path(path)
    try:
        content = read_at_most(path, MAX_DOCUMENT_BYTES)
    except OSError as error:
        raise PlacementError(
            f"placement {path} cannot be read ({error.strerror}); give linear, round-robin or a file"
        ) from error
    except ValueError as error:  # a name no file can have
        raise PlacementError(
            f"placement {str(path)!r} is no file name; give linear, round-robin or a file"
        ) from error
    if content is None:
        raise PlacementError(
            f"placement {path} is over {MAX_DOCUMENT_BYTES >> 20} MiB; expected one rank per expert"
        )
    try:
        return PlacementFile.model_validate(parse_json(content)).model_copy(update={"name": path.name})
    except ValueError as error:
        reason = str(error)[:200]
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            reason = f"{where + ': ' if where else ''}{first['msg']}"
        raise PlacementError(
            f"placement {path} is not valid ({reason}); "
            'expected {"expert_to_rank": [0, 0, 1, ...]} or {"layers": {"0": [...]}}'
        ) from error


def _check_divides(experts: int, ep: int) -> None:
    if ep < 1 or experts % ep:
        fitting = ", ".join(str(degree) for degree in range(1, experts + 1) if experts % degree == 0)
        raise PlacementError(f"EP {ep} does not divide {experts} experts; degrees that fit: {fitting}")

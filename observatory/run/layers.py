"""The MoE layers of a run, joined from what its ranks state, and the ranks that contradict each other.

Ranks may hold the same layers (data and expert parallelism) or different ones (pipeline stages). Rows of
several ranks add up by layer number, so a number must mean one layer on all of them: the same module, as
many experts, as many per token, and a router with the same weights. A rank that holds something else under
a number that an earlier rank uses is left out as a whole, since its other numbers are then no better.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from observatory.run.files import one_line
from observatory.run.manifest import Manifest, MoeLayerSpec, RankLayer


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinedLayers:
    """MoE layers of all ranks.

    Attributes:
        moe_layers: the manifest's layers and those that only other ranks hold; in order of their numbers
            where there are any such.
        layers_of_rank: layer numbers by rank, of the ranks that state their layers and fit the others.
        contradictions: why a rank is left out, one sentence, by rank.
    """

    moe_layers: tuple[MoeLayerSpec, ...]
    layers_of_rank: Mapping[int, frozenset[int]]
    contradictions: Mapping[int, str]

    def holds(self, rank: int, layer: int) -> bool:
        """Whether a rank may have rows of a layer; False where it states its layers without this one."""
        layers = self.layers_of_rank.get(rank)
        return layers is None or layer in layers


@dataclass(frozen=True, slots=True)
class _Known:
    """A layer, who stated it first, and the digests of the first rank that stated any, with that rank."""

    spec: MoeLayerSpec
    rank: int
    digests: frozenset[str] = frozenset()
    digests_of: int = 0


def join_layers(manifest: Manifest) -> JoinedLayers:
    """Join the layers that the ranks of a manifest state, in the order of the ranks.

    Rank 0's layers are the manifest's own. Ranks that state none are taken to hold what the others hold.
    """
    known = {spec.layer: _Known(spec, 0) for spec in manifest.model.moe_layers}
    layers_of_rank: dict[int, frozenset[int]] = {}
    contradictions: dict[int, str] = {}
    for status in sorted(manifest.ranks, key=lambda status: status.rank):
        layers = status.moe_layers
        if layers is None or status.rank >= manifest.topology.ranks:
            continue
        differing = [
            (item.layer, difference)
            for item in layers
            if item.layer in known and (difference := _difference(item, known[item.layer])) is not None
        ]
        if differing:
            contradictions[status.rank] = _sentence(status.rank, differing)
            continue
        layers_of_rank[status.rank] = frozenset(item.layer for item in layers)
        for item in layers:
            known[item.layer] = _with(known.get(item.layer), item, status.rank)
    own = tuple(spec.layer for spec in manifest.model.moe_layers)
    return JoinedLayers(
        moe_layers=manifest.model.moe_layers
        if known.keys() == set(own)
        else tuple(known[layer].spec for layer in sorted(known)),
        layers_of_rank=layers_of_rank,
        contradictions=contradictions,
    )


def _with(known: _Known | None, item: RankLayer, rank: int) -> _Known:
    """What is known of a layer after a rank that fits has stated it."""
    if known is None:
        spec = MoeLayerSpec.model_validate(item.model_dump(exclude={"router_digests"}))
        return _Known(spec, rank, frozenset(item.router_digests), rank)
    if not known.digests:
        return _Known(known.spec, known.rank, frozenset(item.router_digests), rank)
    return known


def _difference(item: RankLayer, known: _Known) -> tuple[str, int] | None:
    """How a layer differs from the known one of its number, and which rank holds that; None if it fits."""
    spec = known.spec
    if item.experts != spec.experts:
        return f"{item.experts} experts, not {spec.experts}", known.rank
    if item.top_k != spec.top_k:
        return f"{_top_k(item)}, not {_top_k(spec)}", known.rank
    if item.module != spec.module:
        return f"module {one_line(item.module, 80)}, not {one_line(spec.module, 80)}", known.rank
    if item.router_digests and known.digests and known.digests.isdisjoint(item.router_digests):
        return f"other router weights in {one_line(spec.module, 80)}", known.digests_of
    return None


def _top_k(spec: MoeLayerSpec) -> str:
    return "a varying top-k" if spec.top_k is None else f"top-{spec.top_k}"


def _sentence(rank: int, differing: list[tuple[int, tuple[str, int]]]) -> str:
    layer, (what, other) = differing[0]
    more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
    return (
        f"rank {rank} holds another layer {layer}{more} than rank {other}: {what}; its routing rows were "
        "left out, number layers through all pipeline stages and capture each model in a run of its own"
    )

"""Algorithms by name."""

from __future__ import annotations

from typing import Literal, get_args

from observatory.collectives.autograd import Exchanger
from observatory.collectives.dispatch.base import Dispatcher, LocalExperts
from observatory.collectives.dispatch.gather import GatherDispatcher
from observatory.collectives.dispatch.plan import ExpertMap
from observatory.collectives.dispatch.steps import FlatDispatcher, HierarchicalDispatcher
from observatory.errors import ExchangeError

Algorithm = Literal["flat", "hierarchical", "gather"]
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)

_CLASSES: dict[Algorithm, type[Dispatcher]] = {
    "flat": FlatDispatcher,
    "hierarchical": HierarchicalDispatcher,
    "gather": GatherDispatcher,
}


def make_dispatcher(
    algorithm: Algorithm,
    exchanger: Exchanger,
    experts: ExpertMap,
    local: LocalExperts,
    *,
    layer: int | None = None,
    deduplicate: bool = False,
) -> Dispatcher:
    """The dispatcher of one layer.

    Raises:
        ExchangeError: no such algorithm, or the nodes do not fit it.
    """
    if algorithm not in _CLASSES:
        raise ExchangeError(f"algorithm {algorithm!r} does not exist; expected {', '.join(ALGORITHMS)}")
    if algorithm == "hierarchical":
        exchanger.transport.layout.members("across")
    return _CLASSES[algorithm](exchanger, experts, local, layer=layer, deduplicate=deduplicate)

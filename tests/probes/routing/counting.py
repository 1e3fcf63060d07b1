"""Counting what the readers of a model's sites say, with plain hooks and nothing of the probe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from observatory.probes.routing.sites import RoutingDecision, RoutingSite

HOST_READS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount", "item", "_to_copy"}


class NoHostReads(TorchDispatchMode):
    """Fails on operations that make the host wait for the device or depend on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.rpartition(":")[2]
        assert name not in HOST_READS, f"a reader called {name}"
        return func(*args, **(kwargs or {}))


def loads_of(decision: RoutingDecision, experts: int) -> torch.Tensor:
    """Assignments per expert of one decision, (E,)."""
    if decision.expert_ids is not None:
        ids = decision.expert_ids
        if decision.token_mask is not None:
            ids = ids[decision.token_mask]
        ids = ids.reshape(-1)
        return torch.bincount(ids[(ids >= 0) & (ids < experts)], minlength=experts)
    assert decision.routing_map is not None
    chosen = decision.routing_map != 0
    if decision.token_mask is not None:
        chosen = chosen[decision.token_mask]
    return chosen.sum(dim=0)


@contextmanager
def read_loads(sites: Sequence[RoutingSite]) -> Iterator[dict[int, tuple[list[int], int]]]:
    """Layer -> (loads, tokens) summed over the calls made inside the block, through the sites' readers."""
    seen: dict[int, tuple[list[int], int]] = {s.spec.layer: ([0] * s.spec.experts, 0) for s in sites}
    handles = []

    def note(site: RoutingSite, decision: RoutingDecision | None) -> None:
        if decision is not None:
            loads, tokens = seen[site.spec.layer]
            new = loads_of(decision, site.spec.experts).tolist()
            added = [a + b for a, b in zip(loads, new, strict=True)]
            seen[site.spec.layer] = (added, tokens + (decision.tokens or 0))

    for site in sites:

        def before(module: nn.Module, args: Any, kwargs: Any, site: RoutingSite = site) -> None:
            with NoHostReads():
                decision = site.read(module, args, kwargs, None)
            note(site, decision)

        def after(module: nn.Module, args: Any, kwargs: Any, out: Any, site: RoutingSite = site) -> None:
            with NoHostReads():
                decision = site.read(module, args, kwargs, out)
            note(site, decision)

        if site.when == "before":
            handles.append(site.module.register_forward_pre_hook(before, with_kwargs=True))
        else:
            handles.append(site.module.register_forward_hook(after, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()

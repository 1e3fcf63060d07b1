"""Two independent ways to count assignments: with the readers, and from the arithmetic that experts do.

``read_loads`` hooks the sites and counts what their readers say. ``ComputedLoads`` never looks at ids: it
watches matrix products and counts the rows that meet each expert's slice of the weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from probes.routing.sites import RoutingDecision, RoutingSite

PRODUCTS = {"linear", "matmul", "__matmul__", "mm", "bmm", "grouped_mm", "_grouped_mm"}


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
            note(site, site.read(module, args, kwargs, None))

        def after(module: nn.Module, args: Any, kwargs: Any, out: Any, site: RoutingSite = site) -> None:
            note(site, site.read(module, args, kwargs, out))

        if site.when == "before":
            handles.append(site.module.register_forward_pre_hook(before, with_kwargs=True))
        else:
            handles.append(site.module.register_forward_hook(after, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class ComputedLoads(TorchFunctionMode):
    """Counts rows multiplied with each expert's part of a stacked weight, (parameter name -> expert -> rows)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.rows: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        self._model = model
        self._owners = {
            p.untyped_storage().data_ptr(): (n, p) for n, p in model.named_parameters() if p.ndim > 1
        }
        self._children: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in PRODUCTS:
            tensors = [a for a in args if isinstance(a, torch.Tensor)]
            self._note(tensors[0], tensors[1], (kwargs or {}).get("offs"))
        return func(*args, **(kwargs or {}))

    def _note(self, rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor | None) -> None:
        owner = self._owners.get(weight.untyped_storage().data_ptr())
        if owner is None:
            return
        name, stack = owner
        if offsets is not None:  # grouped product: rows of expert e end at offsets[e]
            for expert, count in enumerate(torch.diff(offsets, prepend=offsets.new_zeros(1)).tolist()):
                self.rows[name][expert] += count
        elif weight.numel() == stack.numel() and rows.ndim == 3 and weight.ndim == 3:  # all experts at once
            for expert, count in enumerate((rows != 0).any(dim=-1).sum(dim=-1).tolist()):
                self.rows[name][expert] += count
        elif weight.numel() < stack.numel():
            self.rows[name][weight.storage_offset() // weight.numel()] += rows.numel() // rows.shape[-1]

    def of(self, site: RoutingSite) -> list[int] | None:
        """Rows per expert of one site's layer, (E,); None when its experts are not stacked or did not run."""
        block = site.spec.module.rpartition(".")[0]
        for name, rows in self.rows.items():
            if name.startswith(f"{block}.") or name.startswith("experts"):
                return [rows.get(expert, 0) for expert in range(site.spec.experts)]
        return None

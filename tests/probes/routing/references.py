"""Loads counted without looking at what a reader looks at.

``ComputedLoads`` watches the matrix products of the experts and counts the rows that meet each expert's
weights. Where the arithmetic does not tell (lookups, skipped experts that are computed all the same),
``RecomputedLoads`` starts from the router's raw scores and chooses again by brute force.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from observatory.probes.routing.sites import RoutingSite

_PRODUCTS = {"linear", "matmul", "__matmul__", "mm", "bmm", "grouped_mm", "_grouped_mm"}
_ONE_EXPERT = re.compile(r"(.*experts)\.(?:expert_)?(\d+)\.(.+)")


class ComputedLoads(TorchFunctionMode):
    """Rows multiplied with each expert's own weights, or with its slice of stacked weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._rows: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        weights = [(n, p) for n, p in model.named_parameters() if p.ndim > 1]
        self._owners = {p.untyped_storage().data_ptr(): (n, p.numel()) for n, p in weights}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _PRODUCTS:
            tensors = [a for a in args if isinstance(a, torch.Tensor)]
            self._note(tensors[0], tensors[1], (kwargs or {}).get("offs"))
        return func(*args, **(kwargs or {}))

    def _note(self, rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor | None) -> None:
        name, size = self._owners.get(weight.untyped_storage().data_ptr(), ("", 0))
        count = rows.numel() // rows.shape[-1]
        if not name:
            return
        if offsets is not None:  # grouped product: the rows of expert e end at offsets[e]
            self._add(name, torch.diff(offsets, prepend=offsets.new_zeros(1)).tolist())
        elif weight.numel() < size:  # one slice of a stack
            self._rows[name][weight.storage_offset() // weight.numel()] += count
        elif rows.ndim == weight.ndim == 3:  # every expert gets every token, zeroed where not chosen
            self._add(name, (rows != 0).any(dim=-1).sum(dim=-1).tolist())
        elif (own := _ONE_EXPERT.fullmatch(name)) is not None:  # a module per expert
            self._rows[f"{own[1]}.*.{own[3]}"][int(own[2])] += count

    def _add(self, name: str, counts: list[int]) -> None:
        for expert, count in enumerate(counts):
            self._rows[name][expert] += count

    def of(self, site: RoutingSite) -> list[int]:
        """Rows per expert of one site's layer, (E,); zeros when its experts did not run."""
        block = site.spec.module.rpartition(".")[0]
        seen = next(
            (r for name, r in self._rows.items() if name.startswith(f"{block}." if block else "")), {}
        )
        return [seen.get(expert, 0) for expert in range(site.spec.experts)]


class RecomputedLoads:
    """Experts chosen again from the raw scores of a module inside each MoE block."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[RoutingSite],
        scorer: str,
        choose: Callable[[nn.Module, torch.Tensor], torch.Tensor],
    ) -> None:
        """Watch ``scorer`` (path inside the block); ``choose`` makes expert ids of (block, scores)."""
        self._loads: dict[str, torch.Tensor] = {}
        self._model, self._sites, self._scorer, self._choose = model, sites, scorer, choose
        self._handles: list[Any] = []

    def __enter__(self) -> RecomputedLoads:
        for site in self._sites:
            block = self._model.get_submodule(site.spec.module.rpartition(".")[0])

            def note(
                _m: Any, _a: Any, scores: Any, site: RoutingSite = site, block: nn.Module = block
            ) -> None:
                ids = self._choose(block, scores).reshape(-1)
                counts = torch.bincount(ids, minlength=site.spec.experts)[: site.spec.experts]
                self._loads[site.spec.module] = self._loads.get(site.spec.module, 0) + counts

            self._handles.append(block.get_submodule(self._scorer).register_forward_hook(note))
        return self

    def __exit__(self, *_error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def of(self, site: RoutingSite) -> list[int]:
        """Loads of one site's layer, (E,)."""
        return [int(n) for n in self._loads[site.spec.module]]


def product_keys(block: nn.Module, scores: torch.Tensor) -> torch.Tensor:
    """Doge: the K best sums of one row key and one column key, over all pairs."""
    rows, columns = scores.reshape(2, -1, scores.shape[-1] // 2)
    every_pair = (rows[:, :, None] + columns[:, None, :]).flatten(1)
    return every_pair.topk(block.top_k).indices


def best_with_skip(block: nn.Module, scores: torch.Tensor) -> torch.Tensor:
    """Zaya: the best of all classes after balancing; the last class is "no expert"."""
    return (scores.softmax(-1) + block.gate.balancing_biases).argmax(-1)


def two_best(_block: nn.Module, scores: torch.Tensor) -> torch.Tensor:
    """NLLB: both experts of every token (nothing is over capacity in evaluation)."""
    return torch.sort(scores, dim=-1, descending=True).indices[..., :2]

"""What takes the place of compiled code, and of packages that a framework imports and does not need here."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch


class _Absent(MetaPathFinder, Loader):
    """Gives an empty module, whose every attribute is a mock, for packages that are not installed."""

    def __init__(self, packages: Sequence[str]) -> None:
        self._packages = tuple(packages)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:  # noqa: ARG002
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in self._packages else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name)
        module.__getattr__ = _mock  # type: ignore[method-assign]
        return module

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__version__"] = "0"


class _AnyAttribute(type):
    """A class with every attribute."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


def _mock(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    if name.islower():
        return MagicMock()
    return _AnyAttribute(name, (), {"__init__": lambda *_, **__: None})  # classes are inherited from


def pretend_there_is(*packages: str) -> None:
    """Let these packages be imported, empty where they are not installed."""
    sys.meta_path.append(_Absent([name for name in packages if importlib.util.find_spec(name) is None]))


class PermutingKernels:
    """MegaBlocks' kernels in plain torch, which OLMo-core has taken over: rows sorted by expert, and back.

    Shapes: T tokens, K assignments per token, E experts, C slots per expert, H hidden size. ``indices``
    (T * K,) are assignments in the order of their experts, ``bins`` (E,) the ends of these.

    Attributes:
        kept: assignments per expert that found room, of each ``binned_gather``.
    """

    def __init__(self) -> None:
        self.kept: list[list[int]] = []

    def gather(
        self, x: Any, indices: Any, _bin_ids: Any, weights: Any, _bins: Any, top_k: int
    ) -> torch.Tensor:
        return _scaled(x[indices.long() // top_k], weights, indices.long())

    def scatter(
        self, x: Any, indices: Any, _bin_ids: Any, weights: Any, _bins: Any, top_k: int
    ) -> torch.Tensor:
        out: torch.Tensor = x.new_zeros(len(indices) // top_k, x.shape[-1])
        return out.index_add_(0, indices.long() // top_k, _scaled(x, weights, indices.long()))

    def scatter_wgrad(
        self, x: Any, grad: Any, indices: Any, _bin_ids: Any, _bins: Any, top_k: int
    ) -> torch.Tensor:
        out: torch.Tensor = x.new_zeros(len(indices))
        return out.index_copy_(0, indices.long(), (x * grad[indices.long() // top_k]).sum(-1))

    def binned_gather(
        self, x: Any, indices: Any, weights: Any, bins: Any, capacity: int, top_k: int
    ) -> torch.Tensor:
        out: torch.Tensor = x.new_zeros(len(bins), capacity, x.shape[-1])
        kept = _kept(indices, bins, capacity)
        for expert, rows in enumerate(kept):
            out[expert, : len(rows)] = _scaled(x[rows // top_k], weights, rows)
        self.kept.append([len(rows) for rows in kept])
        return out

    def binned_scatter(self, x: Any, indices: Any, weights: Any, bins: Any, top_k: int) -> torch.Tensor:
        out: torch.Tensor = x.new_zeros(len(indices) // top_k, x.shape[-1])
        for expert, rows in enumerate(_kept(indices, bins, x.shape[1])):
            out.index_add_(0, rows // top_k, _scaled(x[expert, : len(rows)], weights, rows))
        return out

    def binned_scatter_wgrad(self, x: Any, grad: Any, indices: Any, bins: Any, top_k: int) -> torch.Tensor:
        out: torch.Tensor = x.new_zeros(len(indices))
        for expert, rows in enumerate(_kept(indices, bins, x.shape[1])):
            out[rows] = (x[expert, : len(rows)] * grad[rows // top_k]).sum(-1)
        return out


def _scaled(rows: torch.Tensor, weights: torch.Tensor | None, of: torch.Tensor) -> torch.Tensor:
    return rows if weights is None else rows * weights[of][:, None]


def _kept(indices: torch.Tensor, bins: torch.Tensor, capacity: int) -> list[torch.Tensor]:
    """The assignments of each expert that fit."""
    ends = [0, *(int(end) for end in bins)]
    return [indices[a : min(b, a + capacity)].long() for a, b in itertools.pairwise(ends)]


class SortingOperators(ModuleType):
    """MegaBlocks' CUDA extension ``megablocks_ops`` in plain torch; results go to the last argument."""

    @staticmethod
    def sort(x: torch.Tensor, _end_bit: int, values: torch.Tensor, order: torch.Tensor) -> None:
        ordered = x.sort(stable=True)
        values.copy_(ordered.values)
        order.copy_(ordered.indices)

    @staticmethod
    def histogram(x: torch.Tensor, bins: int) -> torch.Tensor:
        return torch.bincount(x, minlength=bins).int()

    @staticmethod
    def inclusive_cumsum(x: torch.Tensor, dim: int, out: torch.Tensor) -> None:
        out.copy_(x.cumsum(dim))


def grouped_product(x: Any, weight: Any, sizes: Any, trans_b: bool = False) -> torch.Tensor:
    """``grouped_gemm.ops.gmm`` in plain torch: each part of the rows (R, H) with its part of (E, ...)."""
    parts = x.split(sizes.tolist())
    return torch.cat([rows @ (w.T if trans_b else w) for rows, w in zip(parts, weight, strict=True)])

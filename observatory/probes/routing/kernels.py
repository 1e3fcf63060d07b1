"""The kernels that add one routing decision to the counters.

Shapes: T tokens, K assignments per token, E experts. The bins of a site are (E + 2,) integers: bin 0 takes
ids below 0, bins 1..E the experts, bin E + 1 ids of E and above; so no id, however wrong, is out of bounds,
and nothing has to be read on the host to find out.

Nothing here synchronises with a device: no ``.item()``, no ``bincount``, no ``nonzero``, no boolean index.
"""

from __future__ import annotations

import torch

#: Length of the first constants, in ids: those of a decode step; longer calls let them grow.
_GROW = 4096
#: Up to so many ids one binary search per id is faster on the CPU than two loops.
_FEW = 256


class Scales:
    """Constant tensors of one device that counting needs, made once and grown outside of graph capture."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_cpu = device.type == "cpu"
        self._ones = torch.ones(_GROW, dtype=torch.int64, device=device)
        self._latest = self._ones[:0]
        self._edges: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    def ones(self, length: int) -> torch.Tensor:
        """``length`` ones: contiguous on the CPU, where that is faster, a broadcast elsewhere."""
        if not self._is_cpu:
            return self._ones[:1].expand(length)
        latest = self._latest
        if latest.numel() != length:  # the layers of a step ask for the same length one after the other
            with torch.inference_mode(False):
                if length > self._ones.numel():
                    self._ones = torch.ones(2 * length, dtype=torch.int64)
                self._latest = latest = self._ones[:length]
        return latest

    def prepare(self, experts: int) -> None:
        """Make the bin edges 0..E ahead of the first call, so that graph capture finds them."""
        for dtype in (torch.int32, torch.int64):
            self._edges[experts, dtype] = torch.arange(experts + 1, dtype=dtype, device=self._device)

    def edges(self, experts: int, dtype: torch.dtype) -> torch.Tensor:
        """Bin edges 0..E in the dtype of the ids."""
        return self._edges[experts, dtype]


def bin_ids(ids: torch.Tensor, experts: int, scales: Scales) -> torch.Tensor:
    """Bin of each id, flat: one kernel, or two vectorised loops for many ids on the CPU."""
    flat, dtype = ids.reshape(-1), ids.dtype
    if dtype is not torch.int64 and dtype is not torch.int32:
        flat, dtype = flat.to(torch.int64), torch.int64
    if flat.is_cpu and flat.numel() > _FEW:
        return flat.clamp(-1, experts).add_(1)
    return torch.bucketize(flat, scales.edges(experts, dtype), right=True)


def count_bins(bins: torch.Tensor, index: torch.Tensor, values: torch.Tensor) -> None:
    """Add ``values`` to ``bins`` at ``index``: one kernel, in place."""
    if bins.is_cpu:
        bins.index_add_(0, index, values)
    else:
        bins.scatter_add_(0, index, values)


def count_map(bins: torch.Tensor, chosen_TE: torch.Tensor) -> torch.Tensor:
    """Add the column sums of a boolean (T, E) map to the expert bins; gives the sums back, (E,)."""
    sums_E = chosen_TE.sum(dim=0, dtype=torch.int64)
    bins[1:-1].add_(sums_E)
    return sums_E

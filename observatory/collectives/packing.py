"""Several tensors of one row each, as one row of bytes, and back.

Shapes: N rows. Hidden states, gate weights and slot ids of a row differ in dtype; as bytes they need one
exchange instead of three, and no conversion.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

#: (width, dtype) of each tensor of a row.
RowFormat = tuple[tuple[int, torch.dtype], ...]


def pack_rows(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Bytes (N, bytes of a row) of tensors of shape (N, width) each."""
    parts = [_plain(tensor.detach()).view(torch.uint8) for tensor in tensors]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def row_bytes(layout: RowFormat) -> int:
    """Bytes of one row."""
    return sum(width * dtype.itemsize for width, dtype in layout)


def unpack_rows(rows: torch.Tensor, layout: RowFormat) -> list[torch.Tensor]:
    """The tensors that :func:`pack_rows` made these bytes of, each (N, width) and contiguous."""
    widths = [width * dtype.itemsize for width, dtype in layout]
    parts = torch.split(rows, widths, dim=1)
    # A slice may start anywhere; clone gives it a place of its own that any dtype can be read from.
    return [
        part.clone(memory_format=torch.contiguous_format).view(dtype)
        for part, (_, dtype) in zip(parts, layout, strict=True)
    ]


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its values side by side; an expanded one without rows is contiguous in name only."""
    if tensor.is_contiguous() and tensor.stride(-1) == 1:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)

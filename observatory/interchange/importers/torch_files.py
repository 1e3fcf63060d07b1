"""Files of ``torch.save``, read without running anything in them."""

from __future__ import annotations

import zipfile
from typing import Any

from numpy.typing import NDArray

from observatory.errors import InterchangeError
from observatory.interchange.importers.sources import Source
from observatory.run.bounded import first_problem

_MOST_BYTES = 256 << 20


def load_tensors(source: Source) -> Any:
    """What was saved, with tensors on the CPU.

    Raises:
        InterchangeError: torch is not installed, or the file is damaged, too large, or holds other than plain
            values and tensors.
    """
    try:
        import torch
    except ImportError as error:
        raise InterchangeError(
            f"{source.name} is a file of torch, which is not installed",
            remedy="pip install moe-observatory[capture]",
        ) from error
    try:
        with zipfile.ZipFile(source.path) as archive:
            size = sum(item.file_size for item in archive.infolist())
        if size > _MOST_BYTES:
            raise source.refused(f"is over {_MOST_BYTES >> 20} MiB", remedy="record fewer passes")
        return torch.load(source.path, map_location="cpu", weights_only=True)
    except InterchangeError:
        raise
    except Exception as error:  # damaged files end in many ways
        raise source.refused(f"cannot be read as tensors ({first_problem(error)})") from error


def tensor_array(source: Source, value: Any, what: str) -> NDArray[Any]:
    """A tensor as an array.

    Raises:
        InterchangeError: it is no tensor of numbers, or stands for more than 256 MiB.
    """
    import torch

    # A view may stretch a few stored numbers over any shape.
    if not isinstance(value, torch.Tensor) or value.numel() * value.element_size() > _MOST_BYTES:
        raise source.refused(f"has no tensor {what}, or one over {_MOST_BYTES >> 20} MiB")
    try:
        array: NDArray[Any] = value.detach().contiguous().numpy()
    except (RuntimeError, TypeError) as error:
        raise source.refused(f"has a tensor {what} that is none of numbers") from error
    return array

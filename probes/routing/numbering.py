"""Layer numbers: one unique, stable number per MoE layer of a model.

The number of an MoE layer is the index of the block it sits in, as the model itself counts:
``model.layers.7.mlp.experts`` is layer 7, also when layers 0 to 6 are dense. Two things would make numbers
collide, and are settled by adding whole stacks:

* Several stacks (encoder and decoder, text and vision): the first keeps its numbers, the next starts where
  the first one ends. Stacks are ordered as in the model, those of other modalities (vision, audio) last.
* Several MoE layers in one block (mixture of attention beside mixture of MLPs): the first keeps the block
  index, the second gets the index plus the length of the stack, and so on; attention comes last.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

__all__ = ["layer_numbers"]

_LAST = re.compile(r"vision|visual|image|audio|speech|talker|attention|attn")


def layer_numbers(model: nn.Module, paths: Sequence[str]) -> list[int]:
    """A unique layer number for every module path, in the order of ``paths``."""
    places = [_place(path) for path in paths]
    order = sorted(range(len(paths)), key=lambda i: (_LAST.search(paths[i]) is not None, i))
    lengths = {stack: _length(model, stack, places) for stack, _ in places}
    starts: dict[str, int] = {}
    sizes: dict[str, int] = {}
    numbers = [0] * len(paths)
    taken: dict[tuple[str, int], int] = {}
    for i in order:
        stack, block = places[i]
        taken[stack, block] = taken.get((stack, block), -1) + 1
        sizes[stack] = max(sizes.get(stack, 0), lengths[stack] * (taken[stack, block] + 1))
    for i in order:
        stack = places[i][0]
        if stack not in starts:
            starts[stack] = sum(sizes[known] for known in starts)
    taken.clear()
    for i in order:
        stack, block = places[i]
        taken[stack, block] = turn = taken.get((stack, block), -1) + 1
        numbers[i] = starts[stack] + turn * lengths[stack] + block
    return numbers


def _place(path: str) -> tuple[str, int]:
    """The stack (path before the first number) and the block index in it; index 0 without any number."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:i]), int(part)
    return path, 0


def _length(model: nn.Module, stack: str, places: Sequence[tuple[str, int]]) -> int:
    """Blocks in the stack: the length of its ModuleList, or one more than the largest index seen."""
    seen = 1 + max(block for name, block in places if name == stack)
    container = model.get_submodule(stack) if stack else model
    return max(seen, len(container)) if isinstance(container, nn.ModuleList) else seen

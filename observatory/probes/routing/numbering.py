"""Layer numbers: one unique, stable number per MoE layer of a model.

Where every MoE layer states the framework's own number (Megatron-Core's ``layer_number``, counted from 1)
and no two state the same, that number less one is the layer's: pipeline stages are then numbered through,
whatever part of the model a rank holds. It stands on the layer's module or on one around it. Where it is
missing somewhere, or stated twice (a second model, a head that counts from 1 again), all layers are numbered
by place.

By place, the number is the index of the block the layer sits in, as the model itself counts:
``model.layers.7.mlp.experts`` is layer 7, also when layers 0 to 6 are dense. Three things would make numbers
collide, and are settled by adding whole stacks:

* Several stacks (encoder and decoder, text and vision): the first keeps its numbers, the next starts where
  the first one ends. Stacks are ordered as in the model, those of other modalities (vision, audio) last.
* Lists of models or of parts of one (chunks of a virtual pipeline): each has stacks of its own, so chunks are
  numbered one after the other.
* Several MoE layers in one block (mixture of attention and mixture of MLPs): the first keeps the block
  index, the second gets the index plus the length of the stack, and so on; attention comes last.

Of the numbers in ``0.model.layers.2.mlp`` the last is the block, in ``block.1.layer.1.mlp`` of a T5 the
first: its ``layer`` lists the parts of one block. Lists with the name of a list of blocks go first; where
several have one, or none has, a list inside another holds blocks if its element with the MoE layer is one of
several of its class.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise

from torch import nn

_LAST = re.compile(r"vision|visual|image|audio|speech|talker|attention|attn")
#: Names of lists of blocks. ``layer`` is one of BERT's blocks, but in T5 one of the parts of a block.
_BLOCKS = re.compile(r"layers|blocks?|h")
#: The routing table holds layers in 32 bits.
_MOST_LAYERS = 2**31 - 1

#: A list of modules (its path), and the index in it.
Place = tuple[str, int]


def layer_numbers(model: nn.Module, paths: Sequence[str]) -> list[int]:
    """A unique layer number for every module path, in the order of ``paths``."""
    modules = dict(model.named_modules())
    stated = [_stated_number(modules, path) for path in paths]
    numbers = [number - 1 for number in stated if number is not None]
    if len(set(numbers)) == len(paths):
        return numbers
    return _numbers_by_place(modules, paths)


def _stated_number(modules: Mapping[str, nn.Module], path: str) -> int | None:
    """``layer_number`` of the module or of the nearest one around it that has one; None without one."""
    while True:
        number = getattr(modules.get(path), "layer_number", None)
        if isinstance(number, int) and not isinstance(number, bool):
            return number if 1 <= number <= _MOST_LAYERS else None
        if not path:
            return None
        path = path.rpartition(".")[0]


def _numbers_by_place(modules: Mapping[str, nn.Module], paths: Sequence[str]) -> list[int]:
    places = _places(modules, paths)
    order = sorted(range(len(paths)), key=lambda i: (_LAST.search(paths[i]) is not None, i))
    lengths = {stack: _length(modules.get(stack), stack, places) for stack, _ in places}
    starts: dict[str, int] = {}
    sizes: dict[str, int] = {}
    numbers = [0] * len(paths)
    taken: dict[Place, int] = {}
    for i in order:
        stack, block = places[i]
        taken[stack, block] = taken.get((stack, block), -1) + 1
        sizes[stack] = max(sizes.get(stack, 0), lengths[stack] * (taken[stack, block] + 1))
    for i in order:
        stack = places[i][0]
        if stack not in starts:
            starts[stack] = sum(sizes[earlier] for earlier in starts)
    taken.clear()
    for i in order:
        stack, block = places[i]
        taken[stack, block] = turn = taken.get((stack, block), -1) + 1
        numbers[i] = starts[stack] + turn * lengths[stack] + block
    return numbers


def _places(modules: Mapping[str, nn.Module], paths: Sequence[str]) -> list[Place]:
    """The stack and the block in it for every path; the path itself and 0 where it holds no number."""
    lists = [_lists_of_blocks(modules, path) for path in paths]
    # One chunk that shows what its list holds speaks for all chunks of that list.
    of_stacks = {
        outer
        for on_path in lists
        for (outer, _), (inner, index) in pairwise(on_path)
        if _is_repeated(modules.get(inner), index)
    }
    places = [
        next((place for place in on_path if place[0] not in of_stacks), on_path[-1]) if on_path else (path, 0)
        for on_path, path in zip(lists, paths, strict=True)
    ]
    through = _numbered_through(modules, {stack for stack, _ in places})
    return [(through.get(stack, stack), block) for stack, block in places]


def _lists_of_blocks(modules: Mapping[str, nn.Module], path: str) -> list[Place]:
    """The lists on a path that may be lists of blocks, from the outside: those named so, else all of them."""
    parts = path.split(".")
    places = [
        (".".join(parts[:i]), int(part))
        for i, part in enumerate(parts)
        if part.isascii() and part.isdecimal()
    ]
    names = [stack.rpartition(".")[2] for stack, _ in places]
    return [
        (stack, block)
        for name, (stack, block) in zip(names, places, strict=True)
        if _BLOCKS.fullmatch(name) or (name == "layer" and _is_repeated(modules.get(stack), block))
    ] or places


def _is_repeated(container: nn.Module | None, index: int) -> bool:
    """Whether the element is one of several of its class, or all there is."""
    elements = {} if container is None else container._modules
    kinds = [type(element) for element in elements.values()]
    return len(kinds) == 1 or kinds.count(type(elements.get(str(index)))) > 1


def _numbered_through(modules: Mapping[str, nn.Module], stacks: set[str]) -> dict[str, str]:
    """Stacks of several chunks that are one, with its name.

    Only where blocks are named by number (in a ``ModuleDict``) rather than listed, for then the model chose
    the numbers, and no block has the number of another chunk's.
    """
    chunks: dict[str, list[str]] = defaultdict(list)
    for stack in stacks:
        chunks[re.sub(r"(^|\.)\d+(?=\.)", r"\1*", stack)].append(stack)
    through: dict[str, str] = {}
    for name, parts in chunks.items():
        containers = [modules.get(stack) for stack in parts]
        if any(c is None or isinstance(c, (nn.ModuleList, nn.Sequential)) for c in containers):
            continue
        names = [key for container in containers if container is not None for key in container._modules]
        if len(parts) > 1 and len(set(names)) == len(names):
            through |= dict.fromkeys(parts, name)
    return through


def _length(container: nn.Module | None, stack: str, places: Sequence[Place]) -> int:
    """Blocks in the stack: the length of its list, or one more than the largest index."""
    least = 1 + max(block for name, block in places if name == stack)
    return max(least, len(container)) if isinstance(container, (nn.ModuleList, nn.Sequential)) else least

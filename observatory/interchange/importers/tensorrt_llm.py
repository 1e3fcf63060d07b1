"""TensorRT-LLM: statistics of its MoE load balancer.

``meta_info.json`` states experts and top-k; ``rank*.safetensors`` have an array of counts for each iteration
and layer, named ``{iteration}_{layer}``. Both are to be named.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from observatory.errors import InterchangeError
from observatory.interchange.importers.imported import ImportedRun, ImportOptions
from observatory.interchange.importers.loads import Loads, dense_loads, loads_run, needed_top_k
from observatory.interchange.importers.sources import Source
from observatory.run.bounded import first_problem
from observatory.run.rows import MAX_EXPERTS

_PLACEMENT = b"initial_global_assignments"
_MOST_BYTES = 256 << 20
_FILE = re.compile(r"rank_?(\d{1,4})\.safetensors")
_NAME = re.compile(r"(\d{1,15})_(\d{1,5})")


def recognises(head: bytes) -> bool:
    """Whether a file begins like one of this format: a table of arrays named by iteration and layer."""
    if _PLACEMENT in head:
        return True
    if head.lstrip().startswith(b"{"):
        return b'"num_experts_per_token"' in head and b'"num_experts"' in head
    return re.match(rb"\{\s*(\"__metadata__\"|\"\d+_\d+\")", head[8:]) is not None


def read(sources: Sequence[Source], options: ImportOptions) -> ImportedRun:
    """Loads of the ranks of one run.

    Raises:
        InterchangeError: a file is none of these, no file has counts, or experts of a token are not stated.
    """
    stated: dict[str, Any] = {}
    found: list[Loads] = []
    for source in sources:
        if _PLACEMENT in source.head():
            raise source.refused("holds a placement of experts, and no loads", expected="rank*.safetensors")
        if source.head().lstrip().startswith(b"{"):
            document = source.json()
            stated = document if isinstance(document, dict) else {}
        else:
            found.append(_of_rank(source, options.phase))
    if not found:
        raise sources[0].refused("holds no counts", remedy="import it with the rank*.safetensors next to it")
    sizes = {loads.load_SLE.shape[2] for loads in found}
    if len(sizes) > 1 or len({loads.rank for loads in found}) < len(found):
        raise sources[0].refused("and the others do not fit: other experts, or one rank twice")
    (experts,) = sizes
    if stated.get("num_experts", experts) != experts:
        raise sources[0].refused(
            f"and its meta_info.json have {experts} and {stated['num_experts']!r} experts"
        )
    top_k = options.top_k or stated.get("num_experts_per_token")
    if not isinstance(top_k, int) or not 0 < top_k <= experts:
        top_k = needed_top_k("no meta_info.json is named: the file", None)
    notes: list[str] = []
    return loads_run(found, name=options.model_name(sources), top_k=top_k, notes=notes)


def _of_rank(source: Source, phase: str) -> Loads:
    named = _FILE.fullmatch(source.name)
    if named is None:
        raise source.refused("is no file of one rank's counts", expected="a name such as rank0.safetensors")
    arrays = {_key(source, name): array for name, array in _tensors(source).items()}
    if not arrays:
        raise source.refused("holds no counts")
    shapes = {array.shape for array in arrays.values()}
    if len(shapes) > 1 or len(next(iter(shapes))) != 1 or not 0 < next(iter(shapes))[0] <= MAX_EXPERTS:
        raise source.refused("has arrays that are no counts of one number of experts")
    (experts,) = shapes.pop()
    if any(array.dtype.kind not in "iu" for array in arrays.values()):
        raise source.refused("has arrays that are no whole numbers")
    return dense_loads(source, arrays, experts=experts, rank=int(named[1]), phase=phase)


def _key(source: Source, name: str) -> tuple[int, int]:
    found = _NAME.fullmatch(name)
    if found is None:
        raise source.refused(
            f"has an array {name[:40]!r}", expected="names of iteration and layer such as 12_3"
        )
    return int(found[1]), int(found[2])


def _tensors(source: Source) -> dict[str, NDArray[Any]]:
    try:
        from safetensors.numpy import load
    except ImportError as error:
        raise InterchangeError(
            f"{source.name} is a file of safetensors, which is not installed",
            remedy="pip install moe-observatory[capture]",
        ) from error
    content = source.content(_MOST_BYTES)
    try:
        arrays: dict[str, NDArray[Any]] = load(content)
    except Exception as error:  # its own errors, and numpy's of types that numpy lacks
        raise source.refused(f"is no safetensors file ({first_problem(error)})") from error
    return arrays

"""Megatron: traces of its routers, and tokens per expert, as JSON lines of each rank.

``router_trace_rank{N}.jsonl`` has a line for each step, layer and rank with the experts of each token.
``rank{N}.jsonl`` of ``tokens_per_expert`` has a list of counts for each micro-batch: those of the rank's own
tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from observatory.interchange.importers.imported import ImportedRun, ImportOptions
from observatory.interchange.importers.json_lines import json_lines, whole
from observatory.interchange.importers.loads import dense_loads, loads_run, needed_top_k
from observatory.interchange.importers.sources import Source
from observatory.run.rows import MAX_EXPERTS, MAX_STEP

_MOST_RANKS = 4096
_MOST_LAYERS = 16_384
_RANK = re.compile(r"rank_?(\d{1,5})\.jsonl")

#: Of a step and layer.
_Key = tuple[int, int]


def recognises(head: bytes) -> bool:
    """Whether a file begins like one of this format."""
    first = head.split(b"\n", 1)[0]
    return first.startswith(b"{") and (
        (b'"top_indices"' in first and b'"num_tokens"' in first) or (b'"tpe"' in first and b'"iter"' in first)
    )


def read(sources: Sequence[Source], options: ImportOptions) -> ImportedRun:
    """Loads of the ranks of one run.

    Raises:
        InterchangeError: a file is none of these, or does not state its rank or how many experts a token has.
    """
    notes: list[str] = []
    loads: dict[int, dict[_Key, NDArray[np.int64]]] = {}
    top_ks: set[int] = set()
    for source in sources:
        for rank, key, counts, top_k in _records(source):
            of_rank = loads.setdefault(rank, {})
            of_rank[key] = _sum(of_rank[key], counts) if key in of_rank else counts
            top_ks.update({top_k} if top_k else ())
    if not loads:
        raise sources[0].refused("holds no routing")
    stated = top_ks.pop() if len(top_ks) == 1 else None
    top_k = needed_top_k(sources[0].name, options.top_k or stated)
    experts = options.experts or max(len(counts) for of_rank in loads.values() for counts in of_rank.values())
    if stated is not None and options.experts is None:
        notes.append(
            f"the number of experts is not stated: {experts}, as far as tokens have them (--experts)"
        )
    found = [
        dense_loads(sources[0], of_rank, experts=experts, rank=rank, phase=options.phase)
        for rank, of_rank in sorted(loads.items())
    ]
    return loads_run(found, name=options.model_name(sources), top_k=top_k, notes=notes)


def _records(source: Source) -> Iterator[tuple[int, _Key, NDArray[np.int64], int | None]]:
    """Rank, step and layer, counts, and top-k where it is stated."""
    named = _RANK.search(source.name)
    for record in json_lines(source):
        layer = whole(source, record, "layer", _MOST_LAYERS)
        if record.get("mtp_idx") is not None:
            continue  # layers that predict further tokens have numbers of their own
        if "top_indices" in record:
            rank = whole(source, record, "rank", _MOST_RANKS - 1)
            step = whole(source, record, "step", MAX_STEP)
            ids = _numbers(source, record["top_indices"], "top_indices", MAX_EXPERTS - 1)
            yield (
                rank,
                (step, layer),
                np.bincount(ids.reshape(-1)),
                whole(source, record, "topk", MAX_EXPERTS),
            )
        elif "tpe" in record:
            if named is None or int(named[1]) >= _MOST_RANKS:
                raise source.refused("does not name its rank", expected="a name such as rank3.jsonl")
            counts = _numbers(source, record["tpe"], "tpe", 1 << 40).sum(axis=0)
            yield int(named[1]), (whole(source, record, "iter", MAX_STEP), layer), counts, None
        else:
            raise source.refused("has a record without top_indices or tpe")


def _numbers(source: Source, lists: Any, name: str, most: int) -> NDArray[np.int64]:
    try:
        numbers = np.asarray(lists)
    except ValueError as error:
        raise source.refused(f"has {name} with lists of several lengths") from error
    if numbers.ndim != 2 or not numbers.size or numbers.dtype.kind not in "iu":
        raise source.refused(f"has {name} that are no lists of whole numbers")
    if numbers.min() < 0 or numbers.max() > most or numbers.shape[1] > MAX_EXPERTS:
        raise source.refused(f"has {name} outside 0 to {most}")
    return numbers.astype(np.int64)


def _sum(first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.int64]:
    longer, shorter = (first, second) if len(first) >= len(second) else (second, first)
    total = longer.copy()
    total[: len(shorter)] += shorter
    return total

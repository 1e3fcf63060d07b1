"""vLLM: experts of routed tokens, and logs of expert loads.

``routed_experts`` of a request: an array [tokens, layers, top-k] of logical experts (``.npy``), or an answer
of its API, which holds such a file in base64. Loads of its expert-parallel load balancer, by an open
proposal: JSON lines ``eplb_load_stats`` with physical loads and the map to logical experts.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from observatory.interchange.importers.counts import read_array
from observatory.interchange.importers.imported import ImportedRun, ImportOptions
from observatory.interchange.importers.json_lines import json_lines
from observatory.interchange.importers.loads import MOST_COUNTS, Loads, checked_loads, loads_run, needed_top_k
from observatory.interchange.importers.sources import Source
from observatory.run.rows import MAX_EXPERTS, MAX_STEP

_NUMPY = b"\x93NUMPY"


def recognises(head: bytes) -> bool:
    """Whether a file begins like one of this format; arrays are named, since plain counts look alike."""
    return head.lstrip()[:1] == b"{" and (b'"routed_experts"' in head or b'"eplb_load_stats"' in head)


def read(sources: Sequence[Source], options: ImportOptions) -> ImportedRun:
    """Loads of one run; each request is a step.

    Raises:
        InterchangeError: a file is none of these, or does not state what is needed.
    """
    notes: list[str] = []
    if b'"eplb_load_' in sources[0].head():
        loads, top_k = _of_balancer(sources, options.phase), options.top_k
    else:
        loads, top_k = _of_requests(sources, options, notes)
    top_k = needed_top_k(sources[0].name, top_k)
    return loads_run([loads], name=options.model_name(sources), top_k=top_k, notes=notes)


def _of_requests(sources: Sequence[Source], options: ImportOptions, notes: list[str]) -> tuple[Loads, int]:
    requests: list[NDArray[Any]] = []
    for source in sources:
        if source.head().startswith(_NUMPY):
            requests.append(_checked_ids(source, read_array(source, source.content(256 << 20))))
        else:
            requests += [_checked_ids(source, ids) for ids in _answers(source)]
    shapes = {ids.shape[1:] for ids in requests}
    if len(shapes) > 1:
        raise sources[0].refused("and the others have other layers or top-k", remedy="import each alone")
    layers, top_k = shapes.pop()
    experts = options.experts or 1 + max(int(ids.max()) for ids in requests)
    if options.experts is None:
        notes.append(
            f"the number of experts is not stated: {experts}, as far as tokens have them (--experts)"
        )
    if len(requests) * layers * experts > MOST_COUNTS:
        raise sources[0].refused(f"and the others stand for over {MOST_COUNTS:,} counts")
    load_SLE = np.zeros((len(requests), layers, experts), dtype=np.int64)
    dense = _dense_layers(requests)
    for step, ids_TLK in enumerate(requests):
        if ids_TLK.max() >= experts:
            raise sources[0].refused(f"has an expert {ids_TLK.max()}", expected=f"0 to {experts - 1}")
        for layer in np.flatnonzero(~dense):
            ids = ids_TLK[:, layer]
            load_SLE[step, layer] = np.bincount(ids[ids >= 0], minlength=experts)
    notes.append("each request is a step; which phase a token is of is not stated")
    return _loads(load_SLE, options.phase), top_k


def _dense_layers(requests: Sequence[NDArray[Any]]) -> NDArray[np.bool_]:
    """Layers whose tokens all have expert 0 in each place: no router chooses one expert twice."""
    dense: NDArray[np.bool_] = np.logical_and.reduce([(ids == 0).all(axis=(0, 2)) for ids in requests])
    return dense


def _checked_ids(source: Source, ids: NDArray[Any]) -> NDArray[Any]:
    if ids.ndim != 3 or not ids.size or ids.dtype.kind not in "iu":
        raise source.refused("holds no experts of tokens", expected="whole numbers [tokens, layers, top-k]")
    if int(ids.min()) < -1 or int(ids.max()) >= MAX_EXPERTS:
        raise source.refused("has an expert that cannot be", expected=f"-1 to {MAX_EXPERTS - 1}")
    return ids.astype(np.int64)


def _answers(source: Source) -> Iterator[NDArray[Any]]:
    document = source.json()
    choices = document.get("choices", [document]) if isinstance(document, dict) else []
    found = [
        item["routed_experts"]
        for item in (choices if isinstance(choices, list) else [])
        if isinstance(item, dict) and isinstance(item.get("routed_experts"), str)
    ]
    if not found:
        raise source.refused("holds no routed_experts")
    for item in found:
        try:
            content = base64.b64decode(item, validate=True)
        except ValueError as error:
            raise source.refused("has routed_experts that are no base64") from error
        yield read_array(source, content)


def _of_balancer(sources: Sequence[Source], phase: str) -> Loads:
    steps: dict[int, NDArray[np.int64]] = {}
    for source in sources:
        for record in json_lines(source):
            for step, load_LE in _of_line(source, record):
                if step in steps and steps[step].shape != load_LE.shape:
                    raise source.refused("has other layers or experts in some lines")
                steps[step] = steps[step] + load_LE if step in steps else load_LE
    if not steps:
        raise sources[0].refused("holds no eplb_load_stats")
    shapes = {load.shape for load in steps.values()}
    if len(shapes) > 1:
        raise sources[0].refused("has other layers or experts in some lines", remedy="import each part alone")
    order = sorted(steps)
    return _loads(checked_loads(sources[0].name, np.stack([steps[step] for step in order])), phase, order)


def _of_line(source: Source, record: dict[str, Any]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    stats = record.get("eplb_load_stats", record)
    if not isinstance(stats, dict) or "expert_load" not in stats:
        return
    try:
        load_LQ, map_LQ = np.asarray(stats["expert_load"]), np.asarray(stats["p2l_map"])
        step = stats["step"]
    except (KeyError, ValueError) as error:
        raise source.refused("has loads without step or p2l_map, or of several lengths") from error
    fits = load_LQ.ndim == 2 and load_LQ.shape == map_LQ.shape and load_LQ.size
    if not fits or load_LQ.dtype.kind not in "iu" or map_LQ.dtype.kind not in "iu":
        raise source.refused("has loads that do not fit their p2l_map", expected="[layers, physical experts]")
    if not isinstance(step, int) or not 0 <= step <= MAX_STEP or min(map_LQ.min(), load_LQ.min()) < 0:
        raise source.refused("has a step, a load or a map that cannot be")
    if map_LQ.max() >= map_LQ.shape[1]:
        raise source.refused("maps to more logical than it has physical experts")
    load_LE = np.zeros((len(load_LQ), int(map_LQ.max()) + 1), dtype=np.int64)
    for layer, logical in enumerate(map_LQ):
        np.add.at(load_LE[layer], logical, load_LQ[layer])
    yield step, load_LE


def _loads(load_SLE: NDArray[np.integer], phase: str, steps: Sequence[int] | None = None) -> Loads:
    return Loads(
        load_SLE=load_SLE,
        step_S=np.arange(len(load_SLE)) if steps is None else np.array(steps, dtype=np.int64),
        layer_L=np.arange(load_SLE.shape[1]),
        rank=0,
        phase=phase,
    )

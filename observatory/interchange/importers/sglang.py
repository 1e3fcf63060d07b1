"""SGLang: dumps of its expert distribution recorder, and loads for ``--init-expert-location``.

``torch.save`` wrote them: they are read with ``weights_only``, so that nothing in them runs. ``stat`` holds
logical counts that are already summed over ranks; its first axis is a ring whose order is not that of time.
``per_pass`` and ``per_token`` hold physical counts or the experts of each token, a file for each rank, with a
map from physical to logical experts. Token ids are not kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from observatory.interchange.importers.imported import ImportedRun, ImportOptions
from observatory.interchange.importers.loads import Loads, checked_loads, loads_run, needed_top_k
from observatory.interchange.importers.sources import Source
from observatory.interchange.importers.torch_files import load_tensors, tensor_array
from observatory.text import counted

_MOST_RANKS = 4096
_RING = "steps are places of a ring buffer: their order is not that of time"


def recognises(head: bytes) -> bool:
    """Whether a file begins like one of this format."""
    if head.startswith(b"PK\x03\x04"):
        return b"/data.pkl" in head[:512]
    start = head.lstrip()[:400]
    return start.startswith(b"{") and (b'"logical_count"' in start or b'"physical_to_logical_map"' in start)


def read(sources: Sequence[Source], options: ImportOptions) -> ImportedRun:
    """Loads of one run: one ``stat`` file, or those of all ranks.

    Raises:
        InterchangeError: a file is none of these, states no loads, or needs torch, which is missing.
    """
    dumps = [_load(source) for source in sources]
    notes: list[str] = []
    found: list[Loads] = []
    top_k = options.top_k
    for source, dump in zip(sources, dumps, strict=True):
        if "logical_count" in dump:
            if len(sources) > 1:
                raise source.refused("is summed over ranks already", remedy="import it alone")
            found.append(_of_stat(source, dump, phase=options.phase, notes=notes))
        elif "records" in dump:
            of_rank, stated = _of_records(source, dump, phase=options.phase)
            found.append(of_rank)
            top_k = top_k or stated
        else:
            what = "a placement of experts, and no loads" if "physical_to_logical_map" in dump else "no loads"
            raise source.refused(f"holds {what}", expected="logical_count or records")
    ranks = [loads.rank for loads in found]
    if len(set(ranks)) < len(ranks):
        raise sources[0].refused("and another file are of the same rank", remedy="import each alone")
    shapes = {loads.load_SLE.shape[1:] for loads in found}
    if len(shapes) > 1:
        raise sources[0].refused("and the others have other layers or experts", remedy="import each alone")
    top_k = needed_top_k(sources[0].name, top_k)
    return loads_run(found, name=options.model_name(sources), top_k=top_k, notes=notes)


def _load(source: Source) -> dict[str, Any]:
    if not source.head().startswith(b"PK"):
        document: Any = source.json()
        if isinstance(document, dict) and "logical_count" in document:
            try:
                counts = np.asarray(document["logical_count"])
            except ValueError as error:
                raise source.refused("has a logical_count with rows of several lengths") from error
            return {"logical_count": counts if counts.ndim == 3 else counts[None]}
        return document if isinstance(document, dict) else {}
    dump = load_tensors(source)
    return dump if isinstance(dump, dict) else {}


def _of_stat(source: Source, dump: dict[str, Any], *, phase: str, notes: list[str]) -> Loads:
    counts = dump["logical_count"]
    array = counts if isinstance(counts, np.ndarray) else tensor_array(source, counts, "logical_count")
    load_SLE = checked_loads(source.name, array if array.ndim != 2 else array[None])
    steps, layers, _ = load_SLE.shape
    if steps > 1:
        notes.append(_RING)
    notes.append("loads are summed over ranks")
    return Loads(
        load_SLE=load_SLE,
        step_S=np.arange(steps, dtype=np.int64),
        layer_L=np.arange(layers, dtype=np.int64),
        rank=0,
        phase=phase,
    )


def _of_records(source: Source, dump: dict[str, Any], *, phase: str) -> tuple[Loads, int | None]:
    """Loads of one rank, summed over records of the same pass; top-k where it is stated."""
    records = dump["records"]
    logical = dump.get("last_physical_to_logical_map")
    if not isinstance(records, list) or not records or not all(isinstance(item, dict) for item in records):
        raise source.refused("holds no records")
    if logical is None:
        raise source.refused("has no map from physical to logical experts")
    map_LQ = tensor_array(source, logical, "last_physical_to_logical_map")
    if map_LQ.ndim != 2 or map_LQ.dtype.kind not in "iu" or not map_LQ.size or map_LQ.min() < 0:
        raise source.refused("has a map from physical to logical experts that is none")
    if map_LQ.max() >= map_LQ.shape[1]:
        raise source.refused("maps to more logical than it has physical experts")
    passes: dict[int, NDArray[np.int64]] = {}
    ranks, sizes = set(), set()
    for record in records:
        step, rank = record.get("forward_pass_id"), record.get("rank")
        if not isinstance(step, int) or not isinstance(rank, int) or not 0 <= rank < _MOST_RANKS or step < 0:
            raise source.refused("has a record without forward_pass_id or rank")
        load_LE, top_k = _of_record(source, record, map_LQ)
        ranks.add(rank)
        sizes.add(top_k)
        passes[step] = passes[step] + load_LE if step in passes else load_LE
    if len(ranks) > 1:
        raise source.refused(f"holds records of {counted(len(ranks), 'rank')}", expected="those of one")
    step_S = np.array(sorted(passes), dtype=np.int64)
    load_SLE = checked_loads(source.name, np.stack([passes[step] for step in step_S.tolist()]))
    layer_L = np.arange(load_SLE.shape[1], dtype=np.int64)
    loads = Loads(load_SLE=load_SLE, step_S=step_S, layer_L=layer_L, rank=ranks.pop(), phase=phase)
    return loads, sizes.pop() if len(sizes) == 1 else None


def _of_record(
    source: Source, record: dict[str, Any], map_LQ: NDArray[Any]
) -> tuple[NDArray[np.int64], int | None]:
    layers, experts = map_LQ.shape[0], int(map_LQ.max()) + 1
    load_LE = np.zeros((layers, experts), dtype=np.int64)
    if "global_physical_count" in record:
        count_LQ = tensor_array(source, record["global_physical_count"], "global_physical_count")
        if count_LQ.shape != map_LQ.shape or count_LQ.dtype.kind not in "iu":
            raise source.refused("has counts that do not fit its map from physical to logical experts")
        for layer in range(layers):
            np.add.at(load_LE[layer], map_LQ[layer], count_LQ[layer].astype(np.int64))
        return load_LE, None
    if "topk_ids_of_layer" not in record:
        raise source.refused("has a record without counts", expected="global_physical_count")
    ids_LTK = tensor_array(source, record["topk_ids_of_layer"], "topk_ids_of_layer")
    if ids_LTK.ndim != 3 or len(ids_LTK) != layers or ids_LTK.dtype.kind not in "iu":
        raise source.refused("has experts of tokens that do not fit its map")
    if ids_LTK.size and (ids_LTK.min() < -1 or ids_LTK.max() >= map_LQ.shape[1]):
        raise source.refused("assigns a token to an expert that its map does not have")
    for layer in range(layers):
        ids = ids_LTK[layer][ids_LTK[layer] >= 0]
        load_LE[layer] = np.bincount(map_LQ[layer][ids], minlength=experts)[:experts]
    return load_LE, int(ids_LTK.shape[2])

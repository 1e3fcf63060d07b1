"""Expert times that a run itself shows: the spans of its ranks, next to what each of them computed.

A run of several ranks whose dispatcher records spans has a time for every rank, layer and step, and routing
rows say how many assignments and experts each had: points like those of a benchmark, of the loads that
occurred. They include what disturbed the ranks while they ran.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from observatory.errors import BenchmarkError
from observatory.run.documents.expert_bench import ELEMENT_BYTES, ExpertBench, ExpertPoint, ExpertShape

if TYPE_CHECKING:
    from observatory.run import Run
    from observatory.run.manifest import ModelSpec

_MOST_POINTS = 4000
#: Weights of a gated expert: up, gate and down.
_MATRICES = 3


def shape_of_model(model: ModelSpec) -> ExpertShape:
    """Shape of a model's experts; the intermediate size is that of gated experts of as many bytes.

    Raises:
        BenchmarkError: the manifest lacks sizes, or layers differ.
    """
    experts = {layer.experts for layer in model.moe_layers}
    top_k = {layer.top_k for layer in model.moe_layers}
    dtype = (model.dtype or "").removeprefix("torch.")
    if not model.hidden_size or not model.expert_bytes or dtype not in ELEMENT_BYTES or len(experts) != 1:
        raise BenchmarkError(
            f"the run of {model.name} does not state the size of its experts",
            expected="hidden_size, expert_bytes, a known dtype and equal layers in its manifest",
            remedy="measure them with `observatory bench experts`",
        )
    of_one = model.hidden_size * ELEMENT_BYTES[dtype] * _MATRICES
    return ExpertShape(
        hidden=model.hidden_size,
        intermediate=max(1, model.expert_bytes // of_one),
        experts=experts.pop(),
        top_k=top_k.pop() if len(top_k) == 1 else None,
        dtype=dtype,
        expert_bytes=model.expert_bytes,
    )


def experts_of_run(run: Run) -> ExpertBench | None:
    """Times of the run's own experts as a benchmark; None where it has none.

    Only runs whose experts are spread, each on one rank, alike in all layers.

    Raises:
        BenchmarkError: the manifest lacks sizes.
    """
    topology = run.manifest.topology
    if topology.ep < 2 or topology.placement is None or any(len(ranks) > 1 for ranks in topology.placement):
        return None
    spans = run.spans()
    spans = spans[(spans["name"] == "experts") & spans["end_ns"].notna() & spans["layer"].notna()]
    if spans.empty:
        return None
    us = (spans["end_ns"].astype(np.int64) - spans["start_ns"].astype(np.int64)) / 1e3
    keys = zip(spans["phase"], spans["step"], spans["layer"], spans["source_rank"], strict=True)
    taken: dict[tuple[str, int, int, int], float] = {}
    for key, value in zip(keys, us, strict=True):
        taken[key] = taken.get(key, 0.0) + float(value)
    home_E = np.array([ranks[0] for ranks in topology.placement])
    holds_PE = home_E[None] == np.arange(topology.ep)[:, None]
    times: dict[tuple[int, int], list[float]] = {}
    for block in run.iter_loads():
        if block.experts != home_E.size or np.any(block.window_steps_S != 1):
            continue
        load_SE = block.load_SPE.sum(axis=1)
        rows_SP, active_SP = load_SE @ holds_PE.T, (load_SE > 0).astype(np.int64) @ holds_PE.T
        for place, step in enumerate(block.step_S.tolist()):
            for rank in range(topology.ep):
                spent_us = taken.get((block.phase, step, block.layer, rank), 0.0)
                point = int(rows_SP[place, rank]), int(active_SP[place, rank])
                if spent_us >= 1e-3:
                    times.setdefault(point, []).append(spent_us)
    if not times:
        return None
    points = sorted(times.items())[:: max(1, -(-len(times) // _MOST_POINTS))]
    return ExpertBench(
        created_unix_s=time.time(),
        model=run.manifest.model.name,
        shape=shape_of_model(run.manifest.model),
        experts_here=int(holds_PE.sum(axis=1).max()),
        device="as in the run",
        warmup=0,
        points=tuple(
            ExpertPoint(assignments=rows, activated=active, us_R=tuple(us_R[:100_000]))
            for (rows, active), us_R in points
        ),
    )

"""Placements of experts as serving engines read them.

Shapes: L layers, P ranks, K slots of each rank, E experts. Slots count through the ranks: slot p K + k is
slot k of rank p.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

PlacementForm = Literal["sglang", "tensorrt-llm", "vllm-ascend"]
PLACEMENT_FORMS: tuple[PlacementForm, ...] = ("sglang", "tensorrt-llm", "vllm-ascend")


def placement_text(
    form: PlacementForm, slot_LPK: NDArray[np.integer], *, layers: Sequence[int], experts: int
) -> str:
    """The content of the file that an engine reads.

    Args:
        form: ``sglang``: JSON of ``--init-expert-location``, one list for every decoder layer up to the last
            MoE layer, dense ones in plain order. ``tensorrt-llm``: YAML of its ``moe_load_balancer``, by
            decoder layer. ``vllm-ascend``: JSON of its expert maps, MoE layers counted from 0.
        slot_LPK: expert in each slot.
        layers: numbers of the layers.
        experts: E.
    """
    count, ranks, slots = slot_LPK.shape
    by_layer = dict(zip(layers, slot_LPK.reshape(count, -1).tolist(), strict=True))
    if form == "tensorrt-llm":
        rows = "".join(f"  {layer}: {by_layer[layer]}\n" for layer in sorted(by_layer))
        return f"initial_global_assignments:\n{rows}num_slots: {ranks * slots}\nlayer_updates_per_iter: 0\n"
    document: dict[str, Any]
    if form == "sglang":
        plain = [slot % experts for slot in range(ranks * slots)]
        document = {
            "physical_to_logical_map": [by_layer.get(layer, plain) for layer in range(max(layers) + 1)]
        }
    else:
        document = {
            "moe_layer_count": count,
            "layer_list": [
                {
                    "layer_id": place,
                    "device_count": ranks,
                    "device_list": [
                        {"device_id": rank, "device_expert": held}
                        for rank, held in enumerate(held_PK.tolist())
                    ],
                }
                for place, held_PK in enumerate(slot_LPK[np.argsort(layers)])
            ],
        }
    return json.dumps(document) + "\n"

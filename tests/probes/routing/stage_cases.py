"""What two gloo ranks do, case by case, for test_rank_layers.py; run as a program of its own."""

from __future__ import annotations

import torch
from torch import nn

from tests.probes.rank_cases import Rank, run_cases
from tests.probes.test_rank_layers import TOKENS, numbered, seeded
from tests.probes.tiny import HIDDEN, routed_adapter


def watched(me: Rank, name: str, model: nn.Module, *, wrapped: str = "never") -> None:
    """One step through the model, which DDP wraps before or inside the watch, or never."""
    parallel = nn.parallel.DistributedDataParallel
    if wrapped == "before":
        model = parallel(model)
    with me.watch(name, model, adapter=routed_adapter(), exchanges=False) as watch:
        if wrapped == "inside":
            model = parallel(model)
        with torch.no_grad():
            model(torch.randn(TOKENS, HIDDEN))
        watch.step()


CASES = {
    "stages": lambda me: watched(me, "stages", seeded(me.rank)),
    "through": lambda me: watched(me, "through", numbered(seeded(me.rank), 2 * me.rank)),
    "wrapped_before": lambda me: watched(me, "wrapped_before", seeded(me.rank), wrapped="before"),
    "wrapped_inside": lambda me: watched(me, "wrapped_inside", seeded(me.rank), wrapped="inside"),
}


if __name__ == "__main__":
    run_cases(CASES, world=2, timeout_s=60)

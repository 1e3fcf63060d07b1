"""What verifying counts costs: passes of a watched model as multiples of unwatched ones.

Protocol: a model of 4 MoE layers with 64 experts, 512 tokens a pass; for each way to verify a probe is
attached anew in every round, and its first pass (in which calls are checked) and its third are timed, with
a pass without a probe in the same round. Reported are medians over rounds of the ratios; on the CPU, one
thread.

Run: ``python -m benchmarks.verification_cost [--rounds 20]``.
"""

from __future__ import annotations

import argparse
import time
from typing import Any, get_args

import numpy as np
import torch

from benchmarks.hook_cost import random_model
from observatory.probes.options import RoutingOptions, Verify
from observatory.probes.routing.discover import find_sites
from observatory.probes.routing.probe import RoutingProbe

TOKENS = (1, 512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    model = random_model(layers=4, hidden=64, top_k=4)
    ids = torch.randint(512, TOKENS)
    sites = find_sites(model)
    print("| verify | first pass | later passes |\n|---|---|---|")
    with torch.inference_mode():
        for verify in get_args(Verify):
            ratios = np.array([_round(model, ids, sites, verify) for _ in range(rounds)])
            first, later = np.median(ratios, axis=0)
            print(f"| {verify} | {first:.2f} | {later:.2f} |")


def _round(model: Any, ids: torch.Tensor, sites: Any, verify: Verify) -> tuple[float, float]:
    plain = [_seconds(model, ids) for _ in range(2)][1]
    probe = RoutingProbe(model, sites, RoutingOptions(verify=verify))
    probe.attach()
    passes = [_seconds(model, ids) for _ in range(3)]
    probe.detach()
    probe.release()
    assert probe.problem() is None
    return passes[0] / plain, passes[2] / plain


def _seconds(model: Any, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    model(input_ids=ids)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()

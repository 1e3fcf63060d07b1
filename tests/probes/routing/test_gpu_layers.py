"""The routing probe on real-sized MoE layers on a GPU; skipped where there is none."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks.interleaved import interleaved
from observatory.probes.routing.discover import find_sites
from observatory.probes.routing.probe import RoutingProbe
from tests.devices.gpu_bench import SHAPES, decode_step, make_stack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BATCH, CONTEXT = 8, 512
Record = Callable[[str, object], None]


@pytest.fixture(params=SHAPES)
def step(request: pytest.FixtureRequest) -> Iterator[tuple[str, Any, Callable[[], Any]]]:
    """A decode step of a stack of four layers."""
    model = make_stack(request.param, layers=4, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        yield request.param, model, decode_step(model, BATCH, CONTEXT, SHAPES[request.param][1]["vocab_size"])
    torch.cuda.empty_cache()


def _waits(step: Callable[[], Any]) -> int:
    """How often the host waits for the device in one step."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def test_the_probe_adds_no_wait_to_those_that_the_model_makes_itself(step: tuple[str, Any, Any]) -> None:
    _, model, decode = step
    decode()
    alone = _waits(decode)
    probe = RoutingProbe(model, find_sites(model))
    probe.attach()
    try:
        decode()
        assert _waits(decode) == alone
    finally:
        probe.detach()


def test_what_the_probe_costs_at_decode(step: tuple[str, Any, Any], record_property: Record) -> None:
    name, model, decode = step
    probe = RoutingProbe(model, find_sites(model))

    def block() -> tuple[float]:
        torch.cuda.synchronize()
        began = time.monotonic()
        for _ in range(100):
            decode()
        torch.cuda.synchronize()
        return (time.monotonic() - began,)

    def switch(on: bool) -> None:
        probe.detach()
        if on:
            probe.attach()

    block()
    ((ratio, low, high),) = interleaved(block, switch, groups=12)
    probe.detach()
    record_property(f"{name}_decode_with_probe_over_without", [ratio, low, high])
    assert low < 1.1

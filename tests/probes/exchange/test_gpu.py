"""What only a GPU can show of the exchange probe; skipped where there is none."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import observatory
from tests.probes.tiny import ScriptedModel, scripted_adapter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
ROWS = 1 << 20


@pytest.fixture(autouse=True)
def _nccl() -> Iterator[None]:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_nccl_exchanges_are_timed_on_their_stream_without_a_wait(tmp_path: Path) -> None:
    given, out = torch.randn(ROWS, 16, device="cuda"), torch.empty(ROWS, 16, device="cuda")
    dist.all_to_all_single(out, given)
    torch.cuda.synchronize()
    began_ns = time.monotonic_ns()
    with observatory.watch(
        ScriptedModel(), tmp_path / "r", adapters=[scripted_adapter(3)], exchanges=True
    ) as watch:
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                dist.all_to_all_single(out, given)
                work = dist.all_to_all_single(out, given, async_op=True)
                work.wait()
                watch.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        ended_ns = time.monotonic_ns()
    assert torch.equal(out, given)
    frame = observatory.open_run(tmp_path / "r").exchanges()
    assert set(frame.backend) == {"nccl"}
    assert [list(sent) for sent in frame.send_bytes] == [[ROWS * 64]] * 6
    duration_us = (frame.end_ns - frame.start_ns) / 1000
    # 64 MiB are read and written: more than 10 us on any device, and nothing like a second
    assert duration_us.between(10, 1e6).all()
    slack_ns = 100_000  # the launch latency of an anchor
    assert (frame.start_ns > began_ns - slack_ns).all()
    assert (frame.end_ns < ended_ns + slack_ns).all()
    assert frame.start_ns.is_monotonic_increasing


def test_an_exchange_in_a_cuda_graph_is_not_timed_and_said_so(tmp_path: Path) -> None:
    given, out = torch.randn(64, 16, device="cuda"), torch.empty(64, 16, device="cuda")
    dist.all_to_all_single(out, given)

    def capture() -> None:
        with observatory.watch(
            ScriptedModel(), tmp_path / "r", adapters=[scripted_adapter(3)], exchanges=True
        ):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                dist.all_to_all_single(out, given)
            graph.replay()
            torch.cuda.synchronize()

    with pytest.warns(UserWarning, match="1 exchanges were recorded into CUDA graphs"):
        capture()
    assert observatory.open_run(tmp_path / "r").exchanges().empty

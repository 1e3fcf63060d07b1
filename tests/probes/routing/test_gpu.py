"""What only a GPU can show; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import observatory
from tests.probes.tiny import HIDDEN, RoutedModel, loads, routed_adapter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
EVERY = 6 * 2


def totals(path: Path) -> dict[tuple[int, str, int], int]:
    return {key: sum(load) for key, load in loads(path, experts=4).items()}


def routed() -> tuple[RoutedModel, torch.Tensor]:
    torch.manual_seed(0)
    return RoutedModel(2, 4, 2).cuda().eval(), torch.randn(6, HIDDEN, device="cuda")


@torch.no_grad()
def test_counting_never_makes_the_host_wait_and_agrees_with_the_cpu(tmp_path: Path) -> None:
    model, tokens_TH = routed()
    options = {"gate_mass": True, "sample_tokens": 2}
    with observatory.watch(model, tmp_path / "gpu", adapters=[routed_adapter()], **options) as watch:
        model(tokens_TH)
        watch.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                model(tokens_TH)
                watch.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = loads(tmp_path / "gpu", experts=4)
    router = model.layers[0].router
    naive = router(tokens_TH).softmax(-1).topk(2).indices.flatten().cpu().bincount(minlength=4).tolist()
    assert [found[step, "unknown", 0] for step in range(4)] == [naive] * 4


@torch.no_grad()
def test_a_replayed_graph_goes_on_counting_in_the_phase_that_is_told(tmp_path: Path) -> None:
    model, tokens_TH = routed()
    with observatory.watch(model, tmp_path / "r", adapters=[routed_adapter()]) as watch:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            model(tokens_TH)
        torch.cuda.current_stream().wait_stream(side)
        watch.step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(tokens_TH)
        watch.step()
        with watch.phase("decode"):
            for _ in range(3):
                graph.replay()
            watch.step()
    found = totals(tmp_path / "r")
    assert {key: n for key, n in found.items() if n} == {
        (0, "unknown", 0): EVERY,
        (0, "unknown", 1): EVERY,
        (2, "decode", 0): 3 * EVERY,
        (2, "decode", 1): 3 * EVERY,
    }


@torch.no_grad()
def test_a_step_inside_a_graph_capture_is_refused(tmp_path: Path) -> None:
    model, tokens_TH = routed()
    with observatory.watch(model, tmp_path / "r", adapters=[routed_adapter()]) as watch:
        model(tokens_TH)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(tokens_TH)
            with pytest.raises(observatory.ObservatoryError, match="inside the capture of a CUDA graph"):
                watch.step()


@torch.no_grad()
def test_compiled_with_cuda_graphs_counts_every_call(tmp_path: Path) -> None:
    model, tokens_TH = routed()
    call = torch.compile(model, mode="reduce-overhead")
    with observatory.watch(model, tmp_path / "r", adapters=[routed_adapter()]) as watch:
        for _ in range(5):
            call(tokens_TH)
            watch.step()
    assert totals(tmp_path / "r") == {
        (step, "unknown", layer): EVERY for step in range(5) for layer in range(2)
    }

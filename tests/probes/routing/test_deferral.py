"""Calls whose ids are copied and counted together when the pass ends: nothing is lost or changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import observatory
from observatory.probes.options import Verify
from observatory.probes.routing import deferral
from observatory.probes.routing.discover import find_sites
from observatory.probes.routing.probe import RoutingProbe
from tests.probes.tiny import HIDDEN, ChosenExperts, loads, tokens

EXPERTS, TOP_K = 4, 2


class GivenLayer(nn.Module):
    """A block whose choice is given, and which may do something with its ids after its experts are called."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = ChosenExperts(EXPERTS)
        self.afterwards: Callable[[torch.Tensor], object] = lambda _ids_TK: None

    def forward(self, hidden: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = self.experts(hidden, ids_TK, torch.ones(ids_TK.shape))
        self.afterwards(ids_TK)
        return mixed


class GivenModel(nn.Module):
    """Layers that are called with each of the given ids, one after the other."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GivenLayer() for _ in range(layers))
        self.eval()

    def forward(self, ids: list[torch.Tensor]) -> None:
        for layer in self.layers:
            for ids_TK in ids:
                layer(torch.ones(len(ids_TK), HIDDEN), ids_TK)


def drawn(*shapes: tuple[int, int]) -> list[torch.Tensor]:
    return [torch.randint(EXPERTS, shape) for shape in shapes]


def counted(
    path: Path, model: GivenModel, *passes: list[torch.Tensor], verify: Verify = "first"
) -> tuple[dict[int, list[int]], int]:
    """Loads of each layer, and the tokens of layer 0, over passes of one step."""
    with observatory.watch(model, path, verify=verify) as watch:
        for ids in passes:
            model(ids)
        watch.step()
    by_layer = {layer: load for (_, _, layer), load in loads(path, experts=EXPERTS).items()}
    return by_layer, next(count for (_, _, layer), count in tokens(path).items() if layer == 0)


def expected(*passes: list[torch.Tensor]) -> list[int]:
    flat = torch.cat([ids_TK.reshape(-1) for ids in passes for ids_TK in ids])
    return torch.bincount(flat, minlength=EXPERTS).tolist()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_calls_are_kept_until_their_pass_ends_and_counted_with_it() -> None:
    model, seen = GivenModel(), list[tuple[int, int]]()
    probe = RoutingProbe(model, find_sites(model))

    def look(_ids_TK: torch.Tensor) -> None:
        (now,) = probe.phases.passes.values()
        seen.append((len(now.kept), int(next(iter(probe._devices.values())).counts.sum())))

    probe.attach()
    for number in range(3):
        model.layers[1].afterwards = look if number == 2 else model.layers[1].afterwards
        model(drawn((3, TOP_K)))
    probe.detach()
    calls = probe.take(step=0, stated_phase=None, ends_step=True).calls
    probe.release()
    assert seen == [(2, 2 * 2 * 3 * TOP_K)]
    assert calls.sum(axis=0).tolist() == [3, 3]


def test_what_the_model_does_to_its_ids_after_the_call_changes_no_count(tmp_path: Path) -> None:
    model, passes = GivenModel(), [drawn((5, TOP_K)) for _ in range(6)]
    wanted = expected(*passes)
    model.layers[1].afterwards = lambda ids_TK: ids_TK.fill_(0)
    by_layer, _ = counted(tmp_path / "r", model, *passes, verify="none")
    assert by_layer == {0: wanted, 1: wanted}


def test_calls_of_other_shapes_in_one_pass_add_up_with_their_tokens(tmp_path: Path) -> None:
    passes = [drawn((5, TOP_K), (1, TOP_K), (3, 1), (0, TOP_K)) for _ in range(4)]
    by_layer, count = counted(tmp_path / "r", GivenModel(), *passes)
    assert by_layer == {0: expected(*passes), 1: expected(*passes)}
    assert count == 4 * 9


def test_more_calls_than_are_kept_are_counted_in_the_middle_of_the_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 8
    monkeypatch.setattr(deferral, "MOST_KEPT", most)
    longest, add = list[int](), deferral.KeptCounts.add

    def noted(self: deferral.KeptCounts, kept: list[deferral.Kept], *rest: object) -> None:
        longest.append(len(kept))
        add(self, kept, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(deferral.KeptCounts, "add", noted)
    passes = [drawn(*[(2, TOP_K)] * 20) for _ in range(2)]
    by_layer, count = counted(tmp_path / "r", GivenModel(), *passes)
    assert by_layer == {0: expected(*passes), 1: expected(*passes)}
    assert count == 2 * 20 * 2
    assert max(longest) == most


def test_a_long_call_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deferral, "MOST_IDS", 6)
    model = GivenModel(layers=1)
    probe = RoutingProbe(model, find_sites(model))
    kept = list[int]()
    probe.attach()
    for rows in (3, 3, 3, 4):
        model.layers[0].afterwards = lambda _ids: kept.extend(
            len(now.kept) for now in probe.phases.passes.values()
        )
        model(drawn((rows, TOP_K)))
    probe.detach()
    probe.release()
    assert kept[2:] == [1, 0]


def test_ids_out_of_range_of_a_kept_call_count_for_nobody(tmp_path: Path) -> None:
    wild = torch.tensor([[-1, 0], [EXPERTS, 1], [2**40, 2]])
    passes = [drawn((3, TOP_K)), drawn((3, TOP_K)), drawn((3, TOP_K)), [wild]]
    by_layer, count = counted(tmp_path / "r", GivenModel(1), *passes[:3])
    model = GivenModel(1)
    model.layers[0].experts.forward = lambda hidden, *_rest: hidden
    with observatory.watch(model, tmp_path / "w", verify="none") as watch:
        for ids in passes:
            model(ids)
        watch.step()
    ((_, load),) = loads(tmp_path / "w", experts=EXPERTS).items()
    assert load == [a + b for a, b in zip(by_layer[0], [1, 1, 1, 0], strict=True)]
    assert sum(tokens(tmp_path / "w").values()) == count + 3


def test_a_pass_that_raises_keeps_what_was_counted_before(tmp_path: Path) -> None:
    model, passes = GivenModel(), [drawn((3, TOP_K)) for _ in range(4)]

    def fail(_ids_TK: torch.Tensor) -> None:
        raise MemoryError

    with observatory.watch(model, tmp_path / "r") as watch:
        for ids in passes[:3]:
            model(ids)
        model.layers[0].afterwards = fail
        with pytest.raises(MemoryError):
            model(passes[3])
        watch.step()
    by_layer = {layer: load for (_, _, layer), load in loads(tmp_path / "r", experts=EXPERTS).items()}
    assert by_layer == {0: expected(*passes), 1: expected(*passes[:3])}

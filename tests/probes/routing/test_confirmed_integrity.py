"""Routers, experts and blocks that change where each call is held against its experts."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import observatory
from observatory.run import Run
from tests.probes.routing.test_integrity import (
    AT,
    LAYERS,
    STEPS,
    TOP_K,
    counts,
    gaps,
    lost_only,
    x,
)
from tests.probes.tiny import HIDDEN


class ListedLayer(nn.Module):
    """A router that returns logits beside a list of experts: each call is held against its experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, 4)
        self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(4))
        self.top_k = TOP_K

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.gate(hidden).softmax(-1).topk(TOP_K)
        out = hidden.clone()
        for expert in chosen.unique().tolist():
            row, column = (chosen == expert).nonzero(as_tuple=True)
            out[row] += self.experts[expert](hidden[row]) * weights[row, column, None]
        return out


class Adapted(nn.Module):
    """What LoRA puts in the place of a linear layer."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora = nn.Linear(base_layer.in_features, base_layer.out_features, bias=False)

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.base_layer(hidden) + self.lora(hidden)
        return result


def listed(path: Path, act: Callable[[Any], None]) -> Run:
    torch.manual_seed(0)
    model = nn.Sequential(*(ListedLayer() for _ in range(LAYERS)))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", UserWarning)
        with observatory.watch(model, path, phase="prefill") as watch:
            for step in range(STEPS):
                if step == AT:
                    act(model)
                model(x())
                watch.step()
    return observatory.open_run(path)


def clear_experts(model: Any) -> None:
    for expert in model[1].experts:
        expert._forward_hooks.clear()


def clear_block(model: Any) -> None:
    model[1]._forward_hooks.clear()
    model[1]._forward_pre_hooks.clear()


def copy_gate(model: Any) -> None:
    model[1].gate = copy.deepcopy(model[1].gate)


def adapt_gate(model: Any) -> None:
    model[1].gate = Adapted(model[1].gate)


def new_expert(model: Any) -> None:
    model[1].experts[0] = nn.Linear(HIDDEN, HIDDEN)


@pytest.mark.parametrize(
    ("act", "code"),
    [
        (clear_experts, "hooks_removed"),
        (clear_block, "hooks_removed"),
        (copy_gate, "replaced"),
        (adapt_gate, "replaced"),
        (new_expert, "replaced"),
    ],
)
def test_layers_whose_choice_is_confirmed_in_each_call_cost_one_step_too(
    tmp_path: Path, act: Callable[[Any], None], code: str
) -> None:
    run = listed(tmp_path / "r", act)
    seen = counts(run)
    assert {key: n for key, n in seen.items() if key != (AT, 1)} == lost_only({1})
    partial = {
        (step, block.layer)
        for block in run.iter_loads()
        if block.partial_SP is not None
        for step in block.step_S[block.partial_SP[:, 0]].tolist()
    }
    assert partial == {(AT, 1)} & seen.keys()
    assert [(g.code, g.layer, g.first_step, g.steps) for g in gaps(run)] == [(code, 1, AT, 1)]
    assert run.manifest.state == "failed"


def test_an_expert_that_is_wrapped_loses_nothing(tmp_path: Path) -> None:
    def adapt_expert(model: Any) -> None:
        model[1].experts[0] = Adapted(model[1].experts[0])

    run = listed(tmp_path / "r", adapt_expert)
    assert (counts(run), gaps(run)) == (lost_only(set()), [])


def test_watched_experts_can_be_pickled_and_copies_of_them_count_nothing(tmp_path: Path) -> None:
    def copies(model: Any) -> None:
        other = pickle.loads(pickle.dumps(model))  # noqa: S301  # pickled here
        other(x())
        copy.deepcopy(model[0].experts[0])(x())
        buffer = io.BytesIO()
        torch.save(model[1].experts, buffer)

    run = listed(tmp_path / "r", copies)
    assert (counts(run), gaps(run), run.manifest.state) == (lost_only(set()), [], "complete")
    assert run.manifest.notes == ("watched modules were copied or pickled; calls of copies are not counted",)

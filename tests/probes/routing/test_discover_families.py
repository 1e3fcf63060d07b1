"""Every MoE family of the installed transformers, tiny: what is read is what is computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import nn

from observatory.errors import ModelError
from observatory.probes.routing.describe import router_digest
from observatory.probes.routing.discover import find_sites
from observatory.probes.routing.sites import RoutingSite
from tests.probes.routing.counting import read_loads
from tests.probes.routing.families import NOT_ROUTED, moe_families, one_thread, tiny_inputs, tiny_model
from tests.probes.routing.references import (
    ComputedLoads,
    RecomputedLoads,
    best_with_skip,
    product_keys,
    two_best,
)

ROUTED = [family for family in moe_families() if family not in NOT_ROUTED]
#: families whose experts run in one way only, so that there is no grouped execution to compare
EAGER_ONLY = {
    "dbrx",
    "doge",
    "jetmoe",
    "llama4",
    "longcat_flash",
    "nllb_moe",
    "step3p7",
    "switch_transformers",
}
SCORERS: dict[str, tuple[str, Any]] = {
    "doge": ("router_gate", product_keys),
    "nllb_moe": ("router.classifier", two_best),
    "zaya": ("gate.router_mlp", best_with_skip),
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def reference(family: str, model: nn.Module, sites: list[RoutingSite]) -> AbstractContextManager[Any]:
    if family in SCORERS:
        return RecomputedLoads(model, sites, *SCORERS[family])
    return ComputedLoads(model)


@pytest.mark.parametrize("family", ROUTED)
def test_every_layer_is_known_by_its_router(family: str) -> None:
    model = tiny_model(family)
    digests = [router_digest(model, site) for site in find_sites(model)]
    if family == "doge":  # its router chooses among product keys, of which there are fewer than experts
        assert set(digests) == {None}
    else:
        assert None not in digests
        assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("family", ROUTED)
def test_loads_read_equal_loads_computed(family: str) -> None:
    model = tiny_model(family)
    sites = find_sites(model)
    with torch.no_grad(), read_loads(sites) as read, reference(family, model, sites) as computed:
        model(**tiny_inputs(model))
    for site in sites:
        loads, tokens = read[site.spec.layer]
        assert loads == computed.of(site), site.spec.module
        if site.spec.top_k is not None and not site.spec.null_experts:
            assert sum(loads) == tokens * site.spec.top_k
    assert sum(tokens for _, tokens in read.values()) > 0
    assert len(read) == len(sites)  # layer numbers are unique


@pytest.mark.parametrize("family", [family for family in ROUTED if family not in EAGER_ONLY])
def test_grouped_execution_is_read_like_eager_execution(family: str) -> None:
    model = tiny_model(family)
    model.set_experts_implementation("grouped_mm")
    sites = find_sites(model)
    with torch.no_grad(), read_loads(sites) as read, reference(family, model, sites) as computed:
        model(**tiny_inputs(model))
    assert any(tokens for _, tokens in read.values())
    assert {s.spec.layer: computed.of(s) for s in sites} == {
        layer: loads for layer, (loads, _) in read.items()
    }


@pytest.mark.parametrize("family", sorted(EAGER_ONLY))
def test_families_said_to_run_one_way_only_do(family: str) -> None:
    with pytest.raises(ValueError, match="does not support setting experts implementation"):
        tiny_model(family).set_experts_implementation("grouped_mm")


def test_there_are_more_than_45_families_and_every_exclusion_exists() -> None:
    assert len(ROUTED) > 45
    assert set(NOT_ROUTED) <= set(moe_families())


def test_experts_that_the_caller_picks_are_refused_not_counted() -> None:
    from transformers import VitPoseBackbone, VitPoseBackboneConfig

    config = VitPoseBackboneConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_experts=2,
        part_features=4,
        image_size=[32, 32],
    )
    with pytest.raises(ModelError, match=r"layer\.0\.mlp\.experts.*picked by the caller"):
        find_sites(VitPoseBackbone(config))

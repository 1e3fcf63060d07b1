"""Megatron-Core and DeepSpeed: their real router classes where installed, doubles of them everywhere.

The real ones run on a CPU: ``pip install --no-deps megatron-core`` and ``pip install deepspeed``.
"""

from __future__ import annotations

import importlib
import os
import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from observatory.probes.routing.discover import find_sites
from tests.probes.routing.counting import loads_of, read_loads
from tests.probes.routing.homemade import (
    HIDDEN,
    DeepSpeedGateDouble,
    GateMoe,
    MegatronRouterDouble,
    Stack,
)

EXPERTS = 8


def installed(name: str) -> ModuleType:
    """The module, or skip the test with the reason it cannot be imported."""
    environment = dict(os.environ)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name.partition('.')[0]} is not installed here: {error}")
    finally:  # DeepSpeed and the compilers behind Megatron-Core set variables when imported
        for variable in os.environ.keys() - environment.keys():
            del os.environ[variable]


def megatron_router(monkeypatch: pytest.MonkeyPatch, top_k: int, **options: Any) -> nn.Module:
    """The real ``TopKRouter`` on the CPU; CUDA's current device and Transformer Engine are stood in for."""
    router = installed("megatron.core.transformer.moe.router")
    configuration = installed("megatron.core.transformer.transformer_config")
    groups = installed("megatron.core.process_groups_config").ProcessGroupCollection()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    utilities = installed("megatron.core.transformer.moe.moe_utils")
    monkeypatch.setattr(utilities, "te_general_gemm", None, raising=False)
    for name in ("tp", "cp", "tp_cp", "tp_dp_cp", "ep", "expt_tp", "tp_ep"):
        setattr(groups, name, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = configuration.TransformerConfig(
            num_layers=1,
            hidden_size=HIDDEN,
            num_attention_heads=2,
            num_moe_experts=EXPERTS,
            moe_router_topk=top_k,
            moe_router_load_balancing_type="none",
            use_cpu_initialization=True,
            add_bias_linear=False,
            **options,
        )
        module: nn.Module = router.TopKRouter(config, groups)
    return module


@pytest.mark.parametrize("real", [False, True], ids=["double", "megatron-core"])
def test_a_routing_map_is_read_as_the_tokens_it_sends(real: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    router = megatron_router(monkeypatch, 3) if real else MegatronRouterDouble(EXPERTS, 3)
    model = Stack(GateMoe("router", router, EXPERTS))
    (site,) = find_sites(model)
    hidden = torch.randn(6, 2, HIDDEN)  # sequence, batch, H
    with torch.no_grad(), read_loads([site]) as read:
        router(hidden)
    best = (hidden @ router.weight.T).reshape(-1, EXPERTS).sort(dim=-1, descending=True).indices[:, :3]
    assert read[0] == (torch.bincount(best.flatten(), minlength=EXPERTS).tolist(), 12)
    assert (site.spec.module, site.spec.experts, site.spec.top_k) == ("layers.0.mlp.router", EXPERTS, 3)


def test_megatron_counts_what_is_left_after_its_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    router = megatron_router(monkeypatch, 2, moe_expert_capacity_factor=0.5)
    (site,) = find_sites(Stack(GateMoe("router", router, EXPERTS)))
    with torch.no_grad(), read_loads([site]) as read:
        router(torch.randn(32, 1, HIDDEN))
    assert max(read[0][0]) <= 4  # 32 tokens x 2 / 8 experts x 0.5
    assert 0 < sum(read[0][0]) < 64


def deepspeed_gate(k: int) -> nn.Module:
    """The real ``TopKGate`` with room for three tokens per expert and nothing random."""
    moe = installed("deepspeed.moe.sharded_moe")
    gate: nn.Module = moe.TopKGate(
        HIDDEN,
        4,
        k=k,
        eval_capacity_factor=0.1,
        min_capacity=3,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )
    return gate.eval()


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("real", [False, True], ids=["double", "deepspeed"])
def test_a_capacity_gate_is_read_after_dropping(real: bool, k: int, sparse: bool) -> None:
    gate = deepspeed_gate(k) if real else DeepSpeedGateDouble(k=k)
    (site,) = find_sites(Stack(GateMoe("gate", gate, 4)))
    hidden = torch.randn(20, HIDDEN)
    with torch.no_grad():
        output = gate(hidden, None, sparse)
        decision = site.read(gate, (hidden,), {}, output)
    wanted = torch.bincount(gate.wg(hidden).topk(k).indices.flatten(), minlength=4)
    assert decision is not None
    assert decision.tokens == 20
    assert loads_of(decision, 4).tolist() == wanted.clamp(max=3).tolist()
    assert output[-1].tolist() == wanted.tolist()  # the gate's own counts are those before dropping
    assert (site.spec.experts, site.spec.top_k) == (4, k)

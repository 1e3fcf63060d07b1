"""Verifies the MoE layers of installed frameworks; a program of its own, for what they do to a process.

``python -m tests.probes.routing.framework_cases`` prints one JSON object: name of the case -> what was found.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from observatory.probes.routing.discover import find_sites
from tests.probes.routing.megatron_cases import (
    EXPERTS,
    HIDDEN,
    TOP_K,
    Layers,
    pretend_there_is_a_gpu,
    split_sizes_on_the_host,
)
from tests.probes.routing.verification import BREAKS, broken, verdicts

TOKENS = (24, 2)

#: megatron-core's MoELayer: name -> options
MEGATRON: dict[str, dict[str, Any]] = {
    "all-to-all": {},
    "all-gather": {"moe_token_dispatcher_type": "allgather"},
    "shared expert": {"moe_shared_expert_intermediate_size": 32},
    "expert bias, sigmoid": {
        "moe_router_enable_expert_bias": True,
        "moe_router_score_function": "sigmoid",
    },
    "group limit": {"moe_router_num_groups": 2, "moe_router_group_topk": 1},
    "capacity, dropping": {"moe_expert_capacity_factor": 1.5},
    "capacity, padded": {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True},
}

#: Cases in which every expert computes as many tokens, so that shifted ids count the same.
EVEN = ("capacity, padded",)


def megatron() -> Iterator[tuple[str, nn.Module]]:
    pretend_there_is_a_gpu()
    place = Path(tempfile.mkdtemp()) / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=0, world_size=1)
    from megatron.core import parallel_state
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    moe_utils.te_general_gemm = None
    token_dispatcher.maybe_move_tensor_to_cpu = split_sizes_on_the_host
    parallel_state.initialize_model_parallel()
    for name, options in MEGATRON.items():
        torch.manual_seed(3)
        yield name, Layers(1, **options).eval()


class Chain(nn.Module):
    """MoE layers in a row; further arguments go to each of them."""

    def __init__(self, *layers: nn.Module, others: tuple[torch.Tensor, ...] = ()) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.others = others
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = hidden + layer(hidden, *self.others)
        return hidden


def torchtitan() -> Iterator[tuple[str, nn.Module]]:
    from torchtitan.models.common import moe, token_dispatcher
    from torchtitan.models.common.linear import Linear

    config = moe.MoE.Config(
        num_experts=EXPERTS,
        routed_experts=moe.RoutedExperts.Config(
            inner_experts=moe.GroupedExperts.Config(dim=HIDDEN, hidden_dim=HIDDEN, num_experts=EXPERTS),
            token_dispatcher=token_dispatcher.LocalTokenDispatcher.Config(num_experts=EXPERTS, top_k=TOP_K),
        ),
        router=moe.TokenChoiceTopKRouter.Config(
            num_experts=EXPERTS,
            top_k=TOP_K,
            gate=Linear.Config(in_features=HIDDEN, out_features=EXPERTS, bias=False),
        ),
    )
    model = Chain(config.build(), config.build())
    for buffer in model.buffers():
        nn.init.normal_(buffer)
    yield "token choice, expert bias", model


def automodel() -> Iterator[tuple[str, nn.Module]]:
    from nemo_automodel.components.models.common import BackendConfig
    from nemo_automodel.components.moe.config import MoEConfig
    from nemo_automodel.components.moe.layers import MoE

    config = MoEConfig(
        n_routed_experts=EXPERTS,
        n_shared_experts=1,
        n_activated_experts=TOP_K,
        n_expert_groups=1,
        n_limited_groups=1,
        train_gate=True,
        gate_bias_update_factor=0.0,
        aux_loss_coeff=0.0,
        score_func="softmax",
        route_scale=1.0,
        dim=HIDDEN,
        inter_dim=HIDDEN,
        moe_inter_dim=HIDDEN,
        norm_topk_prob=True,
        dtype=torch.float32,
    )
    backend = BackendConfig(
        attn="sdpa",
        linear="torch",
        rms_norm="torch",
        dispatcher="torch",
        fake_balanced_gate=False,
        enable_hf_state_dict_adapter=False,
        experts="torch",
    )
    padding = torch.zeros(*TOKENS, dtype=torch.bool)
    padding[1:5] = True
    yield "padding mask", Chain(MoE(config, backend), MoE(config, backend), others=(padding,)).eval()


FRAMEWORKS: dict[str, tuple[str, Callable[[], Iterator[tuple[str, nn.Module]]]]] = {
    "megatron-core": ("megatron", megatron),
    "torchtitan": ("torchtitan", torchtitan),
    "nemo-automodel": ("nemo_automodel", automodel),
}


def found_in(model: nn.Module) -> dict[str, Any]:
    """The verdicts of both witnesses, and which broken readers they catch."""
    sites = find_sites(model)
    torch.manual_seed(4)
    inputs = {"hidden": torch.randn(*TOKENS, HIDDEN)}
    found: dict[str, Any] = {"how": sites[0].how}
    for verify in ("first", "intervention"):
        by, refusal = verdicts(model, sites, inputs, verify=verify)
        found[verify] = {"by": [v.by for v in by], "reasons": [v.reason for v in by], "refusal": refusal}
        found[verify]["caught"] = [
            name
            for name, change in BREAKS.items()
            if verdicts(model, [broken(s, change) for s in sites], inputs, verify=verify)[1] is not None
        ]
    return found


def installed_frameworks() -> dict[str, dict[str, Any]]:
    """Case -> what was found, of all frameworks that are installed, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", __name__], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for distribution, (module, cases) in FRAMEWORKS.items():
        if importlib.util.find_spec(module) is not None:
            version = importlib.metadata.version(distribution)
            for name, model in cases():
                found[f"{distribution} {version}: {name}"] = found_in(model)
    print(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # process groups are not worth taking down one by one


if __name__ == "__main__":
    main()

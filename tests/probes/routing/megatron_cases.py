"""Two ranks train megatron-core's own MoE layers under a watch; run by test_exchange_megatron.py.

megatron-core expects a GPU. Its layers and its dispatcher run as published; inert stand-ins take the place
of what only a GPU has: streams, events, the current device, and the conversion of split sizes that it makes
while it copies them from the device. ``te_general_gemm`` is what its own import leaves undefined without
TransformerEngine.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import observatory
from observatory.probes.exchange.tap import is_tapped

WORLD, LAYERS, EXPERTS, TOP_K, HIDDEN, STEPS = 2, 2, 4, 2, 16, 3


class Inert:
    """A stream or event where there is no device: everything has always happened."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def record_event(self) -> Inert:
        return self

    def wait_stream(self, _stream: Inert) -> None: ...

    def synchronize(self) -> None: ...


def split_sizes_on_the_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:  # noqa: ARG001
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def pretend_there_is_a_gpu() -> None:
    cuda: Any = torch.cuda
    cuda.Stream = cuda.Event = Inert
    cuda.current_stream = Inert
    cuda.stream = lambda _stream: contextlib.nullcontext()
    cuda.current_device = lambda: torch.device("cpu")


class Layers(nn.Module):
    """megatron-core's MoE layers in a row, with the splits that their dispatchers used."""

    def __init__(self, ep: int, **options: Any) -> None:
        super().__init__()
        from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
        from megatron.core.transformer.moe.moe_layer import MoELayer
        from megatron.core.transformer.transformer_config import TransformerConfig

        settings = {
            "num_layers": LAYERS,
            "hidden_size": HIDDEN,
            "num_attention_heads": 2,
            "num_moe_experts": EXPERTS,
            "moe_router_topk": TOP_K,
            "expert_model_parallel_size": ep,
            "moe_token_dispatcher_type": "alltoall",
            "moe_router_load_balancing_type": "none",
            "moe_ffn_hidden_size": 32,
            "ffn_hidden_size": 32,
            "use_cpu_initialization": True,
            "add_bias_linear": False,
            **options,
        }
        spec = get_moe_module_spec(use_te=False, num_experts=EXPERTS, moe_grouped_gemm=False)
        self.layers = nn.ModuleList(
            MoELayer(TransformerConfig(**settings), spec.submodules, layer_number=number + 1)
            for number in range(LAYERS)
        )
        self.splits: list[tuple[list[int], list[int]] | None] = []

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = hidden + layer(hidden)[0]
            self.splits.append(splits_of(layer.token_dispatcher))
        return hidden


def splits_of(dispatcher: Any) -> tuple[list[int], list[int]] | None:
    """Rows to and from each rank, as the dispatcher says; None for one that has none."""
    sides = [getattr(dispatcher, name, None) for name in ("input_splits", "output_splits")]
    if any(side is None for side in sides):
        return None
    sends, receives = (side.tolist() if hasattr(side, "tolist") else list(side) for side in sides)
    return sends, receives


def train(model: Layers, rank: int, watch: Any = None, *, even: bool = False) -> list[torch.Tensor]:
    """Losses and gradients of a few steps.

    Args:
        model: the layers.
        rank: this rank; it has as many more tokens.
        watch: notified of steps.
        even: all ranks have as many tokens, as a gather needs.
    """
    seen = []
    for step in range(STEPS):
        torch.manual_seed(10 * step + rank)
        hidden = torch.randn(5 + (0 if even else rank), 2, HIDDEN, requires_grad=True)
        loss = model(hidden).square().mean()
        loss.backward()
        seen += [loss.detach(), hidden.grad.clone()]
        if watch is not None:
            watch.step()
    return seen


#: Name of the run -> expert-parallel degree and what is asked of megatron-core, by number of ranks.
CASES: dict[int, dict[str, tuple[int, dict[str, Any]]]] = {
    2: {
        "run": (2, {}),
        "gather": (2, {"moe_token_dispatcher_type": "allgather"}),
        "shared": (2, {"moe_shared_expert_intermediate_size": 32, "moe_shared_expert_overlap": True}),
        "capacity": (2, {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}),
    },
    4: {
        "ep4": (4, {}),
        "ep2": (2, {}),
        "ep2_gather": (2, {"moe_token_dispatcher_type": "allgather"}),
    },
}


#: Those in which all ranks must have as many tokens.
EVEN = ("gather", "capacity", "ep2_gather")


def main(world: int = WORLD) -> None:
    out, rank = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    pretend_there_is_a_gpu()
    dist.init_process_group("gloo", init_method=f"file://{out / 'rendezvous'}", rank=rank, world_size=world)
    import megatron.core
    from megatron.core import parallel_state
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    moe_utils.te_general_gemm = None
    token_dispatcher.maybe_move_tensor_to_cpu = split_sizes_on_the_host
    facts: dict[str, Any] = {"version": megatron.core.__version__}
    for name, (ep, options) in CASES[world].items():
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(expert_model_parallel_size=ep)
        torch.manual_seed(3)
        model, even = Layers(ep, **options), name in EVEN
        plain = train(model, rank, even=even)
        model.splits.clear()
        with observatory.watch(model, out / name, model_name="megatron-core MoELayer") as watch:
            dist.barrier()
            watched = train(model, rank, watch, even=even)
        facts[name] = {
            "splits": model.splits,
            "same": all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True)),
            "tapped": is_tapped(),
        }
    (out / f"facts-{rank}.json").write_text(json.dumps(facts), encoding="utf-8")
    dist.barrier()
    os._exit(0)  # megatron-core's groups are not worth taking down one by one


if __name__ == "__main__":
    main()

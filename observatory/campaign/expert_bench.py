"""Times the experts of a model, or of a shape with random weights, as one rank would hold them."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from observatory.errors import BenchmarkError, ModelError
from observatory.run.documents.expert_bench import ELEMENT_BYTES, ExpertBench

_SIZES = 4
_MOST_EXPERTS = 65536

if TYPE_CHECKING:
    from observatory.collectives.bench.experts import ExpertGrid
    from observatory.probes.routing.sites import RoutingSite


def check_experts_bench(
    model: str | None, shape: Sequence[int] | None, *, device: str, dtype: str | None
) -> None:
    """Refuse what cannot be timed, before anything is loaded.

    Raises:
        ModelError: no such model, a library is missing, or torch has no such device.
        BenchmarkError: both or neither of model and shape, or a shape that is none.
    """
    from observatory.campaign.preflight import check_device, check_libraries, check_model
    from observatory.zoo.models import check_dtype

    if (model is None) == (shape is None):
        raise BenchmarkError(
            "the experts are those of a model or of a shape", expected="exactly one of MODEL and --shape"
        )
    if model is not None:
        check_model(model, device=device, dtype=dtype, moe=True)
        return
    assert shape is not None
    if len(shape) != _SIZES or shape[3] > shape[2] or shape[2] > _MOST_EXPERTS:
        raise BenchmarkError(
            f"--shape {','.join(map(str, shape))} is none",
            expected="H,F,E,K: hidden and intermediate size, experts, and at most as many experts per token",
        )
    check_libraries()
    check_dtype(dtype)
    check_device(device)


def bench_experts(
    grid: ExpertGrid,
    *,
    model: str | None = None,
    shape: Sequence[int] | None = None,
    layer: int | None = None,
    ep: int = 1,
    device: str = "cpu",
    dtype: str | None = None,
    argv: tuple[str, ...] = (),
    progress: Callable[[int, int], None] | None = None,
) -> ExpertBench:
    """Load or make a layer and time its experts.

    Args:
        grid: what is timed.
        model: bundled name, checkpoint directory or hub id; None where a shape is given.
        shape: hidden size, intermediate size, experts and experts per token of gated experts with random
            weights.
        layer: MoE layer of the model; None for its first.
        ep: ranks over which the experts are spread; those of one are timed.
        device: torch device.
        dtype: torch dtype name of the weights; None for the loader's choice.
        argv: command line, for the document.
        progress: takes rounds done and rounds in all.

    Raises:
        ModelError, BenchmarkError: no such model or layer, or its experts cannot be timed.
    """
    import torch

    from observatory.collectives.bench.experts import shape_of, time_experts
    from observatory.host.provenance import collect_provenance
    from observatory.run.usable_cores import find_cores
    from observatory.zoo.models import quiet_transformers

    with torch.inference_mode(), quiet_transformers():
        if shape is not None:
            site = _of_shape(shape, ep=ep, device=device, dtype=dtype)
            measured = shape_of(site).model_copy(update={"experts": shape[2]})
            experts_here = site.spec.experts
        else:
            assert model is not None
            site = _of_model(model, layer=layer, device=device, dtype=dtype)
            measured = shape_of(site)
            experts_here = _experts_of_rank(measured.experts, ep)
        timed = time_experts(site, grid, experts_here=experts_here, progress=progress)
    origin = collect_provenance()
    return ExpertBench(
        created_unix_s=time.time(),
        argv=argv,
        model=model,
        layer=None if model is None else site.spec.layer,
        shape=measured,
        experts_here=experts_here,
        device=torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        warmup=grid.warmup,
        seed=grid.seed,
        points=timed.points,
        shared_points=timed.shared_points,
        local_points=timed.local_points,
        notes=timed.notes,
        git_sha=origin["git_sha"],
        hosts=origin["hosts"],
        software=origin["software"],
        cores=find_cores(),
    )


def _experts_of_rank(experts: int, ep: int) -> int:
    if experts % ep:
        fitting = ", ".join(str(ranks) for ranks in range(1, experts + 1) if experts % ranks == 0)
        raise BenchmarkError(
            f"{ep} ranks do not divide {experts} experts", expected=f"one of {fitting} for --ep"
        )
    return experts // ep


def _of_model(name: str, *, layer: int | None, device: str, dtype: str | None) -> RoutingSite:
    """A MoE layer of a model."""
    from observatory.probes.routing.discover import find_sites
    from observatory.zoo.models import load_model

    sites = find_sites(load_model(name, device=device, dtype=dtype).model)
    chosen = [site for site in sites if layer in (None, site.spec.layer)]
    if not chosen:
        layers = ", ".join(str(site.spec.layer) for site in sites)
        raise ModelError(f"{name} has no MoE layer {layer}", expected=f"one of {layers}")
    return chosen[0]


def _of_shape(shape: Sequence[int], *, ep: int, device: str, dtype: str | None) -> RoutingSite:
    """The one MoE layer of a model that is made for it, with the experts of one rank."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from observatory.probes.routing.discover import find_sites

    hidden, intermediate, experts, top_k = shape
    here = _experts_of_rank(experts, ep)
    kind = dtype or "float32"
    _check_memory(3 * hidden * intermediate * here * ELEMENT_BYTES[kind], device)
    configure: Any = Qwen3MoeConfig  # it is typed in parts only
    config = configure(
        hidden_size=hidden,
        moe_intermediate_size=intermediate,
        intermediate_size=1,
        num_experts=here,
        num_experts_per_tok=min(top_k, here),
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=8,
    )
    with torch.device(device):
        model = Qwen3MoeForCausalLM(config).to(getattr(torch, kind)).eval()
    return find_sites(model)[0]


def _check_memory(weights_bytes: int, device: str) -> None:
    """Refuse weights for which there is no memory; twice their bytes are needed while they are made."""
    import torch

    if device.startswith("cuda"):
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 2 * weights_bytes > free:
        ranks = math.ceil(2 * weights_bytes / max(free, 1))
        raise BenchmarkError(
            f"experts of {weights_bytes >> 20} MiB do not fit into {free >> 20} MiB of free memory",
            expected="at most half of it",
            remedy=f"give --ep {ranks} or more to time the experts of one rank",
        )

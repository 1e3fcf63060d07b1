"""What identifies an MoE layer across ranks: a digest of its router's weights.

Module names and numbers do not: pipeline stages that are models of their own begin at layer 0 each. Routers
are whole on every rank of data and expert parallelism, and the weights of no two layers are alike. Nothing is
concluded from weights of which another rank may hold another part (DTensors, flat shards, tensor
parallelism), that are packed, or that are constant (routers initialised with zeros).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from observatory.probes.routing.moe_block import looks_like_router
from observatory.probes.routing.sites import RoutingSite
from observatory.run.manifest import RankLayer

#: Elements that are read of a router's weights, spread evenly over them.
_READ = 64


def layers_now(
    model: nn.Module, sites: Sequence[RoutingSite], before: Sequence[RankLayer] = ()
) -> tuple[RankLayer, ...]:
    """The MoE layers that this rank holds, each with the digest of its router's weights as they are now.

    Args:
        model: the model.
        sites: the result of ``find_sites``.
        before: an earlier result, whose digests come first: replicas may be made equal after the watch began.
            Where weights cannot be read any more (they were sharded since), the earlier digest goes as well.
    """
    earlier = {item.layer: item.router_digests for item in before}
    found = []
    for site in sites:
        now = router_digest(model, site)
        digests = () if now is None else (*earlier.get(site.spec.layer, ()), now)
        found.append(RankLayer(**site.spec.model_dump(), router_digests=tuple(dict.fromkeys(digests))))
    return tuple(found)


def router_digest(model: nn.Module, site: RoutingSite) -> str | None:
    """Digest of shape and some elements of the weights of a layer's router; None where none can be read.

    The weights are those with one row or column per expert, null and shared experts included or not. Waits
    for the device.
    """
    spec = site.spec
    outputs = {spec.experts + more for more in (0, spec.null_experts, spec.shared_experts or 0)}
    for router in _routers(model, site):
        for weight in router.parameters():
            if _is_whole(weight) and weight.ndim == 2 and outputs & set(weight.shape):
                return _digest(weight.detach())
    return None


def _routers(model: nn.Module, site: RoutingSite) -> Iterator[nn.Module]:
    """Modules that may be the router: the one whose call is read, then those in it, then those beside it."""
    path, _, name = site.spec.module.rpartition(".")
    if looks_like_router(name, site.module):
        yield site.module
    block = site.block
    if block is None:
        block = model.get_submodule(path) if site.spec.module else site.module
    for around in dict.fromkeys((site.module, block)):
        yield from (child for own, child in around.named_children() if looks_like_router(own, child))


def _is_whole(weight: nn.Parameter) -> bool:
    """Whether a parameter is known, plain, and the same on all ranks that hold the layer."""
    return (
        type(weight.data) is torch.Tensor
        and weight.layout is torch.strided
        and weight.is_floating_point()
        and not weight.is_meta
        and not getattr(weight, "tensor_model_parallel", False)
    )


def _digest(weight_OI: torch.Tensor) -> str | None:
    rows, columns = weight_OI.shape
    places = torch.arange(_READ, device=weight_OI.device) * (rows * columns - 1) // (_READ - 1)
    values = weight_OI[places // columns, places % columns].to("cpu", torch.float64).tolist()
    if len(set(values)) < 2:
        return None
    content = struct.pack(f"<2q{_READ}d", rows, columns, *values)
    return hashlib.sha256(content).hexdigest()[:16]

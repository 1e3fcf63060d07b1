"""The model as the run describes it: sizes read from the modules, never guessed, and its layers' identities.

An MoE layer is identified across ranks by a digest of its router's weights. Module names and numbers do
not suffice: pipeline stages that are models of their own begin at layer 0 each. Routers
are whole on every rank of data and expert parallelism, and the weights of no two layers are alike. Nothing is
concluded from weights of which another rank may hold another part (DTensors, flat shards, tensor
parallelism), that are packed, or that are constant (routers initialised with zeros).
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterator, Sequence

import torch
from pydantic import JsonValue
from torch import nn

from observatory.probes.routing.moe_block import bare_model, int_attribute, looks_like_router
from observatory.probes.routing.sites import RoutingSite
from observatory.run.manifest import ModelSpec, RankLayer

#: Elements that are read of a router's weights, spread evenly over them.
_READ = 64
#: What of a configuration goes into the manifest.
_NAME = re.compile(r"[A-Za-z0-9_.*-]{1,64}")
_MOST_ENTRIES, _MOST_ITEMS, _MOST_SIZE = 200, 4096, 1 << 40


def describe_model(
    model: nn.Module,
    *,
    name: str,
    sites: Sequence[RoutingSite],
    family: str | None = None,
    mixer: str | None = None,
) -> ModelSpec:
    """Describe a model whose MoE layers were found.

    Args:
        model: the model.
        name: what the user calls it.
        sites: the result of ``find_sites``.
        family: architecture name; the configuration's ``model_type`` when None.
        mixer: sequence mixer, None when not known.

    Returns:
        The manifest's record. ``expert_bytes`` is None unless every layer stores its routed experts with
        the same number of bytes per expert; ``dtype`` is that of the routed experts, else of the first
        parameter.
    """
    config = getattr(bare_model(model), "config", None)
    text = getattr(config, "text_config", None) or config
    stated_family = getattr(config, "model_type", None)
    weights = [_expert_weights(model, site) for site in sites]
    sizes = {_bytes(w) // site.spec.experts if w else None for w, site in zip(weights, sites, strict=True)}
    dtypes = [p.dtype for w in weights for p in w if p.is_floating_point()]
    dtypes += [p.dtype for p in model.parameters()][:1]
    return ModelSpec(
        name=name,
        family=family or (stated_family if isinstance(stated_family, str) else None),
        mixer=mixer,
        hidden_size=int_attribute(text, ("hidden_size", "d_model", "n_embd")),
        expert_bytes=sizes.pop() if len(sizes) == 1 else None,
        parameters=sum(p.numel() for p in model.parameters()),
        dtype=str(dtypes[0]).removeprefix("torch.") if dtypes else None,
        moe_layers=tuple(site.spec for site in sites),
        config=_sizes(config),
    )


def _sizes(config: object) -> dict[str, JsonValue] | None:
    """Entries of a configuration that are sizes, kinds or lists of them; no texts of any length."""
    entries: object = getattr(config, "to_dict", dict)()
    if not isinstance(entries, dict):
        return None
    kept: dict[str, JsonValue] = {}
    for name, value in entries.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            continue
        if name in ("text_config", "quantization_config") and isinstance(value, dict):
            kept[name] = {key: item for key, item in value.items() if isinstance(key, str) and _is_size(item)}
        elif _is_size(value):
            kept[name] = value
    return dict(list(kept.items())[:_MOST_ENTRIES]) or None


def _is_size(value: object) -> bool:
    if isinstance(value, list):
        return len(value) <= _MOST_ITEMS and all(
            _is_size(item) and not isinstance(item, list) for item in value
        )
    if isinstance(value, str):
        return bool(_NAME.fullmatch(value))
    return isinstance(value, bool) or (isinstance(value, int) and abs(value) <= _MOST_SIZE)


def _expert_weights(model: nn.Module, site: RoutingSite) -> list[nn.Parameter]:
    """Parameters of the routed experts of one layer; empty when they are not where the call is read.

    Where the experts' call is read they are that module's parameters; where a router is read, those of the
    experts next to it. Parameters shared by all experts (a common norm) are left out.
    """
    block_path = site.spec.module.rpartition(".")[0]
    block = model.get_submodule(block_path) if block_path else model
    holders = [site.module] if "expert" in type(site.module).__name__.lower() else []
    holders = holders or [
        child
        for child_name, child in block.named_children()
        if "shared" not in child_name and "expert" in f"{child_name} {type(child).__name__}".lower()
    ]
    return [
        p
        for holder in holders
        for p in holder.parameters()
        if p.ndim >= 2 and (p.ndim == 2 or p.shape[0] >= site.spec.experts)
    ]


def _bytes(parameters: Sequence[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


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
    layers = []
    for site in sites:
        now = router_digest(model, site)
        digests = () if now is None else (*earlier.get(site.spec.layer, ()), now)
        layers.append(RankLayer(**site.spec.model_dump(), router_digests=tuple(dict.fromkeys(digests))))
    return tuple(layers)


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
    """Modules that may be the router: the one whose call is read, those in it, then those of its block."""
    path, _, name = site.spec.module.rpartition(".")
    if looks_like_router(name, site.module):
        yield site.module
    block = site.block
    if block is None:
        block = model.get_submodule(path) if site.spec.module else site.module
    for around in dict.fromkeys((site.module, block)):
        yield from (child for name, child in around.named_children() if looks_like_router(name, child))


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

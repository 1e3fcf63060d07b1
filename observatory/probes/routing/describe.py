"""The model as the manifest describes it: sizes read from the modules, never guessed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from observatory.probes.routing.moe_block import int_attribute
from observatory.probes.routing.sites import RoutingSite
from observatory.run.manifest import ModelSpec


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
    config = getattr(model, "config", None)
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
    )


def _expert_weights(model: nn.Module, site: RoutingSite) -> list[nn.Parameter]:
    """Parameters of the routed experts of one layer; empty when they are not where the call is read.

    Where the experts' call is read they are that module's parameters; where a router is read, those of the
    experts beside it. Parameters shared by all experts (a common norm) are left out.
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

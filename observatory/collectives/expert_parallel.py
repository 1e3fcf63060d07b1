"""Expert parallelism for a model that was written for one device.

Shapes: E experts, P ranks, T tokens, K assignments per token, H hidden size.

Every rank keeps its own batch and all weights but the experts'; of those it computes with its own. The
experts modules stay where they are and are called as before, so hooks on them see global expert ids; only
what a call does is exchanged for a dispatcher around a second module that holds the local experts. That
module is of the model's own class, so that activations, biases and scales are the family's own.

Replicated parameters (router, attention, shared experts) get a share of their gradients, as in data
parallelism: sum them over ranks. Local experts get the gradients of all ranks' tokens; with replicas, each
copy those of the tokens that it was given.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from observatory.collectives.autograd import Exchanger
from observatory.collectives.dispatch import Algorithm, ExpertMap, LocalExperts, make_dispatcher
from observatory.collectives.transport.base import agree
from observatory.collectives.transport.protocol import Transport
from observatory.errors import ModelError, PlacementError, alike
from observatory.probes.exchange.labels import ExchangeSink
from observatory.probes.routing.discover import find_sites
from observatory.probes.routing.sites import RoutingSite
from observatory.probes.routing.words import Reading

#: Rank, or ranks, of each expert: for all layers, or by layer number.
Placement = Sequence[int | Sequence[int]] | Mapping[int, Sequence[int | Sequence[int]]]

#: Share of its expert's tokens for each rank of each expert.
Shares = Sequence[Sequence[float]]

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts")


def linear_placement(experts: int, size: int) -> tuple[int, ...]:
    """Contiguous blocks of E / P experts.

    Raises:
        PlacementError: P does not divide E.
    """
    if experts % size:
        fitting = ", ".join(str(ranks) for ranks in range(1, experts + 1) if experts % ranks == 0)
        raise alike(
            PlacementError(
                f"{size} ranks do not divide {experts} experts; numbers of ranks that fit: {fitting}, or "
                "give a placement"
            )
        )
    return tuple(expert // (experts // size) for expert in range(experts))


def shard_experts(
    model: nn.Module,
    transport: Transport,
    *,
    placement: Placement | None = None,
    shares: Mapping[int, Shares] | None = None,
    algorithm: Algorithm = "flat",
    deduplicate: bool = False,
    sink: ExchangeSink | None = None,
    keep_full: bool = True,
) -> ShardedModel:
    """Make the experts of a model parallel over the ranks of a transport.

    Collective: all ranks call it with the same model and options.

    Args:
        model: a model whose experts modules are called with (hidden_states, expert ids, gate weights), as
            nearly all of transformers' are; the same weights on all ranks.
        transport: joins the ranks.
        placement: rank or ranks of each expert; None for contiguous blocks.
        shares: by layer number, the share of its expert's tokens for each of its ranks; without, a token goes
            to the nearest, and equals take turns.
        algorithm: ``flat``, ``hierarchical`` or ``gather``.
        deduplicate: send a token once per destination rank.
        sink: takes phases and exchanges.
        keep_full: keep the full weights, so that leaving the context gives the model back as it was. False
            frees the experts of other ranks for good.

    Returns:
        A context manager; the model is parallel inside it.

    Raises:
        ModelError: a MoE layer cannot be sharded.
        PlacementError: the placement does not fit the model or the ranks.
        ExchangeError: ranks disagree on model, options or placement.
    """
    sites = find_sites(model)
    placements = [_holders(placement, site, transport.size) for site in sites]
    agree(
        transport,
        {
            "the number of MoE layers": len(sites),
            "the layers and their experts": [[s.spec.layer, s.spec.module, s.spec.experts] for s in sites],
            "the shapes and dtypes of the experts": [_fingerprint(site.module) for site in sites],
            "algorithm": [algorithm, deduplicate],
            "placement": placements,
            "shares": [list(map(list, (shares or {}).get(site.spec.layer, ()))) for site in sites],
            "nodes": list(transport.node_of_P),
        },
    )
    exchanger = Exchanger(transport, sink)
    layers = []
    for site, holders_E in zip(sites, placements, strict=True):
        shares_E = (shares or {}).get(site.spec.layer)
        layers.append(
            shard_layer(site, exchanger, holders_E, algorithm, deduplicate=deduplicate, shares_E=shares_E)
        )
    return ShardedModel(model, layers, exchanger, keep_full=keep_full)


def shard_layer(
    site: RoutingSite,
    exchanger: Exchanger,
    holders_E: Sequence[Sequence[int]],
    algorithm: Algorithm = "flat",
    *,
    deduplicate: bool = False,
    shares_E: Shares | None = None,
) -> ShardedLayer:
    """One layer of `shard_experts`, ready to be attached."""
    experts = ExpertMap(holders_E, exchanger.transport.layout, shares_E)
    local = local_experts(site, experts.experts_here)
    dispatcher = make_dispatcher(
        algorithm,
        exchanger,
        experts,
        LocalExperts(run=local, parameters=tuple(local.parameters())),
        layer=site.spec.layer,
        deduplicate=deduplicate,
    )
    return ShardedLayer(site, experts, local, _forward(site, dispatcher))


class ShardedLayer:
    """One MoE layer, made parallel.

    Attributes:
        site: the layer.
        experts: who holds what.
        local: the module with this rank's experts.
    """

    def __init__(
        self, site: RoutingSite, experts: ExpertMap, local: nn.Module, forward: Callable[..., torch.Tensor]
    ) -> None:
        self.site = site
        self.experts = experts
        self.local = local
        self._forward = forward
        self._own_forward: Any = None

    def attach(self, *, keep_full: bool) -> None:
        """Put the dispatcher in the place of the module's computation."""
        module = self.site.module
        self._own_forward = vars(module).get("forward")
        module.forward = self._forward
        if not keep_full:
            for name, parameter in module.named_parameters(recurse=False):
                module._parameters[name] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    def detach(self) -> None:
        """Give the module its own computation back."""
        if self._own_forward is None:
            vars(self.site.module).pop("forward", None)
        else:
            self.site.module.forward = self._own_forward


class ShardedModel:
    """A model whose experts are spread over ranks while the context lasts.

    Attributes:
        model: the model; call it as before.
        layers: its MoE layers in order.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[ShardedLayer], exchanger: Exchanger, *, keep_full: bool
    ) -> None:
        self.model = model
        self.layers = tuple(layers)
        self._exchanger = exchanger
        self._keep_full = keep_full

    def __enter__(self) -> Self:
        for layer in self.layers:
            layer.attach(keep_full=self._keep_full)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._keep_full:
            for layer in self.layers:
                layer.detach()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        return self.model(*args, **kwargs)

    def report_to(self, sink: ExchangeSink) -> None:
        """Report phases and exchanges to this sink from now on."""
        self._exchanger.sink = sink

    def expert_parameters(self) -> Iterator[nn.Parameter]:
        """This rank's experts: what an optimiser of this rank trains, with gradients complete."""
        for layer in self.layers:
            yield from layer.local.parameters()

    def replicated_parameters(self) -> Iterator[nn.Parameter]:
        """Everything else: gradients are this rank's share, to be summed over ranks."""
        expert_parameters = {
            id(p) for layer in self.layers for p in layer.site.module.parameters(recurse=False)
        }
        yield from (p for p in self.model.parameters() if id(p) not in expert_parameters)

    def placement(self) -> tuple[tuple[int, ...], ...] | None:
        """Ranks of each expert if all layers agree; None when they do not."""
        holders = {layer.experts.holders_E for layer in self.layers}
        return holders.pop() if len(holders) == 1 else None


def _holders(placement: Placement | None, site: RoutingSite, size: int) -> list[list[int]]:
    """Ranks of each expert of one layer."""
    experts, layer = site.spec.experts, site.spec.layer
    if placement is None:
        placement = linear_placement(experts, size)
    if isinstance(placement, Mapping):
        if layer not in placement:
            raise PlacementError(f"the placement has no layer {layer}; expected one entry per MoE layer")
        placement = placement[layer]
    if len(placement) != experts:
        raise PlacementError(
            f"the placement places {len(placement)} experts, layer {layer} has {experts}; give one entry each"
        )
    return [[ranks] if isinstance(ranks, int) else list(ranks) for ranks in placement]


def _fingerprint(module: nn.Module) -> list[list[object]]:
    return [[name, list(p.shape), str(p.dtype)] for name, p in module.named_parameters(recurse=False)]


def local_experts(site: RoutingSite, experts_here: Sequence[int]) -> nn.Module:
    """A module of the same class with the weights of these experts only; everything else is shared."""
    module, experts, name = site.module, site.spec.experts, site.spec.module
    stacked = {key: p for key, p in module.named_parameters(recurse=False) if p.shape[:1] == (experts,)}
    if site.reading is not Reading.EXPERTS_CALL or not stacked or _others_stacked(module, stacked):
        raise ModelError(
            f"{name} ({type(module).__name__}) cannot be made expert-parallel; expected an experts module "
            f"called with (hidden states, expert ids, gate weights) whose weights all have the {experts} "
            "experts in front; profile it with --ep 1"
        )
    if site.spec.null_experts and hasattr(module, "zero_expert_num"):
        raise ModelError(
            f"{name} ({type(module).__name__}) cannot be made expert-parallel: its null experts compute; "
            "profile it with --ep 1"
        )
    local = copy.copy(module)
    for hooks in [key for key in vars(module) if key.endswith("_hooks") or "_hooks_" in key]:
        vars(local)[hooks] = OrderedDict()
    local._modules, local._buffers = dict(module._modules), dict(module._buffers)
    local._parameters = dict(module._parameters)
    held = torch.tensor(experts_here, dtype=torch.int64)
    for key, parameter in stacked.items():
        local_values = parameter.detach()[held.to(parameter.device)].clone()
        local._parameters[key] = nn.Parameter(local_values, requires_grad=parameter.requires_grad)
    for key, buffer in module.named_buffers(recurse=False):
        if buffer.shape[:1] == (experts,):
            local._buffers[key] = buffer[held.to(buffer.device)].clone()
    for key in _COUNTS:
        if getattr(module, key, None) == experts:
            setattr(local, key, len(experts_here))
    return local


def _others_stacked(module: nn.Module, stacked: Mapping[str, nn.Parameter]) -> bool:
    """Whether weights outside the stacked ones could be experts too."""
    stacks = [p for p in module.parameters(recurse=False) if p.ndim >= 3]
    inner = [p for p in module.parameters() if p.ndim >= 2 and all(p is not s for s in stacked.values())]
    return any(all(p is not s for s in stacked.values()) for p in stacks) or bool(inner)


def _forward(site: RoutingSite, dispatcher: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """What takes the place of the module's ``forward``."""
    module, name = site.module, site.spec.module

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
        decision = site.read(module, args, kwargs, None)
        ids = None if decision is None else decision.expert_ids
        weights = None if decision is None else decision.weights
        if ids is None or weights is None:
            raise ModelError(
                f"{name} ({type(module).__name__}) was called without expert ids and gate weights of one "
                "shape; it cannot be made expert-parallel"
            )
        width = hidden.shape[-1]
        outputs = dispatcher(
            hidden.reshape(-1, width), ids.reshape(-1, ids.shape[-1]), weights.reshape(-1, ids.shape[-1])
        )
        return outputs.reshape(hidden.shape)

    return forward

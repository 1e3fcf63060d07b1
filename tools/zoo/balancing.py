"""Keeping expert loads equal while training, and counting them.

Shapes: T tokens, E experts, K top-k, L MoE layers. Loads count assignments (token, expert).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class RoutingRecord:
    """What the routers decided in one forward pass.

    Attributes:
        logits_TE: gate logits of each MoE layer, in layer order, each of shape (T, E), with their graph.
        experts_TK: chosen experts of each MoE layer, each of shape (T, K).
    """

    logits_TE: "list[torch.Tensor]" = field(default_factory=list)
    experts_TK: "list[torch.Tensor]" = field(default_factory=list)


def find_routers(model: "torch.nn.Module") -> "list[torch.nn.Module]":
    """The routers of a zoo model in layer order; each returns (logits, weights, experts)."""
    return [module for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")]


@contextmanager
def record_routing(model: "torch.nn.Module") -> Iterator[RoutingRecord]:
    """Record routing while the context is open; clear the record's lists before each forward pass."""
    record = RoutingRecord()

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        record.logits_TE.append(output[0])
        record.experts_TK.append(output[2])

    handles = [router.register_forward_hook(keep) for router in find_routers(model)]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def expert_loads(record: RoutingRecord) -> "torch.Tensor":
    """Assignments per MoE layer and expert, shape (L, E), int64."""
    import torch

    return torch.stack(
        [
            torch.bincount(experts_TK.reshape(-1), minlength=logits_TE.shape[-1])
            for logits_TE, experts_TK in zip(record.logits_TE, record.experts_TK, strict=True)
        ]
    )


def switch_loss(record: RoutingRecord) -> "torch.Tensor":
    """Load-balancing loss of arXiv 2101.03961, summed over MoE layers.

    For one layer it is E * sum over experts of f_e * p_e, where f is the fraction of assignments and p the
    mean softmax probability; 1.0 for equal loads, so L in all. It is taken per layer: pooled over layers, as
    the helper of the model classes does it, opposite imbalances of two layers would cancel.
    """
    import torch

    loads_LE = expert_loads(record).float()
    fractions_LE = loads_LE / loads_LE.sum(dim=-1, keepdim=True)
    probabilities_LE = torch.stack(
        [logits_TE.float().softmax(dim=-1).mean(dim=0) for logits_TE in record.logits_TE]
    )
    return loads_LE.shape[-1] * (fractions_LE * probabilities_LE).sum()


def update_bias(model: "torch.nn.Module", record: RoutingRecord, *, rate: float) -> None:
    """Aux-loss-free balancing of arXiv 2408.15664: bias += rate * sign(mean load - load), per expert."""
    import torch

    loads_LE = expert_loads(record).float()
    with torch.no_grad():
        for router, loads_E in zip(find_routers(model), loads_LE, strict=True):
            bias_E: Any = router.e_score_correction_bias
            bias_E.add_(rate * torch.sign(loads_E.mean() - loads_E))

"""Where routing can be read in a model, and how.

Shapes: T tokens, K assignments per token, E experts. A *site* is one MoE layer together with the module
whose call shows its routing decision and a pure function that reads the decision from that call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from observatory.probes.routing.moe_block import states_capacity, with_settings
from observatory.probes.routing.words import Reading, sentence
from observatory.run.manifest import MoeLayerSpec

#: Attributes of experts that drop assignments over a capacity by themselves.
_CAPACITIES = ("capacity_factor", "expert_capacity", "expert_capacity_factor", "moe_capacity_factor")


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingDecision:
    """The routing decision of one layer call; tensors stay on their device.

    Attributes:
        expert_ids: logical expert of each assignment, integers of any shape whose leading part counts
            tokens, (T, K) as a rule. Entries outside 0..E-1 (padding, null experts, masked tokens) are
            not counted. None when ``routing_map`` is given.
        routing_map: (T, E), non-zero where the token goes to the expert. None when ``expert_ids`` is given.
        weights: gate weights, of the shape of ``expert_ids`` or ``routing_map``; None when not shown.
        token_mask: (T,) true for tokens that count; None when all of them do.
        token_slots: (T,) int64 or longer, the phase of each token as an index into ``counters.SLOTS``, or
            ``counters.NO_SLOT`` for one that does not count; None where the call has one phase. Such a
            decision leaves no token sample and no gate mass.
        tokens: T, known from shapes alone (no device read); None when shapes do not show it (expert choice).
        is_inferred: the choice was not seen but made again, as the K largest of logits; such a reading needs
            a witness (``witness.py``).
        is_dispatch: read from the tensor by which the block moves its tokens, so that this is what is
            dispatched; slots that stay empty are rows of the experts all the same.
    """

    expert_ids: torch.Tensor | None = None
    routing_map: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    token_mask: torch.Tensor | None = None
    token_slots: torch.Tensor | None = None
    tokens: int | None = None
    is_inferred: bool = False
    is_dispatch: bool = False


#: (module, positional arguments, keyword arguments, output or None before the call) -> decision, or None
#: when this call is not one to count. Must not read device values on the host.
ReadCall = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any], Any], RoutingDecision | None]

#: (module, callback) -> what ends it. Calls back with every decision of the module's layer, where no call of
#: a module shows it: from the program's own code, which compilers may trace; also while nothing is captured.
Listen = Callable[[nn.Module, Callable[[RoutingDecision], None]], Callable[[], None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingSite:
    """One MoE layer and the call that shows its routing.

    Attributes:
        spec: the layer as the manifest describes it.
        module: module whose call is watched.
        when: read ``before`` the call (from its inputs) or ``after`` it (from its output).
        reading: how the call is read.
        detail: the argument that is read, or the phrase of an adapter.
        read: takes the call apart.
        block: the MoE block around it, whose calls are looked at as well; None where it is not known.
        is_repeatable: calling ``block`` again changes nothing but its own tensors; not so where a module
            further out had to take its place.
        experts: the experts, where they are modules that are called one by one; empty elsewhere.
        infers: readings may be inferred (``RoutingDecision.is_inferred``), or experts may leave tokens out
            by a mask that is not understood.
        shows_gates: the gates are read, not what is dispatched by them; experts that compute something else
            are stated, and the gates are counted all the same.
        listen: brings the decisions in place of ``read``; None where calls are read.
        plain_ids: name and position of the argument with the ids, (T, K), where a call that is given them in
            two dimensions shows nothing else by which they count; None elsewhere.
    """

    spec: MoeLayerSpec
    module: nn.Module
    when: Literal["before", "after"]
    reading: Reading
    read: ReadCall
    detail: str = ""
    block: nn.Module | None = None
    is_repeatable: bool = True
    experts: tuple[nn.Module, ...] = ()
    infers: bool = False
    shows_gates: bool = False
    listen: Listen | None = None
    plain_ids: tuple[str, int] | None = None

    @property
    def how(self) -> str:
        """How the call is read, e.g. "experts call (top_k_index)"."""
        return sentence(self.reading, detail=self.detail)


def shown_by(decision: RoutingDecision) -> torch.Tensor | None:
    """The ids, or else the map; None when the decision shows neither."""
    return decision.expert_ids if decision.expert_ids is not None else decision.routing_map


def may_drop_inside(site: RoutingSite) -> bool:
    """Whether the site is read before experts that state a capacity of their own."""
    if site.when != "before":
        return False
    if states_capacity(site.module):
        return True
    holders = with_settings(site.module)
    return any(getattr(h, name, None) is not None for h in holders for name in _CAPACITIES)

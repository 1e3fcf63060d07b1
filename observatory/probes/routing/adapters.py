"""Adapters: how a user describes to the probe how to read an MoE layer that it does not understand by itself.

Example: a home-made layer whose ``forward`` returns ``(hidden, chosen)`` with ``chosen`` of shape (T, K)::

    adapter = Adapter(
        match=lambda name, module: isinstance(module, MyMoe),
        read=lambda module, args, kwargs, output: RoutingDecision(
            expert_ids=output[1], tokens=output[1].shape[0]
        ),
        experts=64,
        top_k=4,
    )
    with observatory.watch(model, "runs/a", adapters=[adapter]):
        ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from observatory.probes.routing.sites import Listen, ReadCall, RoutingDecision


def nothing_to_read(*_call: object) -> RoutingDecision | None:
    """Of a module whose calls do not show the routing."""
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """Finds modules by a predicate and reads their calls with a function.

    An adapter comes before the built-in rules: what lies inside a matched module, or next to it in the same
    MoE block, is not searched again.

    Attributes:
        match: true for a module (qualified name, module) whose call shows one MoE layer's routing.
        read: takes such a call apart; see ``sites.ReadCall``. Plain tensor operations only: nothing that
            reads device values on the host (``.item()``, ``nonzero``, boolean indexing).
        experts: E of a matched module, or a function of the module.
        top_k: assignments per token, or a function of the module; None when it varies.
        when: ``after`` the call (from its output) or ``before`` it (from its inputs).
        shared_experts: experts that every token passes; None when unknown.
        null_experts: ids or router outputs that stand for "no expert".
        listen: brings the decisions in place of ``read``, where no call of a module shows them.
        how: one phrase for people.
    """

    match: Callable[[str, nn.Module], bool]
    read: ReadCall = nothing_to_read
    experts: int | Callable[[nn.Module], int]
    top_k: int | Callable[[nn.Module], int | None] | None = None
    when: Literal["before", "after"] = "after"
    shared_experts: int | None = None
    null_experts: int = 0
    listen: Listen | None = None
    how: str = "adapter"

"""Runs of a model under the routing probe, with readers as they are and with broken ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from observatory.probes.options import Verify
from observatory.probes.routing.probe import verify_sites
from observatory.probes.routing.sites import RoutingDecision, RoutingSite
from observatory.run.manifest import Verified

#: changes ids (T, K) or a routing map (T, E); the number of experts is given
Break = Callable[[torch.Tensor, int], torch.Tensor]


def verdicts(
    model: nn.Module, sites: Sequence[RoutingSite], inputs: Mapping[str, Any], *, verify: Verify = "first"
) -> tuple[tuple[Verified, ...], str | None]:
    """What confirmed each site in one pass of the model, and why the model is refused."""
    return verify_sites(model, sites, lambda: model(**inputs), verify=verify)


def broken(site: RoutingSite, change: Break) -> RoutingSite:
    """The site with a reader whose decisions are changed."""

    def read(
        module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> RoutingDecision | None:
        decision = site.read(module, args, kwargs, output)
        if decision is None:
            return None
        experts = site.spec.experts
        if decision.expert_ids is None:
            assert decision.routing_map is not None
            map_TE = decision.routing_map.reshape(-1, experts).ne(0)
            ids = torch.where(map_TE, torch.arange(experts), -1)
        else:
            ids = decision.expert_ids.reshape(decision.tokens, -1)
        ids = change(ids, experts)
        mask = decision.token_mask
        if mask is not None and len(mask) != len(ids):
            mask = None
        return RoutingDecision(
            expert_ids=ids,
            token_mask=mask,
            tokens=len(ids),
            is_inferred=decision.is_inferred,
            is_dispatch=decision.is_dispatch,
        )

    return replace(site, read=read)


def shifted(ids: torch.Tensor, experts: int) -> torch.Tensor:
    """Every assignment goes to the expert before."""
    return torch.where((ids >= 0) & (ids < experts), (ids + 1) % experts, ids)


def one_token_wrong(ids: torch.Tensor, experts: int) -> torch.Tensor:
    """One token has other experts, as where a bias was ignored."""
    return torch.cat([shifted(ids[:1], experts), ids[1:]])


def padding_counted(ids: torch.Tensor, _experts: int) -> torch.Tensor:
    """One token more is counted than computed."""
    return torch.cat([ids, ids[-1:]])


BREAKS: dict[str, Break] = {
    "shifted": shifted,
    "one token wrong": one_token_wrong,
    "padding counted": padding_counted,
}

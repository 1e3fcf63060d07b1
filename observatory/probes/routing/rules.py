"""Rules: the interfaces by which MoE layers are recognised, none of them a class name.

Each rule looks at one module and its surroundings and answers with a ``Candidate`` or None. In order:

1. experts call: ``forward`` takes the expert ids (``top_k_index`` and its spellings) or a gate matrix;
2. router with a routing map: Megatron-Core's ``(probs, routing_map)``;
3. capacity gate: DeepSpeed's ``(l_aux, combine_weights, dispatch_mask, exp_counts)``;
4. expert lookup: embedding tables with one row per expert;
5. router of the experts: the experts' call shows no ids, so the router's output is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import JsonValue
from torch import nn

from observatory.probes.routing import moe_block, readers
from observatory.probes.routing.moe_block import MoeBlock
from observatory.probes.routing.sites import Listen, ReadCall
from observatory.probes.routing.words import NotUnderstood, Reading
from observatory.reasons import Reason

#: Shape letters at the end of a parameter's name: ``topk_expert_ids_BLK``.
_SHAPE = r"(_[A-Z]+)?$"
_IDS = re.compile(
    r"^((router|selected|chosen)_(index|indices|idx|ids|experts?)"
    r"|top_?k(_experts?)?_(index|indices|idx|ids)|top_?k?_experts?|selected_experts?"
    r"|experts?_(ids?|idx|index|indices)|indices)" + _SHAPE
)
_WEIGHTS = re.compile(
    r"^(top_?k?_(weights?|scores|probs|gates)|routing_weights|router_(scores|weights)|expert_weights|gates|weights)"
    + _SHAPE
)
_GATE_MATRIX = re.compile(r"^(router_probs|combine_weights|gate_matrix)" + _SHAPE)
#: Masks of tokens, true for those that count, and those that are true for padding.
_TOKEN_MASK = re.compile(r"^((token|tokens|valid|active|keep)_mask|valid_tokens)" + _SHAPE)
_PADDING_MASK = re.compile(r"^(key_)?(padding|pad|ignore)_mask" + _SHAPE)
#: Names of the bias that balances loads without a loss.
CORRECTION_BIASES = ("e_score_correction_bias", "expert_bias", "balancing_biases")
#: Attributes of routers whose selection is more than "the K largest logits".
_BIASED = (*CORRECTION_BIASES, "topk_group")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An MoE layer before it has a number.

    Attributes:
        path: qualified name of the module whose call is read.
        block: qualified name of the MoE block around it; experts in there are accounted for.
        experts: E.
        top_k: assignments per token; None when it varies.
        shared_experts: experts that every token passes; None when unknown.
        null_experts: router outputs that stand for "no expert".
        when: side of the call that is read.
        reading: how the call is read.
        detail: the argument that is read, or the phrase of an adapter.
        read: takes the call apart.
        infers: readings may be inferred (``RoutingDecision.is_inferred``), or experts may leave tokens out
            by a mask that is not understood.
        shows_gates: the gates are read, not what is dispatched by them.
        is_adapted: an adapter of the user's says how it is read.
        listen: brings the decisions in place of ``read``.
        plain_ids: the argument with the ids, where they are all that counts.
    """

    path: str
    block: str
    experts: int
    top_k: int | None
    shared_experts: int | None
    null_experts: int
    when: Literal["before", "after"]
    reading: Reading
    detail: str = ""
    read: ReadCall
    infers: bool = False
    shows_gates: bool = False
    is_adapted: bool = False
    listen: Listen | None = None
    plain_ids: tuple[str, int] | None = None


#: (path, all modules, configurations) -> candidate or None
Rule = Callable[[str, Mapping[str, nn.Module], Sequence[object]], Candidate | None]


def _experts_call(path: str, modules: Mapping[str, nn.Module], configs: Sequence[object]) -> Candidate | None:
    """Rule 1: the experts are given the expert that each token goes to."""
    module = modules[path]
    names = moe_block.forward_parameters(module)
    ids, matrix = (_named(names, pattern) for pattern in (_IDS, _GATE_MATRIX))
    experts = _experts_inside(path, module)
    weights = _all_named(names, _WEIGHTS)
    if ids is not None and ids[0].startswith("indices") and not weights:
        ids = None  # may be anything; experts that the caller picks are called so
    if experts is None or (ids is None and matrix is None) or len(names) < 2:
        return None
    block = MoeBlock.around(path, modules)
    nulls = moe_block.null_experts(block, experts)
    plain_ids = None
    if ids is None and matrix is not None:
        read, shown = readers.read_gate_matrix(gates=matrix, experts=experts), matrix[0]
    elif ids is not None:
        hidden_nulls = nulls > 0 and not hasattr(module, "zero_expert_num")
        read = readers.read_expert_ids(
            ids=ids,
            weights=weights,
            experts=experts,
            token_mask=_named(names, _TOKEN_MASK),
            padding_mask=_named(names, _PADDING_MASK),
            zero_weight_is_null=hidden_nulls,
        )
        shown = ids[0]
        has_masks = any(_named(names, pattern) is not None for pattern in (_TOKEN_MASK, _PADDING_MASK))
        plain_ids = None if has_masks or hidden_nulls else ids
    return Candidate(
        path=path,
        block=block.path,
        experts=experts,
        top_k=moe_block.top_k(block, configs),
        shared_experts=moe_block.shared_experts(block, configs),
        null_experts=nulls,
        when="before",
        reading=Reading.EXPERTS_CALL,
        detail=shown,
        read=read,
        infers=any("mask" in n and not (_TOKEN_MASK.match(n) or _PADDING_MASK.match(n)) for n in names),
        shows_gates=ids is None,
        plain_ids=plain_ids,
    )


def _experts_inside(path: str, module: nn.Module) -> int | None:
    """E of an experts module, or of the experts right inside a module that dispatches to them."""
    stated = moe_block.expert_count(module)
    label = f"{path.rpartition('.')[2]} {type(module).__name__}".lower()
    if stated is not None or "expert" not in label:
        return stated
    inside = [m for n, m in module.named_children() if moe_block.looks_like_experts(n, m)]
    return moe_block.expert_count(inside[0]) if len(inside) == 1 else None


def _routing_map_router(
    path: str, modules: Mapping[str, nn.Module], _configs: Sequence[object]
) -> Candidate | None:
    """Rule 2: a router with a ``routing`` step and ``topk`` that returns (probs, routing_map)."""
    module = modules[path]
    top_k = moe_block.int_attribute(module, ("topk",))
    experts = moe_block.int_attribute(module, ("num_experts",)) or moe_block.int_attribute(
        getattr(module, "config", None), ("num_moe_experts",)
    )
    if top_k is None or experts is None or not callable(getattr(module, "routing", None)):
        return None
    block = MoeBlock.around(path, modules)
    return Candidate(
        path=path,
        block=block.path,
        experts=experts,
        top_k=top_k,
        shared_experts=moe_block.shared_experts(block, ()),
        null_experts=0,
        when="after",
        reading=Reading.ROUTING_MAP,
        read=readers.read_routing_map(experts=experts),
    )


def _capacity_gate(
    path: str, modules: Mapping[str, nn.Module], _configs: Sequence[object]
) -> Candidate | None:
    """Rule 3: a gate with capacity whose linear layer is called ``wg``."""
    module = modules[path]
    linear = getattr(module, "wg", None)
    k = moe_block.int_attribute(module, ("k",))
    if k is None or not isinstance(linear, nn.Linear) or not hasattr(module, "capacity_factor"):
        return None
    block = MoeBlock.around(path, modules)
    return Candidate(
        path=path,
        block=block.path,
        experts=linear.out_features,
        top_k=k,
        shared_experts=1 if getattr(block.grandparent, "use_residual", False) else 0,
        null_experts=0,
        when="after",
        reading=Reading.CAPACITY_GATE,
        read=readers.read_capacity_gate(experts=linear.out_features),
    )


def _expert_lookup(
    path: str, modules: Mapping[str, nn.Module], _configs: Sequence[object]
) -> Candidate | None:
    """Rule 4: two equal embedding tables, one row per expert, in a block that states E and K."""
    module = modules[path]
    block = MoeBlock.around(path, modules)
    if not isinstance(module, nn.Embedding) or block.parent is None:
        return None
    tables = [m for m in block.parent.children() if isinstance(m, nn.Embedding)]
    experts = moe_block.int_attribute(block.parent, ("num_experts",))
    top_k = moe_block.top_k(block, ())
    if len(tables) != 2 or module is not tables[0] or top_k is None:
        return None
    if any(table.num_embeddings != experts for table in tables):
        return None
    return Candidate(
        path=path,
        block=block.path,
        experts=module.num_embeddings,
        top_k=top_k,
        shared_experts=1 if any(isinstance(m, nn.Linear) and "up" in n for n, m in block.siblings()) else 0,
        null_experts=0,
        when="before",
        reading=Reading.EXPERT_LOOKUP,
        read=readers.read_expert_lookup(ids=("input", 0)),
    )


RULES: tuple[Rule, ...] = (_experts_call, _routing_map_router, _capacity_gate, _expert_lookup)


def router_beside_experts(
    path: str, modules: Mapping[str, nn.Module], configs: Sequence[object]
) -> Candidate | Reason:
    """Rule 5, for a container of experts that no other rule explains.

    Returns:
        A candidate that reads the router of the block, or the reason why there is none.
    """
    block = MoeBlock.around(path, modules)
    experts = moe_block.expert_count(block.experts)
    if experts is None:
        return Reason(NotUnderstood.NO_EXPERT_COUNT)
    if (levels := moe_block.two_levels(block)) is not None:
        return _inner_router(block, *levels, configs=configs)
    block, routers = _routers_of(block, experts, modules)
    if len(routers) != 1:
        siblings = ", ".join(f"{n} ({type(m).__name__})" for n, m in block.siblings()) or "none"
        values: dict[str, JsonValue] = {"routers": len(routers), "experts": experts, "siblings": siblings}
        return Reason(NotUnderstood.NOT_ONE_ROUTER, values)
    name, router = routers[0]
    top_k = moe_block.top_k(block, configs)
    drops = moe_block.states_capacity(router)
    if top_k is None and not drops:
        return Reason(NotUnderstood.NO_TOP_K, {"router": name})
    linear = isinstance(moe_block.unwrapped(router), nn.Linear)
    if linear and any(_is_set(m, _BIASED) for m in (router, moe_block.unwrapped(router), block.parent)):
        return Reason(NotUnderstood.BIASED_CHOICE, {"router": name})
    in_list = isinstance(modules[path], (nn.ModuleList, nn.ModuleDict))
    dense = len(moe_block.forward_parameters(block.experts)) == 1 and not in_list and not drops
    read = (
        readers.read_dense_scores(experts=experts)
        if dense
        else readers.read_router_output(experts=experts, top_k=top_k)
    )
    return Candidate(
        path=f"{block.path}.{name}" if block.path else name,
        block=block.path,
        experts=experts,
        top_k=top_k,
        shared_experts=moe_block.shared_experts(block, configs),
        null_experts=0,
        when="after",
        reading=Reading.DENSE_SCORES if dense else Reading.ROUTER_OUTPUT,
        read=read,
        infers=not dense,
    )


def _routers_of(
    block: MoeBlock, experts: int, modules: Mapping[str, nn.Module]
) -> tuple[MoeBlock, list[tuple[str, nn.Module]]]:
    """The block that holds the routers of some experts, and these; wrappers named after experts are left."""
    around = block
    while True:
        routers = [(n, m) for n, m in around.routers() if moe_block.can_choose(m, experts)]
        label = f"{around.path.rpartition('.')[2]} {type(around.parent).__name__}".lower()
        if routers or not around.path or "expert" not in label:
            return (around, routers) if routers else (block, [])
        around = MoeBlock.around(around.path, modules)


def _inner_router(
    block: MoeBlock, outer: int, inner: int, name: str, *, configs: Sequence[object]
) -> Candidate:
    """The inner of two routers, which dispatches to the experts of each outer one."""
    return Candidate(
        path=f"{block.path}.{name}" if block.path else name,
        block=block.path,
        experts=outer * inner,
        top_k=None,
        shared_experts=moe_block.shared_experts(block, configs),
        null_experts=0,
        when="after",
        reading=Reading.ROUTER_OUTPUT,
        read=readers.read_two_levels(outer=outer, inner=inner),
    )


def _named(names: Sequence[str], pattern: re.Pattern[str]) -> tuple[str, int] | None:
    """Name and position of the first parameter that matches."""
    return next(((n, i) for i, n in enumerate(names) if pattern.match(n)), None)


def _all_named(names: Sequence[str], pattern: re.Pattern[str]) -> tuple[tuple[str, int], ...]:
    """Names and positions of all parameters that match."""
    return tuple((n, i) for i, n in enumerate(names) if pattern.match(n))


def _is_set(holder: object, names: Sequence[str]) -> bool:
    return any(getattr(holder, name, None) is not None for name in names)

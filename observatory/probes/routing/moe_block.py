"""What a module shows of itself: how many experts, how many per token, whether it looks like experts.

Everything is read from attributes, parameter shapes and forward signatures. Attribute spellings are those
found in transformers, Megatron-Core, DeepSpeed and model code published with checkpoints.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from torch.nn.utils import parametrize

_EXPERTS = (
    "num_routed_experts",
    "n_routed_experts",
    "num_experts",
    "num_local_experts",
    "moe_num_experts",
    "num_moe_experts",
    "n_experts",
    "n_expert",
)
#: Attributes by which modules keep the settings that they were built from.
_SETTINGS = ("config", "args", "cfg", "hparams")
#: Children that stand for the module around them: adapters (PEFT), sharding and compiling wrappers.
_WRAPPED = ("base_layer", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
_TOP_K = (
    "top_k",
    "topk",
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_top_k",
    "moe_topk",
    "moe_router_topk",
    "moe_k",
    "top_k_experts",
    "num_selected_experts",
    "n_expert_per_token",
    "n_experts_per_token",
    "n_activated_experts",
    "top_n",
)
_SHARED = (
    "n_shared_experts",
    "n_shared_expert",
    "num_shared_experts",
    "moe_num_shared_experts",
    "num_shared_expert",
)
_SHARED_CHILD = re.compile(r"shared.*(experts?|mlp)$")
_ROUTER_CLASSES = ("num_router_classes", "n_routed_experts")


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeBlock:
    """The surroundings of an experts module (or of a router, where only a router is known).

    Attributes:
        path: qualified name of the module around the experts, the MoE block.
        name: qualified name of the experts, or of the outermost wrapper around them.
        experts: the experts module.
        parent: the MoE block; None when the experts module is the model itself.
        grandparent: the module around the block, as a rule the decoder layer; None at the top.
    """

    path: str
    name: str
    experts: nn.Module
    parent: nn.Module | None
    grandparent: nn.Module | None

    @classmethod
    def around(cls, path: str, modules: Mapping[str, nn.Module]) -> MoeBlock:
        """The block around the module at ``path``; wrappers around the module are stepped over."""
        outermost = _outermost(path)
        parent_path = outermost.rpartition(".")[0]
        grandparent_path = _outermost(parent_path).rpartition(".")[0]
        return cls(
            path=parent_path,
            name=outermost,
            experts=modules[path],
            parent=modules.get(parent_path) if path else None,
            grandparent=modules.get(grandparent_path) if parent_path else None,
        )

    def siblings(self) -> Iterator[tuple[str, nn.Module]]:
        """The other children of the block, by name."""
        if self.parent is not None:
            experts = self.name.rpartition(".")[2]
            yield from ((n, m) for n, m in self.parent.named_children() if n != experts)

    def routers(self) -> list[tuple[str, nn.Module]]:
        """Siblings that look like a router by name or class."""
        return [(n, m) for n, m in self.siblings() if looks_like_router(n, m)]


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that adapters and sharding wrappers stand for; the module itself without any."""
    while True:
        inner = next((m for n in _WRAPPED if (m := module._modules.get(n)) is not None), None)
        if inner is None:
            return module
        module = inner


def bare_model(model: nn.Module) -> nn.Module:
    """The model that compiled modules, DDP and sharding wrappers stand for."""
    inner = unwrapped(model)
    while isinstance(module := inner._modules.get("module"), nn.Module) and len(inner._modules) == 1:
        inner = unwrapped(module)
    return inner


def _outermost(path: str) -> str:
    """The path of the outermost wrapper around the module at ``path``."""
    while path.rpartition(".")[2] in _WRAPPED:
        path = path.rpartition(".")[0]
    return path


def int_attribute(holder: object, names: Sequence[str]) -> int | None:
    """The first of these attributes that is a positive integer."""
    for name in names:
        value = getattr(holder, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def with_settings(holder: Any) -> list[Any]:
    """What may state a property of a module: itself, and the settings that it keeps."""
    return [holder, *(s for name in _SETTINGS if (s := getattr(holder, name, None)) is not None)]


def states_capacity(module: nn.Module) -> bool:
    """Whether an attribute of its own states a capacity."""
    return any("capacity" in name and value is not None for name, value in vars(unwrapped(module)).items())


def forward_parameters(module: nn.Module) -> list[str]:
    """Parameter names of ``forward`` without ``self``, through decorators that keep ``__wrapped__``.

    The class is asked, not the instance: expert-parallel wrappers replace ``module.forward`` by a closure
    of ``*args`` while the module itself is still called with the original arguments.
    """
    try:
        return list(inspect.signature(type(module).forward).parameters)[1:]
    except (AttributeError, TypeError, ValueError):
        return []


def expert_count(module: nn.Module) -> int | None:
    """Number of routed experts E that this module holds, None when it does not look like experts.

    Stacked weights (E, ...) decide over attributes where the two disagree: under expert parallelism
    ``num_experts`` is the local count while the sharded parameter keeps its global shape; with null experts
    some stacks are longer than others, and the shortest holds the experts that compute.
    """
    stated = int_attribute(module, _EXPERTS)
    stacked = {shape[0] for shape in _weight_shapes(module) if len(shape) >= 3}
    if stacked:
        return stated if stated in stacked else min(stacked)
    if stated is None and isinstance(module, (nn.ModuleList, nn.ModuleDict)) and len(module) > 1:
        return len(module)
    return stated


def _weight_shapes(module: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of the module's own weights, whole where they are sharded (ZeRO-3) or parametrized."""
    named = [getattr(p, "ds_shape", p.shape) for p in module.parameters(recurse=False)]
    if parametrize.is_parametrized(module):
        named += [getattr(module, name).shape for name in cast(nn.ModuleDict, module.parametrizations)]
    return [tuple(shape) for shape in named]


def can_choose(module: nn.Module, experts: int) -> bool:
    """Whether a linear layer or weight of the module gives one output per expert.

    ``out_features`` is asked as well as the weights: those of a quantised layer are packed bytes, those
    of a sharded model lie in flat pieces. A weight that is no linear layer's may have its outputs last, or
    lie flat in a router that states its number of experts.
    """
    return any(
        getattr(m, "out_features", None) == experts
        or any(
            (len(shape) == 2 and (shape[0] == experts or (shape[1] == experts and not is_linear)))
            or (len(shape) == 1 and shape[0] > experts == int_attribute(m, _EXPERTS))
            for shape in _weight_shapes(m)
        )
        for m in module.modules()
        for is_linear in (hasattr(m, "in_features"),)
    )


def two_levels(block: MoeBlock) -> tuple[int, int, str] | None:
    """Outer and inner experts of a hierarchical block, and the name of its inner router; None for others.

    Its experts are stacked as (outer, inner, ...), and the inner of its two routers has weights for each
    outer expert.
    """
    levels = {shape[:2] for shape in _weight_shapes(block.experts) if len(shape) >= 4}
    routers = block.routers()
    if len(levels) != 1 or len(routers) != 2:
        return None
    ((outer, inner),) = levels
    names = [
        name
        for name, router in routers
        if any(
            len(s) == 3 and s[0] == outer and inner in s[1:]
            for m in router.modules()
            for s in _weight_shapes(m)
        )
    ]
    return (outer, inner, names[0]) if len(names) == 1 else None


def looks_like_experts(name: str, module: nn.Module) -> bool:
    """Whether this is a container of routed experts, by name together with contents."""
    attribute = name.rpartition(".")[2].lower()
    label = f"{attribute} {type(module).__name__.lower()}"
    if "expert" not in label or "shared" in label:
        return False
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        # Their kinds may differ: zero, copy and constant experts mixed with MLPs. A list of whole experts
        # modules, one per layer, is no list of experts.
        whole = (c for c in module.children() if _is_stack(c) and "expert" in type(c).__name__.lower())
        return len(module) > 1 and not any(int_attribute(c, _EXPERTS) or len(_stacked(c)) > 1 for c in whole)
    return _is_stack(module)


def called_one_by_one(outer: nn.Module, experts: int) -> tuple[nn.Module, ...]:
    """The experts of the first list or dictionary of all E in there; empty where they are held otherwise.

    Where names end in numbers, children without one are none of them (a dropout next to ``expert_0``).
    """
    for name, module in outer.named_modules():
        label = f"{name} {type(module).__name__}".lower()
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and "expert" in label and "shared" not in name:
            children = {n: m for n, m in module._modules.items() if m is not None}
            numbers = {n: int(m[0]) for n in children if (m := re.search(r"\d+$", n)) is not None}
            numbered = [children[n] for n in sorted(numbers, key=numbers.__getitem__)] or [*children.values()]
            if len(numbered) == experts:
                return tuple(numbered)
    return ()


def is_never_called(module: nn.Module) -> bool:
    """Whether ``forward`` does nothing but raise: other methods are called in its place."""
    code = getattr(type(module).forward, "__code__", None)
    return code is None or code.co_names == ("NotImplementedError",)


def _stacked(module: nn.Module) -> list[tuple[int, ...]]:
    return [shape for shape in _weight_shapes(module) if len(shape) >= 3]


def router_of_unknown_experts(block: nn.Module) -> str | None:
    """Name of a child that chooses among as many things as the block holds, if it states a top-k."""
    for name, router in block.named_children():
        if not looks_like_router(name, router):
            continue
        if int_attribute(block, _TOP_K) is None and int_attribute(unwrapped(router), _TOP_K) is None:
            continue
        sizes = {len(m) for m in block.modules() if isinstance(m, (nn.ModuleList, nn.ParameterList))}
        sizes |= {shape[0] for m in block.modules() for shape in _stacked(m)}
        if any(size > 1 and can_choose(router, size) for size in sizes):
            return name
    return None


def _is_stack(module: nn.Module) -> bool:
    """Whether the module's own weights are stacked over experts."""
    return any(len(shape) >= 3 for shape in _weight_shapes(module))


def top_k(block: MoeBlock, configs: Sequence[object]) -> int | None:
    """Assignments per token: stated by a router, the experts, the block, or the configuration."""
    holders: list[Any] = [m for _, m in block.routers()]
    holders += [block.experts, block.parent]
    holders = [s for h in holders if h is not None for s in with_settings(unwrapped(h))]
    stated = [int_attribute(h, _TOP_K) for h in (*holders, *configs)]
    stated += [int_attribute(unwrapped(router), ("k",)) for _, router in block.routers()]
    return next((k for k in stated if k is not None), None)


def shared_experts(block: MoeBlock, configs: Sequence[object]) -> int:
    """Experts that every token passes: 0 without a shared_* module nearby, else the stated number or 1."""
    nearby = [m for m in (block.parent, block.grandparent) if m is not None]
    if not any(_SHARED_CHILD.search(name) for m in nearby for name, _ in m.named_children()):
        return 0
    stated = (int_attribute(h, _SHARED) for h in (*with_settings(block.parent), *configs) if h is not None)
    return next((n for n in stated if n is not None), 1)


def null_experts(block: MoeBlock, experts: int) -> int:
    """Router outputs beyond the experts that stand for "no expert" (zero-computation, skip, identity)."""
    stated = getattr(block.experts, "zero_expert_num", None)
    if isinstance(stated, int):
        return stated
    for _, router in block.routers():
        classes = int_attribute(router, _ROUTER_CLASSES)
        if classes is not None and classes > experts:
            return classes - experts
    return 0


def configured_experts(configs: Sequence[object]) -> str | None:
    """``name=value`` of the first configuration field that promises more than one expert."""
    for config in configs:
        for name in _EXPERTS:
            value = getattr(config, name, None)
            if isinstance(value, int) and value > 1:
                return f"{name}={value}"
    return None


def looks_like_router(name: str, module: nn.Module) -> bool:
    """Whether this is a router, by name or class."""
    label = f"{name.lower()} {type(module).__name__.lower()}"
    return "shared" not in name.lower() and re.search(r"router|gate\b|gating|\bwg\b|gate$", label) is not None

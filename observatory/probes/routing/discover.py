"""Finding the MoE layers of a model and how to read their routing.

Layers are recognised by the shape of their interface (``rules.py``), never by a list of class names, and a
model that is only partly understood is refused: a load histogram with layers missing would look complete.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from observatory.errors import ModelError
from observatory.probes.routing import moe_block
from observatory.probes.routing.adapters import Adapter
from observatory.probes.routing.numbering import layer_numbers
from observatory.probes.routing.rules import RULES, Candidate, router_beside_experts
from observatory.probes.routing.sites import RoutingSite
from observatory.probes.routing.words import NotUnderstood, Reading, sentence_of
from observatory.reasons import Reason
from observatory.run.manifest import MoeLayerSpec

#: Modules that a refusal names; as a rule all have the same reason.
_MOST_NAMED = 4
_LOOKED_FOR = (
    "an experts module called with top_k_index (or router_indices, selected_experts, ...), a router "
    "returning (probs, routing_map), a capacity gate, expert embedding tables, or a router next to a list of "
    "experts"
)
_HELP = (
    "pass adapters=[Adapter(match=..., read=..., experts=...)] to say how (docs/supported-models.md#adapters)"
)


def find_sites(model: nn.Module, *, adapters: Sequence[Adapter] = ()) -> list[RoutingSite]:
    """Every MoE layer of a model, in model order.

    Args:
        model: any module; wrappers (DDP, compiled modules) may be around the MoE layers.
        adapters: how to read layers the built-in rules do not know; they come first.

    Returns:
        One site per MoE layer, with unique layer numbers (see ``numbering.py``).

    Raises:
        ModelError: no MoE layer was found, or some module looks like routed experts and is not understood;
            the message names the modules and what was looked for.
    """
    modules = dict(_all_places(model))
    configs = list(_configurations(model))
    candidates = [c for path in modules for c in _adapted(path, modules, adapters)]
    adapted = tuple(candidates)
    for path in modules:  # outer ones first: a wrapper with the same interface stands for what it wraps
        covered = any(_inside(path, c.path) for c in candidates)
        if not covered and not any(_beside(path, a.block) for a in adapted):
            candidates += next(([c] for rule in RULES if (c := rule(path, modules, configs)) is not None), [])
    missed: list[_Missed] = []
    for path, module in modules.items():
        if moe_block.looks_like_experts(path, module) and not _claimed(path, candidates):
            answer = router_beside_experts(path, modules, configs)
            if isinstance(answer, Candidate):
                candidates.append(answer)
            else:
                missed.append(_Missed(path, module, answer))
    blocks = {c.block for c in candidates} | {one.path.rpartition(".")[0] for one in missed}
    for path, module in modules.items():
        router = moe_block.router_of_unknown_experts(module)
        if router is not None and not any(_inside(b, path) or _inside(path, b) for b in blocks):
            reason = Reason(NotUnderstood.EXPERTS_NOT_RECOGNISED, {"router": router})
            missed.append(_Missed(path, module, reason))
    candidates, shared = _one_per_block(candidates, modules, configs)
    missed += shared
    if missed or not candidates:
        raise ModelError(_explain(model, candidates, missed, configs))
    order = {path: i for i, path in enumerate(modules)}
    candidates.sort(key=lambda c: order[c.path])
    numbers = layer_numbers(model, [c.path for c in candidates])
    return [_site(c, number, modules) for c, number in zip(candidates, numbers, strict=True)]


class _Missed(NamedTuple):
    """A module that looks like routed experts, or their router, and is not understood."""

    path: str
    module: nn.Module
    reason: Reason

    def __str__(self) -> str:
        return f"{self.path} ({type(self.module).__name__}): {sentence_of(self.reason)}"


def _all_places(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module under every name it has, outer ones first; a module inside itself is not entered again."""

    def walk(path: str, module: nn.Module, around: tuple[int, ...]) -> Iterator[tuple[str, nn.Module]]:
        yield path, module
        for name, child in ((n, m) for n, m in module._modules.items() if m is not None):
            if id(child) not in around:
                yield from walk(f"{path}.{name}" if path else name, child, (*around, id(child)))

    yield from walk("", model, (id(model),))


def _one_per_block(
    candidates: Sequence[Candidate], modules: Mapping[str, nn.Module], configs: Sequence[object]
) -> tuple[list[Candidate], list[_Missed]]:
    """One candidate per MoE block, and the places whose calls cannot be distinguished.

    A whole block in several places is one layer. Experts that several blocks share are read from each block's
    own router, if there is one that can be read.
    """
    kept: list[Candidate] = []
    missed: list[_Missed] = []
    blocks: dict[tuple[int, int], Candidate] = {}
    for candidate in candidates:
        block = modules.get(candidate.block)
        blocks.setdefault((id(block), id(modules[candidate.path])), candidate)
    readers = Counter(module for _, module in blocks)
    for (_, module), candidate in blocks.items():
        if readers[module] == 1:
            kept.append(candidate)
            continue
        router = router_beside_experts(candidate.path, modules, configs)
        if isinstance(router, Candidate) and readers[id(modules[router.path])] == 0:
            kept.append(router)
        else:
            reason = Reason(NotUnderstood.SHARED_BY_BLOCKS, {"blocks": readers[module]})
            missed.append(_Missed(candidate.path, modules[candidate.path], reason))
    return kept, missed


def _site(candidate: Candidate, layer: int, modules: Mapping[str, nn.Module]) -> RoutingSite:
    spec = MoeLayerSpec(
        layer=layer,
        module=candidate.path,
        experts=candidate.experts,
        top_k=candidate.top_k,
        shared_experts=candidate.shared_experts,
        null_experts=candidate.null_experts,
    )
    module, block_path = modules[candidate.path], candidate.block
    experts = moe_block.called_one_by_one(module, candidate.experts)
    experts = experts or moe_block.called_one_by_one(modules[block_path], candidate.experts)
    while block_path and moe_block.is_never_called(modules[block_path]):
        block_path = block_path.rpartition(".")[0]
    return RoutingSite(
        spec=spec,
        module=module,
        when=candidate.when,
        reading=candidate.reading,
        detail=candidate.detail,
        read=candidate.read,
        block=None if candidate.is_adapted else modules[block_path],
        is_repeatable=block_path == candidate.block,
        experts=experts,
        infers=candidate.infers,
        shows_gates=candidate.shows_gates,
        plain_ids=candidate.plain_ids,
        listen=candidate.listen,
    )


def _adapted(path: str, modules: Mapping[str, nn.Module], adapters: Sequence[Adapter]) -> Iterator[Candidate]:
    """The candidate of the first adapter that matches, if any."""
    module = modules[path]
    for adapter in adapters:
        if adapter.match(path, module):
            yield Candidate(
                path=path,
                block=path.rpartition(".")[0],
                experts=adapter.experts(module) if callable(adapter.experts) else adapter.experts,
                top_k=adapter.top_k(module) if callable(adapter.top_k) else adapter.top_k,
                shared_experts=adapter.shared_experts,
                null_experts=adapter.null_experts,
                when=adapter.when,
                reading=Reading.ADAPTER,
                detail=adapter.how,
                read=adapter.read,
                is_adapted=True,
                listen=adapter.listen,
            )
            return


def _inside(path: str, outer: str) -> bool:
    return path == outer or path.startswith(f"{outer}.")


def _beside(path: str, block: str) -> bool:
    """Whether this module is a direct child of the block."""
    return path.rpartition(".")[0] == block


def _claimed(path: str, candidates: Sequence[Candidate]) -> bool:
    """Whether these experts belong to a layer that is understood: inside its module, or in its block.

    Experts are often wrapped (``experts.local_experts``): wrappers named after experts are stepped over.
    """
    outer = path
    while outer:
        if any(_inside(outer, c.path) or _beside(outer, c.block) for c in candidates):
            return True
        outer = outer.rpartition(".")[0]
        if "expert" not in outer.rpartition(".")[2]:
            return False
    return False


def _configurations(model: nn.Module) -> Iterator[object]:
    """The model's configuration and the sub-configurations it holds (text first), when it has any."""
    config = getattr(model, "config", None)
    if config is None:
        return
    text = getattr(config, "text_config", None)
    if text is not None:
        yield text
    yield config
    parts = vars(config).values() if hasattr(config, "__dict__") else ()
    yield from (part for part in parts if hasattr(part, "to_dict") and part is not text)


def _explain(
    model: nn.Module, understood: Sequence[Candidate], missed: Sequence[_Missed], configs: Sequence[object]
) -> str:
    """Why the model was refused: what failed, what was looked for, what to do."""
    name = type(model).__name__
    if missed:
        shown = "; ".join(map(str, missed[:_MOST_NAMED]))
        more = len(missed) - _MOST_NAMED
        shown += f"; and {more} more" if more > 0 else ""
        return (
            f"{name}: {len(understood)} MoE layers understood, but not {shown}. "
            f"Looked for {_LOOKED_FOR}; {_HELP}"
        )
    promise = moe_block.configured_experts(configs)
    if promise is None and configs:
        return (
            f"{name} looks dense: it has no MoE layer that was recognised, and its configuration names no "
            f"experts. Looked for {_LOOKED_FOR}; for a mixture of experts {_HELP}"
        )
    claim = f", though its configuration says {promise}" if promise else ""
    return f"{name} has no MoE layer that was recognised{claim}. Looked for {_LOOKED_FOR}; {_HELP}"

"""A second look at readings that infer the choice: the rows that experts are called with, and intervention.

Shapes: T tokens, K assignments per token, E experts, H hidden size.

The K largest of a gate's logits are the choice only if nothing comes in between: noise, a bias, a group
limit, a capacity. Where the experts are modules that are called one by one, two things show what was really
chosen, whatever the code around them does:

* *rows*: how many rows each expert was called with. Known from shapes, so it is looked at in every call.
* *intervention*: where every expert is called with all tokens, the block is run again on a copy of its input
  with the same random numbers, once for each expert with that expert's output changed; the tokens whose
  result changes are those of the expert. Done once in training and once in evaluation mode.

An intervention costs E + 2 more calls of the block on at most 64 tokens. It changes no weight; buffers
and tensors that the block keeps as attributes are put back.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from probes.routing.sites import RoutingDecision

__all__ = ["RowsOfExperts", "chosen_by_intervention", "few_tokens", "loads_of_decision", "rows_as_decision"]

_TOKENS = 64


class RowsOfExperts(threading.local):
    """Rows that each expert was called with since ``clear``, on this thread.

    Attributes:
        rows_E: rows per expert.
        scaled: the expert whose output is changed; None outside of an intervention.
    """

    def __init__(self, experts: int) -> None:
        self.rows_E = [0] * experts
        self.scaled: int | None = None

    def clear(self) -> None:
        """Forget all rows."""
        self.rows_E = [0] * len(self.rows_E)

    def note(self, expert: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        """Take a call of an expert in; what takes the place of its output, None to leave it."""
        rows = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)), None)
        if rows is not None:
            self.rows_E[expert] += rows.numel() // max(rows.shape[-1], 1) if rows.ndim else 0
        if self.scaled == expert:
            return tree_map(_changed, output)
        return None


def loads_of_decision(decision: RoutingDecision, experts: int) -> list[int]:
    """Assignments per expert of a decision, (E,); waits for the device."""
    ids = decision.expert_ids
    if ids is None:
        assert decision.routing_map is not None
        return [int(n) for n in decision.routing_map.reshape(-1, experts).ne(0).sum(dim=0).tolist()]
    kept = ids[(ids >= 0) & (ids < experts)].reshape(-1)
    return [int(n) for n in torch.bincount(kept, minlength=experts).tolist()]


def rows_as_decision(rows_E: Sequence[int], decision: RoutingDecision) -> RoutingDecision:
    """The decision that gives each expert its rows; which token has which expert is not known from rows."""
    shown = decision.expert_ids if decision.expert_ids is not None else decision.routing_map
    assert shown is not None
    experts = torch.arange(len(rows_E)).repeat_interleave(torch.tensor(rows_E))
    return RoutingDecision(expert_ids=experts.to(shown.device), tokens=decision.tokens)


def chosen_by_intervention(
    block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], experts: RowsOfExperts
) -> torch.Tensor | None:
    """Which tokens each expert computes in a call of the block.

    Args:
        block: the MoE block; not called by itself, only its ``forward``.
        args: positional arguments.
        kwargs: keyword arguments.
        experts: the rows of its experts, by whose hooks outputs are changed.

    Returns:
        (E, T) bool on the device of the output. None where repeating the call gives another result, or the
        result has not one row per token.
    """
    number = len(experts.rows_E)
    with _as_before(block), torch.no_grad():
        plain, again = (_rows(_run(block, args, kwargs)) for _ in range(2))
        if plain is None or again is None or not torch.equal(plain, again):
            return None
        found = []
        try:
            for expert in range(number):
                experts.scaled = expert
                changed = _rows(_run(block, args, kwargs))
                assert changed is not None
                found.append((changed != plain).any(dim=-1))
        finally:
            experts.scaled = None
    return torch.stack(found)


def few_tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The arguments with the first tokens only, where the call has but one tensor; as they are elsewhere."""
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
    if len(tensors) != 1 or tensors[0].ndim < 2:
        return args, kwargs

    def cut(value: Any) -> Any:
        if value is not tensors[0]:
            return value
        while value.ndim > 2 and value.numel() > _TOKENS * value.shape[-1]:
            value = value[: max(1, _TOKENS * value.shape[-1] * value.shape[0] // value.numel())]
            if value.shape[0] == 1:
                return value[..., :_TOKENS, :]
        return value[..., :_TOKENS, :]

    return tuple(cut(v) for v in args), {k: cut(v) for k, v in kwargs.items()}


def _run(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call the block's forward on copies of its arguments, with the random numbers of every other run."""
    copies = tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, (args, dict(kwargs)))
    devices = {t.device for t in block.parameters() if t.device.type == "cuda"}
    with torch.random.fork_rng(devices=[d.index or 0 for d in devices]):
        return block.forward(*copies[0], **copies[1])


def _rows(output: Any) -> torch.Tensor | None:
    """The first floating-point tensor of an output, one row per token."""
    items = output if isinstance(output, (tuple, list)) else (output,)
    for item in items:
        if isinstance(item, torch.Tensor) and item.is_floating_point() and item.ndim > 1:
            return item.reshape(-1, item.shape[-1])
    return None


def _changed(value: Any) -> Any:
    """Another output, also where it is zero; far away, for the sake of short floating-point formats."""
    return value.mul(-64).add(1) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@contextmanager
def _as_before(block: nn.Module) -> Iterator[None]:
    """Put buffers and attributes that are tensors back as they were, in place."""
    held = [
        value
        for module in block.modules()
        for values in (module._buffers.values(), vars(module).values())
        for value in values
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter)
    ]
    attributes = [(module, dict(vars(module)), dict(module._buffers)) for module in block.modules()]
    copies = [value.detach().clone() for value in held]
    try:
        yield
    finally:
        for module, names, buffers in attributes:
            _restore(vars(module), names)
            _restore(module._buffers, buffers)
        for value, copy in zip(held, copies, strict=True):
            value.detach().copy_(copy)


def _restore(now: dict[str, Any], before: Mapping[str, Any]) -> None:
    """Change only what differs: other threads may be using the module."""
    for name in now.keys() - before.keys():
        del now[name]
    for name, value in before.items():
        if now.get(name) is not value:
            now[name] = value

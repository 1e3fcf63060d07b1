"""Two witnesses of which experts compute which tokens; they share no code with the readers.

Shapes: T tokens, K assignments per token, E experts, H hidden size.

* *rows*: how many rows each expert is used with. Experts that are modules are looked at with hooks, stacked
  weights at the operators that get them (``stacks.py``).
* *intervention*: the block is run again on a copy of its input with the same random numbers, once for each
  expert with that expert's weights (a part of a stack) or its output (a module) changed; the tokens whose
  result changes are those that the expert computes, whatever the code in between does.

An intervention costs E + 2 more calls of the block. Weights are put back bit by bit, buffers and tensors that
the block keeps as attributes are put back, and no gradient is computed.
"""

from __future__ import annotations

import random
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map

from observatory.probes.routing.sites import RoutingDecision
from observatory.probes.routing.stacks import far_away

#: Tokens of a further intervention, which costs E + 2 runs of the block: fewer might leave experts unused.
_TOKENS = 64
#: Attributes by which torch keeps what a module consists of.
_OF_MODULES = frozenset(vars(nn.Module()))
#: A repetition may differ by this much of the largest result: kernels add in another order each time.
_NOISE = 1e-2


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

    @contextmanager
    def changed(self, expert: int) -> Iterator[None]:
        """Let one expert return something else on this thread."""
        self.scaled = expert
        try:
            yield
        finally:
            self.scaled = None


def loads_of_decision(decision: RoutingDecision, experts: int) -> list[int]:
    """Assignments per expert of a decision, (E,), as they are counted; waits for the device."""
    ids, mask = decision.expert_ids, decision.token_mask
    if ids is None:
        assert decision.routing_map is not None
        map_TE = decision.routing_map.reshape(-1, experts).ne(0)
        if mask is not None:
            map_TE = map_TE & mask.reshape(-1, 1).ne(0)
        return [int(n) for n in map_TE.sum(dim=0).tolist()]
    if mask is not None:
        ids = ids.reshape(mask.numel(), -1)[mask.reshape(-1).ne(0)]
    kept = ids[(ids >= 0) & (ids < experts)].reshape(-1)
    return [int(n) for n in torch.bincount(kept, minlength=experts).tolist()]


def rows_as_decision(rows_E: Sequence[int], tokens: int, *, device: torch.device) -> RoutingDecision:
    """The decision that gives each expert its rows; which token has which expert is not known from rows."""
    experts = torch.arange(len(rows_E)).repeat_interleave(torch.tensor(rows_E))
    return RoutingDecision(expert_ids=experts.to(device), tokens=tokens)


def chosen_by_intervention(
    block: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    experts: int,
    changed: Callable[[int], AbstractContextManager[None]],
    plain: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> torch.Tensor | None:
    """Which tokens each expert computes in a call of the block.

    Args:
        block: the MoE block; not called by itself, only its ``forward``.
        args: positional arguments.
        kwargs: keyword arguments.
        experts: E.
        changed: a context in which one expert computes something else.
        plain: a context for the first run, in which nothing is changed.

    Returns:
        (E, T) bool on the device of the output. None where repeating the call gives another result, or the
        result has not one row per token.
    """
    state = _State(block)

    def run(context: AbstractContextManager[None]) -> torch.Tensor | None:
        try:
            with context:
                return _rows(_run(block, args, kwargs), args, kwargs)
        finally:
            state.restore()

    with torch.no_grad():
        result, again = run(plain()), run(nullcontext())
        if result is None or again is None or result.shape != again.shape:
            return None
        noise = torch.where(result == again, 0, (result - again).abs()).max() if result.numel() else 0
        if not noise <= _NOISE * result.abs().max():
            return None
        changed_T = []
        for expert in range(experts):
            other = run(changed(expert))
            assert other is not None
            same = (other == result) | ((other - result).abs() <= 4 * noise)
            changed_T.append(same.logical_not().any(dim=-1))
    return torch.stack(changed_T)


def tokens_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Rows of the first floating-point argument of two dimensions or more; 0 without one."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1:
            return int(value.numel() // max(value.shape[-1], 1))
    return 0


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


def _rows(output: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """The result of a call, one row per token: as large as its input, else its first of two dimensions."""
    items = output if isinstance(output, (tuple, list)) else (output,)
    results = [t for t in items if isinstance(t, torch.Tensor) and t.is_floating_point()]
    given = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)), None)
    for result in results:
        if given is not None and given.ndim > 1 and result.numel() == given.numel():
            return result.reshape(-1, given.shape[-1])
    return next((t.reshape(-1, t.shape[-1]) for t in results if t.ndim > 1), None)


def _changed(value: Any) -> Any:
    """Another output, also where it is zero."""
    return far_away(value) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


class _State:
    """What a call of a block may change besides its result: put back as it was by ``restore``.

    Tensors that it holds are written only where they differ, and unnoticed by autograd. Lists, sets and
    dictionaries are copied one level deep; global lists of the files that define its modules, in which
    frameworks gather the losses of all layers, lose what was appended; random numbers are those of Python,
    NumPy and of generators that the block holds (torch's own are forked).
    """

    def __init__(self, block: nn.Module) -> None:
        self._attributes = [(module, dict(vars(module)), dict(module._buffers)) for module in block.modules()]
        held = [
            value
            for module, names, buffers in self._attributes
            for key, value in (*names.items(), *buffers.items())
            if key not in _OF_MODULES
        ]
        tensors = [v for v in held if isinstance(v, torch.Tensor) and not isinstance(v, nn.Parameter)]
        self._tensors = [(value, value.detach().clone()) for value in tensors if not value.is_meta]
        self._containers = [(v, copy(v)) for v in held if isinstance(v, (list, dict, set, deque))]
        self._gathered = [(v, len(v)) for v in _globals_of(block) if isinstance(v, list)]
        self._generators = [(v, v.get_state()) for v in held if isinstance(v, torch.Generator)]
        self._random, self._numpy = random.getstate(), np.random.get_state()

    def restore(self) -> None:
        """Put everything back."""
        for module, names, buffers in self._attributes:
            _restore(vars(module), names)
            _restore(module._buffers, buffers)
        for value, before in self._tensors:
            if not torch.equal(value, before):
                with torch.inference_mode() if value.is_inference() else torch.no_grad():
                    value.data.copy_(before)
        for container, contents in self._containers:
            if isinstance(container, (list, deque)):
                container.clear()
                container.extend(contents)
            else:
                container.clear()
                container.update(contents)
        for gathered, length in self._gathered:
            del gathered[length:]
        for generator, state in self._generators:
            generator.set_state(state)
        random.setstate(self._random)
        np.random.set_state(self._numpy)


def _globals_of(block: nn.Module) -> Iterator[Any]:
    """Global values of the Python files that define the block's modules, those of torch left out."""
    names = {kind.__module__ for module in block.modules() for kind in type(module).__mro__}
    for name in names:
        if name.partition(".")[0] not in ("torch", "builtins") and name in sys.modules:
            yield from vars(sys.modules[name]).values()


def _restore(now: dict[str, Any], before: Mapping[str, Any]) -> None:
    """Change only what differs: other threads may be using the module."""
    for name in now.keys() - before.keys():
        del now[name]
    for name, value in before.items():
        if now.get(name) is not value:
            now[name] = value

"""Experts whose weights are stacked in one tensor: which rows meet which expert's part of it.

Shapes: E experts, T tokens, C capacity slots, H hidden size, F expert width.

``SeenOperators`` looks at the operators that get such a tensor, a part of it or a copy of either: group sizes
or offsets of grouped kernels, the ids that parts are gathered by, and the rows that one part is multiplied
with. It does not know how the ids came about, and shares no code with the readers. It also keeps what
operators choose from E values per token.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from observatory.errors import ModelError
from observatory.probes.routing import moe_block

#: Products of two matrices, by where the weight may stand: name -> (position of the left, of the right one).
_PRODUCTS = {"aten::mm": (0, 1), "aten::addmm": (1, 2), "aten::bmm": (0, 1), "aten::baddbmm": (1, 2)}
_GATHERS = ("aten::index", "aten::index_select", "aten::embedding")
_CHOICES = ("aten::topk", "aten::argmax", "aten::max", "aten::multinomial")
_SORTS = "aten::sort"
_COMMUNICATION = ("c10d::", "_c10d_functional::", "_dtensor::")
#: Names of operators, which torch is slow to give.
_names: dict[Any, str] = {}
_FLAT = ("num_experts", "num_local_experts", "moe_num_experts")


@dataclass(frozen=True, slots=True)
class Stack:
    """A tensor that consists of E equal parts, one after the other in memory, one for each expert.

    Attributes:
        tensor: the tensor.
        experts: E.
        is_flat: it is a matrix of which it is not known for certain that experts divide it so.
    """

    tensor: torch.Tensor
    experts: int
    is_flat: bool = False

    @property
    def part_size(self) -> int:
        """Elements of one expert's part."""
        return self.tensor.numel() // self.experts

    def part(self, expert: int) -> torch.Tensor:
        """The part of one expert, (numel / E,), sharing memory; outside of autograd."""
        first = self.tensor.storage_offset() + expert * self.part_size
        return torch.as_strided(self.tensor.data, (self.part_size,), (1,), first)


def can_look_at_operators() -> bool:
    """Whether torch uses compiled code while operators are looked at; older versions skip it from then on."""
    return hasattr(TorchDispatchMode, "ignore_compile_internals")


def find_stacks(block: nn.Module, experts: int) -> list[Stack]:
    """The stacked weights of a block's routed experts, in the order in which they were registered.

    They have the experts as first dimension, of three or more, or as the first two, of four or more; or they
    are the tables of an embedding with one row per expert; or, where modules state E and have none of these,
    matrices of E equal parts.
    """
    named = list(_of_experts(block))
    whole = [t for m in named for t in _tensors(m) if t.ndim >= 3 and t.shape[0] == experts]
    whole = whole or [
        t for m in named for t in _tensors(m) if t.ndim >= 4 and t.shape[0] * t.shape[1] == experts
    ]
    tables = [m for m in block.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == experts]
    whole = whole or [t for m in tables for t in _tensors(m)]
    flat = [
        m
        for m in named
        if any(moe_block.int_attribute(h, _FLAT) == experts for h in moe_block.with_settings(m))
    ]
    divided = [t for m in flat for t in _tensors(m) if t.ndim == 2 and t.numel() % experts == 0]
    return [
        Stack(t, experts, is_flat=not whole)
        for t in whole or divided
        if t.is_contiguous() and t.numel() >= experts
    ]


def _of_experts(block: nn.Module) -> Iterator[nn.Module]:
    """What is named after experts in there, with what lies inside, the shared ones left out."""

    def walk(module: nn.Module, is_inside: bool) -> Iterator[nn.Module]:
        if is_inside:
            yield module
        for name, child in module.named_children():
            if "shared" not in name:
                yield from walk(child, is_inside or "expert" in f"{name} {type(child).__name__}".lower())

    yield from walk(block, is_inside="expert" in type(block).__name__.lower())


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters and buffers of the module itself that lie in the memory of this process."""
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None and type(tensor) in (torch.Tensor, nn.Parameter) and not tensor.is_meta:
            yield tensor


@contextmanager
def changed_part(stack: Stack, expert: int) -> Iterator[None]:
    """Let one expert compute something else; its part is put back bit by bit, whatever happens meanwhile.

    Autograd does not notice: neither versions nor gradients change.

    Raises:
        ModelError: the part is not what it was; the model must not be used any more.
    """
    with torch.inference_mode() if stack.tensor.is_inference() else torch.no_grad():
        part = stack.part(expert)
        saved = part.clone()
        try:
            part.copy_(_other_values(saved))
            yield
        finally:
            _put_back(part, saved)
    if not torch.equal(_bits(part), _bits(saved)):
        raise ModelError(f"the weights of expert {expert} could not be put back; load the model again")


@contextmanager
def changed_parts(stacks: Sequence[Stack], expert: int) -> Iterator[None]:
    """``changed_part`` for all stacks: where a ReLU lets nothing through, one alone shows nothing."""
    with ExitStack() as all_of_them:
        for stack in stacks:
            all_of_them.enter_context(changed_part(stack, expert))
        yield


def _put_back(part: torch.Tensor, saved: torch.Tensor) -> None:
    interruption: KeyboardInterrupt | None = None
    while True:
        try:
            with torch.inference_mode() if part.is_inference() else torch.no_grad():
                part.copy_(saved)
            break
        except KeyboardInterrupt as error:  # once more; it is raised when all is as before
            interruption = error
    if interruption is not None:
        raise interruption


def far_away(values: torch.Tensor) -> torch.Tensor:
    """Other values that short floating-point formats show behind a small gate weight; finite."""
    return values.mul(-(2.0**6) if values.dtype == torch.float16 else -(2.0**16)).add(1)


def _other_values(values: torch.Tensor) -> torch.Tensor:
    if values.is_floating_point() and values.element_size() > 1:
        return far_away(values)
    return _bits(values).bitwise_xor(0x88 if values.is_floating_point() else 0x08).view(values.dtype)


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.uint8)


@dataclass(slots=True)
class _Alias:
    """A tensor that holds a stack or one expert's part of it; kept, so that its address stays its own.

    Attributes:
        stack: number of the stack.
        expert: the expert whose part it is; None for all.
        first: its first byte in its storage.
        size: its bytes.
        tensor: the tensor.
    """

    stack: int
    expert: int | None
    first: int
    size: int
    tensor: torch.Tensor


class SeenOperators(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not annotate it
    """While it is on, notes the rows that each expert's part of some stacks is used with.

    Attributes:
        choices: (E, indices) of each operator that chose from E values, the last dimension of its input.
        saw_communication: an operator of ``torch.distributed`` was called.
        is_over: nothing more is looked at.
        frame: that of the call that is looked at; a call that Ctrl-C ended runs no hooks.
    """

    def __init__(self, stacks: list[Stack]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.saw_communication = False
        self.is_over = False
        self.frame: FrameType | None = None
        self.choices: list[tuple[int, torch.Tensor]] = []
        self._experts = 0
        self._has_failed = False
        self._aliases: dict[int, list[_Alias]] = {}
        self._taken_rows: list[list[torch.Tensor]] = []
        self.add(stacks)

    def add(self, stacks: list[Stack]) -> None:
        """Look at these stacks, too: those that are whole only while their module is called (FSDP2)."""
        for stack in stacks:
            if self._alias_of(stack.tensor) is None:
                self._experts = stack.experts
                self._note(stack.tensor, len(self._taken_rows), None)
                self._taken_rows.append([])

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code in there stays compiled; what it does inside is not seen."""
        return True

    def rows_E(self) -> list[int] | None:
        """Rows per expert; None where no use of a stack was understood. Waits for the device.

        Stacks that a call uses in two halves show each row twice: the one with the fewest rows counts.
        """
        sums = [torch.stack(rows).sum(dim=0) for rows in self._taken_rows if rows]
        totals = [s for s in sums if int(s.sum())]
        if self._has_failed or not totals:
            return None
        return [int(n) for n in min(totals, key=lambda s: int(s.sum())).tolist()]

    def choice(self, *, tokens: int, experts: int, top_k: int) -> torch.Tensor | None:
        """Indices (T * K) of the last choice of K of E values for each token; None where there was none."""
        for of, ids in reversed(self.choices):
            if of == experts and ids.numel() == tokens * top_k:
                return ids
            if of == experts and ids.shape[-1] == experts and ids.numel() == tokens * experts:  # sorted
                return ids.reshape(tokens, experts)[:, :top_k]
        return None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.is_over or not (self.frame is None or is_running(self.frame, sys._getframe(1))):
            self.is_over = True
            self.choices.clear()
            self._aliases.clear()
            return func(*args, **(kwargs or {}))
        if torch.is_inference_mode_enabled():  # operators come whole there
            with self:
                parts = func.decompose(*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
        output = func(*args, **(kwargs or {}))
        name = _names.get(func) or _names.setdefault(func, func._schema.name)
        if (
            not self._taken_rows
            and name not in _CHOICES
            and name != _SORTS
            and not name.startswith(_COMMUNICATION)
        ):
            return output
        try:
            self._see(name, args, kwargs, output)
        except Exception:  # the model's own run must not suffer from ours
            self._has_failed = True
        return output

    def _see(self, name: str, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
        if name.startswith(_COMMUNICATION):
            self.saw_communication = True
        elif name in _CHOICES and len(args) > 1:
            along = args[2] if name == "aten::topk" and len(args) > 2 else -1
            along = args[1] if name in ("aten::argmax", "aten::max") else along
            if along in (-1, args[0].ndim - 1):
                chosen = output if isinstance(output, torch.Tensor) else output[1]
                self.choices.append((int(args[0].shape[-1]), chosen))
        elif name == _SORTS and (kwargs or {}).get("descending", len(args) > 2 and args[2]):
            self.choices.append((int(args[0].shape[-1]), output[1]))
        operands = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        for operand in operands:
            alias = self._alias_of(operand)
            if alias is not None:
                self._look(name, args, operands, operand, alias, output)
                break

    def _alias_of(self, tensor: torch.Tensor) -> _Alias | None:
        """The stack that a tensor is a view of, with the expert whose part it lies in, if it is but one's."""
        if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.is_meta or not tensor.numel():
            return None
        first, size = _bytes(tensor)
        for alias in self._aliases.get(_address(tensor), ()):
            if not alias.first <= first < first + size <= alias.first + alias.size:
                continue
            part = alias.size // self._experts
            place, end = (first - alias.first) // part, (first + size - 1 - alias.first) // part
            if alias.expert is None and self._experts > 1 and place == end:
                return _Alias(alias.stack, place, first, size, tensor)
            return alias
        return None

    def _note(self, tensor: torch.Tensor, stack: int, expert: int | None) -> None:
        alias = _Alias(stack, expert, *_bytes(tensor), tensor)
        self._aliases.setdefault(_address(tensor), []).append(alias)

    def _look(
        self,
        name: str,
        args: tuple[Any, ...],
        operands: list[torch.Tensor],
        operand: torch.Tensor,
        alias: _Alias,
        output: Any,
    ) -> None:
        if not isinstance(output, torch.Tensor) or type(output) is not torch.Tensor or not output.numel():
            return
        if _address(output) == _address(operand):  # a view
            return
        marks = [t for t in operands if not t.is_floating_point() and not t.is_complex()]
        rows: torch.Tensor | None = None
        if name in _GATHERS:
            if alias.expert is None and len(marks) == 1:
                if marks[0].numel() == 1:
                    self._note(output, alias.stack, int(marks[0]))
                else:
                    ids = marks[0].reshape(-1)
                    rows = torch.bincount(ids, minlength=self._experts)[: self._experts]
        elif name in _PRODUCTS or name in ("aten::linear", "aten::mv"):
            rows = self._rows_of_product(name, args, operand, alias, output)
        elif sizes := [t for t in marks if t.ndim == 1 and t.numel() == self._experts]:
            rows = sizes[0].to(torch.int64)
            if bool((rows.diff() >= 0).all()) and int(rows[-1]) == output.shape[0]:  # ends, not sizes
                rows = rows.diff(prepend=rows.new_zeros(1))
        elif output.shape == operand.shape:  # another format, layout or scale of the same weights
            self._note(output, alias.stack, alias.expert)
        if rows is not None:
            self._taken_rows[alias.stack].append(rows.detach().cpu())

    def _rows_of_product(
        self,
        name: str,
        args: tuple[Any, ...],
        weight: torch.Tensor,
        alias: _Alias,
        output: torch.Tensor,
    ) -> torch.Tensor | None:
        experts = self._experts
        if alias.expert is not None:
            left, right = _PRODUCTS.get(name, (0, 1))
            on_right = name in _PRODUCTS and args[right] is weight
            width = weight.shape[-1] if on_right else weight.shape[-2 if weight.ndim > 1 else -1]
            rows = torch.zeros(experts, dtype=torch.int64)
            rows[alias.expert] = output.numel() // max(width, 1)
            return rows
        if name not in ("aten::bmm", "aten::baddbmm") or weight.shape[0] != experts:
            return None
        left, right = _PRODUCTS[name]
        other, along = (args[left], -1) if args[right] is weight else (args[right], -2)
        return other.ne(0).any(dim=along).sum(dim=-1)  # type: ignore[no-any-return]


def is_running(frame: FrameType, now: FrameType | None) -> bool:
    """Whether a frame is among the callers of the present one."""
    while now is not None and now is not frame:
        now = now.f_back
    return now is frame


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(tensor: torch.Tensor) -> tuple[int, int]:
    """The first byte of a tensor in its storage, and the number of bytes from there to its last one."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset()) * tensor.element_size(), (int(last) + 1) * tensor.element_size()

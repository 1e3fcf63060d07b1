"""Which modules of a program are models with MoE layers, and when one is called for the first time.

A module is seen as its parent takes it: if it looks like a part of an MoE layer, the outermost module around
its parent gets a hook in front of its first forward, and the module loses it. So the hook rises to the
outermost module, wrappers such as DDP and compiled modules included, whether lists of layers are filled
before or after the model takes them, and no forward of a program without such modules has any.
"""

from __future__ import annotations

import atexit
from types import ModuleType
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle

#: In the names of classes and of children of what may be an MoE layer.
_SIGNS = ("moe", "expert", "router")
_GATE = "gate"
#: The module that took a module last.
_parents: WeakKeyDictionary[nn.Module, ReferenceType[nn.Module]] = WeakKeyDictionary()
_handle: RemovableHandle | None = None


def begin(_torch: ModuleType) -> None:
    """Watch every model that is built from now on; torch has just been imported."""
    global _handle  # noqa: PLW0603  # torch has one list of such hooks
    _handle = register_module_module_registration_hook(_registered)
    atexit.register(_end)


def leave_alone() -> None:
    """Watch no model that is built from now on; doing it twice does nothing."""
    if _handle is not None:
        _handle.remove()


def _registered(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    try:
        if child is None:
            return
        _parents[child] = ref(parent)
        if not (_lower(child) or _is_sign(name) or _looks_like_moe(child)):
            return
        outermost = _outermost(parent)
        if first_forward not in outermost._forward_pre_hooks.values():
            outermost.register_forward_pre_hook(first_forward, with_kwargs=True)
    except Exception:  # a module without nn.Module.__init__, say: the program meets its own error
        return


def _outermost(module: nn.Module) -> nn.Module:
    """The module around a module that no other one holds."""
    passed = {id(module)}
    while (outer := _parent(module)) is not None and id(outer) not in passed:
        passed.add(id(outer))
        module = outer
    return module


def _parent(module: nn.Module) -> nn.Module | None:
    """The module that took a module last, if it still holds it."""
    parent = _parents[module]() if module in _parents else None
    holds = parent is not None and any(child is module for child in parent._modules.values())
    return parent if holds else None


def _lower(module: nn.Module) -> bool:
    """Whether the module had the hook, which is gone then."""
    hooks = module._forward_pre_hooks
    keys = [key for key, hook in hooks.items() if hook is first_forward]
    for key in keys:
        del hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)
    return bool(keys)


def _is_sign(name: str) -> bool:
    return name == _GATE or any(sign in name.lower() for sign in _SIGNS)


def _looks_like_moe(module: nn.Module) -> bool:
    return _is_sign(type(module).__name__) or any(map(_is_sign, module._modules))


def first_forward(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Start the watch; an error of ours never goes through the program's call."""
    _lower(module)
    from observatory.probes.programs.watching import watch_program_model

    watch_program_model(module, arguments, options)


def _end() -> None:
    import sys

    watching = sys.modules.get("observatory.probes.programs.watching")
    if watching is not None:
        watching.end_all()

"""Hooks that compiled code notices.

``torch.compile`` does not look whether hooks were added to a module after it was compiled. It does check
the module's class. So a watched module gets, together with its hooks, a subclass of its class that adds
nothing: code compiled earlier is compiled anew with the hooks in it, and when the class is put back, the code
without hooks is valid again. A class always gets the same subclass, so that code compiled during one watch
serves the next as well.
"""

from __future__ import annotations

import copyreg
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from observatory.errors import ModelError

#: Called with the module, its arguments, and after it the output. Another library that puts
#: hooks back may forget the keyword arguments, which must not end the model's call.
PreHook = Callable[..., None]
PostHook = Callable[..., Any]
#: What takes their place then.
NO_KWARGS: Mapping[str, Any] = {}

#: Attribute that marks our hooks.
_OURS = "_observatory_hook"
_lock = threading.Lock()
#: How many attachments each module has now.
_attached: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
#: Watched modules that were copied or pickled since they are watched.
_copied: weakref.WeakSet[nn.Module] = weakref.WeakSet()
#: The marked subclass of each class, as long as something uses it.
_marks: weakref.WeakKeyDictionary[type, weakref.ref[type]] = weakref.WeakKeyDictionary()


class Attachment:
    """The hooks of one watch on one module.

    Attributes:
        module: the module.
        is_minor: code compiled earlier need not notice the hooks.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        before: PreHook | None = None,
        after: PostHook | None = None,
        first: bool = False,
        marks: bool = True,
        listen: Callable[[], Callable[[], None]] | None = None,
    ) -> None:
        """Put the hooks on.

        Args:
            module: where.
            before: called before it.
            after: called after it; also when it raised, if there is a ``before``.
            first: ``after`` runs before the hooks that are there (FSDP's).
            marks: code compiled earlier is to notice them; otherwise the module keeps its class.
            listen: has the program call us from its own code, also while paused, and returns what ends that.
        """
        self.module = module
        self._before, self._after, self._first = before, after, first
        self._handles: list[RemovableHandle] = []
        self._is_off = False
        self._is_paused = False
        self.is_minor = not marks
        for hook in (before, after):
            if hook is not None:
                setattr(hook, _OURS, True)
        run_uncompiled(before, after)
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(
                f"{type(module).__name__} is compiled by torch.jit, which takes no hooks; watch it unscripted"
            )
        self._register()
        self._marks = marks or _is_compiled(module)
        if self._marks:
            _change(module, +1)
        self._unlisten = listen() if listen is not None else None

    def hooks(self) -> list[tuple[nn.Module, int]]:
        """The module and the number of the hook after it, if there is one."""
        return [(self.module, handle.id) for handle in self._handles[-1:] if self._after is not None]

    def pre_hooks(self) -> list[tuple[nn.Module, int]]:
        """The module and the number of the hook before it, if there is one."""
        return [(self.module, handle.id) for handle in self._handles[:1] if self._before is not None]

    def is_on(self) -> bool:
        """Whether the module still has the hooks, where they were put."""
        return all(number in module._forward_hooks for module, number in self.hooks()) and all(
            number in module._forward_pre_hooks for module, number in self.pre_hooks()
        )

    def was_copied(self) -> bool:
        """Whether the module was copied or pickled; the copies have no hooks."""
        return self.module in _copied

    def is_carried_by(self, module: nn.Module) -> bool:
        """Whether another module has all of the hooks: it was made with the attributes of this one."""
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        return all(any(h is hook for h in hooks) for hook in (self._before, self._after) if hook is not None)

    def restore(self) -> None:
        """Put the hooks on again; once, also where another library has put them back.

        Code that was compiled while they were missing is compiled anew, also for other modules of the class.
        """
        self._unregister()
        self._register()
        if self._marks:
            _renew_mark(self.module)

    def pause(self) -> None:
        """Take the hooks off and put the class back until `resume`."""
        if self._is_off or self._is_paused:
            return
        self._is_paused = True
        self._unregister()
        if self._marks:
            _change(self.module, -1)

    def resume(self) -> None:
        """Put the hooks on again after `pause`."""
        if self._is_off or not self._is_paused:
            return
        self._is_paused = False
        self._register()
        if self._marks:
            _change(self.module, +1)

    def remove(self) -> None:
        """Take the hooks off and put the class back; doing it twice does nothing."""
        self.pause()
        self._is_off = True
        if self._unlisten is not None:
            self._unlisten()
            self._unlisten = None

    def _register(self) -> None:
        if self._before is not None:
            self._handles.append(self.module.register_forward_pre_hook(self._before, with_kwargs=True))
        if self._after is not None:
            self._handles.append(
                self.module.register_forward_hook(
                    self._after, with_kwargs=True, always_call=self._before is not None, prepend=self._first
                )
            )

    def _unregister(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for name, ours in (("_forward_pre_hooks", self._before), ("_forward_hooks", self._after)):
            hooks = getattr(self.module, name)
            for key in [key for key, hook in hooks.items() if hook is ours]:  # under another number
                del hooks[key]


def run_uncompiled(*hooks: PreHook | PostHook | None) -> None:
    """Keep compilers from compiling a function of ours by itself, when it is called between compiled code.

    Hooks inside a compiled module are traced with it all the same. Without this everything works too, but
    every watch adds to the hooks' recompilations, whose number is limited.
    """
    try:
        from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
    except ImportError:  # another version of torch keeps this elsewhere
        return
    for hook in hooks:
        if isinstance(hook, types.FunctionType):
            strategy = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
            set_code_exec_strategy(hook.__code__, strategy)


def _is_compiled(module: nn.Module) -> bool:
    compiled = getattr(module, "_compiled_call_impl", None) is not None
    return compiled or type(module).__name__ == "OptimizedModule"


def _change(module: nn.Module, by: int) -> None:
    with _lock:
        count = _attached.get(module, 0) + by
        kind = type(module)
        base = kind.__dict__.get("_observatory_base", kind)
        if count == 1 and by > 0:
            _copied.discard(module)
        if count:
            _attached[module] = count
        else:
            _attached.pop(module, None)
        # Some modules (OptimizedModule) hand attribute assignment on to another one.
        object.__setattr__(module, "__class__", _marked(base) if count else base)


def _marked(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass that differs from its base in identity only."""
    reference = _marks.get(base)
    marked = None if reference is None else reference()
    if marked is None:
        try:
            marked = _new_mark(base)
        except (
            Exception
        ):  # its __init_subclass__ wants options, or refuses; code compiled earlier sees no hooks
            return base
        _marks[base] = weakref.ref(marked)
    return marked


def _renew_mark(module: nn.Module) -> None:
    """Give all watched modules of this one's class a subclass that no compiled code knows."""
    with _lock:
        base: type[nn.Module] = type(module).__dict__.get("_observatory_base") or type(module)
        _marks.pop(base, None)
        for watched in list(_attached):
            if type(watched).__dict__.get("_observatory_base") is base:
                object.__setattr__(watched, "__class__", _marked(base))


def _new_mark(base: type[nn.Module]) -> type[nn.Module]:

    def reduce_unmarked(self: nn.Module, protocol: Any) -> Any:
        """Copies and pickles are of the base class and without our hooks."""
        _copied.add(self)
        made: Any = base.__reduce_ex__(self, protocol)
        if not isinstance(made, tuple) or made[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return made
        return (copyreg._reconstructor, (base, object, None), _without_our_hooks(made[2]))  # type: ignore[attr-defined]

    names = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": reduce_unmarked,
        "_observatory_base": base,
    }
    return cast(type[nn.Module], types.new_class(base.__name__, (base,), {}, lambda body: body.update(names)))


def _without_our_hooks(state: dict[str, Any]) -> dict[str, Any]:
    """A module's state with only the hooks of others in it."""
    clean = dict(state)
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        kept = {key: hook for key, hook in state[name].items() if not hasattr(hook, _OURS)}
        clean[name] = OrderedDict(kept)
        for flags in (f"{name}_with_kwargs", f"{name}_always_called"):
            if flags in state:
                clean[flags] = OrderedDict((key, flag) for key, flag in state[flags].items() if key in kept)
    return clean

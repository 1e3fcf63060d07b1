"""The two places that every exchange of ``torch.distributed`` passes, and how we listen there.

Whoever starts the exchange (``dist.all_to_all_single`` under any name it was imported as, the functional
collectives, autograd's backward of either, code compiled earlier), it ends in an operator of the ``c10d``
library. We register a kernel for these operators under the dispatch key ``BackendSelect``, which nothing else
uses there: it is called before the backend's kernel, with the very arguments, and hands them on. Taking the
kernel away restores everything. torch changes its table of kernels without regard to threads that read it
(they fail or crash), so the kernels of a program whose other threads exchange stay registered after the last
listener left, and only hand the exchange on.

A kernel in Python costs more than all we note: the dispatcher turns arguments and result into Python objects
and back, twice. Python programs come by a method of ``ProcessGroup``, all-to-alls of one tensor by
``all_to_all_single`` (``alltoall_base`` in older versions), so while anybody listens our own stands there. It
calls the backend as the operator's kernel would, and so leaves the dispatcher out; a call of which the
dispatcher would make anything else (``_is_straight``) goes its usual way.

End of an exchange, without making any thread wait that would not wait anyhow:

* host backends (gloo), blocking call: the caller blocks next anyway, so we block on its behalf and take the
  time. What we have to note is noted before, while the exchange is on its way.
* host backends, ``async_op=True`` and the functional collectives: a callback of the work's future.
* NCCL: timing events on the stream that the result is ready on, read much later by another thread.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from observatory.errors import CaptureError
from observatory.probes.routing.attachment import run_uncompiled
from observatory.probes.timeline.issue import Issue, Mark, Side, side_of, side_of_list
from observatory.probes.timeline.streams import is_capturing, mark_now


class Listener(Protocol):
    """Is called for every exchange, on the thread that starts it; must not raise and must be quick."""

    def issued(self, issue: Issue, group: Any) -> None:
        """The exchange was started on this process group; it may or may not be over."""
        ...

    def untimed(self) -> None:
        """An exchange was recorded into a CUDA graph instead of being started."""
        ...

    def broken(self, error: Exception) -> None:
        """We could not make sense of an exchange; it went on all the same."""
        ...

    def spent(self, ns: int) -> None:
        """Host time that one exchange took longer because of us."""
        ...


_lock = threading.Lock()
_listeners: tuple[Listener, ...] = ()
_library: Any = None
#: Methods of ``ProcessGroup`` that ours stand in for, by name.
_methods: dict[str, Any] = {}
#: Threads that exchanged since the kernels were registered, by identity, which later threads use again.
_threads: dict[int, threading.Thread] = {}


class _Known(threading.local):
    """Whether this thread is in ``_threads``, of the kernels that are registered now."""

    library: Any = None


_known = _Known()

Reader = Callable[[Sequence[Any]], Issue]


def _all_to_all_single(arguments: Sequence[Any]) -> Issue:
    output, given, _group, receives, sends = arguments[:5]
    return Issue(
        "all_to_all_single", given.device, given.dtype, side_of(given, sends), side_of(output, receives)
    )


def _all_to_all(arguments: Sequence[Any]) -> Issue:
    outputs, given = arguments[:2]
    first = given[0]
    return Issue("all_to_all", first.device, first.dtype, side_of_list(given), side_of_list(outputs))


def _all_gather(arguments: Sequence[Any]) -> Issue:
    output, given = arguments[:2]
    shares = _equal_shares(output)
    return Issue("all_gather_into_tensor", given.device, given.dtype, shares, shares)


def _reduce_scatter(arguments: Sequence[Any]) -> Issue:
    given = arguments[1]
    shares = _equal_shares(given)
    return Issue("reduce_scatter_tensor", given.device, given.dtype, shares, shares)


def _equal_shares(whole: torch.Tensor) -> Side:
    return Side(whole.shape, whole.itemsize, ())


#: Methods by which Python programs start an all-to-all of one tensor, in this torch or an older one.
_METHODS = ("all_to_all_single", "alltoall_base")

#: Operator of the c10d library -> how to read its arguments; the third is the process group in all of them.
_READERS: dict[str, Reader] = {
    "alltoall_base_": _all_to_all_single,
    "alltoall_": _all_to_all,
    "_allgather_base_": _all_gather,
    "_reduce_scatter_base_": _reduce_scatter,
}


def unsupported() -> str | None:
    """Why this build of torch cannot be listened to; None when it can."""
    if not torch.distributed.is_available():
        return "this build of torch has no torch.distributed"
    c10d = torch._C._distributed_c10d
    if not hasattr(c10d.Work, "unbox") or not hasattr(c10d.ProcessGroup, "unbox"):
        return f"torch {torch.__version__} does not hand its collectives to Python kernels"
    missing = [name for name in _READERS if not hasattr(torch.ops.c10d, name)]
    return f"torch {torch.__version__} has no operator c10d::{missing[0]}" if missing else None


def is_tapped() -> bool:
    """Whether anything of ours is between the program and its collectives."""
    return bool(_methods) or any(
        torch._C._dispatch_has_kernel_for_dispatch_key(f"c10d::{name}", "BackendSelect") for name in _READERS
    )


def listen(listener: Listener) -> None:
    """Call this listener for every exchange from now on.

    Raises:
        CaptureError: torch does not allow it.
    """
    global _listeners, _library  # noqa: PLW0603  # there is one dispatcher in the process
    reason = unsupported()
    if reason is not None:
        raise CaptureError(
            f"exchanges cannot be watched: {reason}; expected torch 2.6 or newer with torch.distributed, "
            "or pass exchanges=False"
        )
    with _lock:
        if _library is None:
            library: Any = torch.library.Library("c10d", "IMPL")  # type: ignore[no-untyped-call]
            try:
                for name, reader in _READERS.items():
                    library.impl(name, _kernel(name, reader), "BackendSelect", with_keyset=True)
            except BaseException:
                library._destroy()
                raise
            _library = library
        _listeners = (*_listeners, listener)
        _stand_in()


def pause_listening(listener: Listener) -> None:
    """Call it no more until it listens again; our kernels stay, and hand everything on."""
    global _listeners  # noqa: PLW0603  # likewise
    with _lock:
        _listeners = tuple(other for other in _listeners if other is not listener)
        if not _listeners:
            _step_aside()


def unlisten(listener: Listener) -> None:
    """Call it no more; with the last listener our kernels go, unless other threads call them.

    Doing it twice does nothing.
    """
    global _listeners, _library  # noqa: PLW0603  # likewise
    with _lock:
        _listeners = tuple(other for other in _listeners if other is not listener)
        if not _listeners:
            _step_aside()
        if not _listeners and _library is not None and not _others_exchange():
            _library._destroy()
            _library = None
            _threads.clear()


def _others_exchange() -> bool:
    """Whether a thread that exchanged is still running and is not this one."""
    return any(
        thread.is_alive() and thread is not threading.current_thread() for thread in list(_threads.values())
    )


def _know_thread() -> None:
    """Keep the kernels registered as long as this thread may call them."""
    _threads[threading.get_ident()] = threading.current_thread()
    _known.library = _library


def _kernel(name: str, read: Reader) -> Callable[..., Any]:
    operator = getattr(torch.ops.c10d, name).default
    hand_on = operator._handle.redispatch_boxed
    names = [argument.name for argument in operator._schema.arguments]
    alone = len(operator._schema.returns) == 1
    flag = names.index("async_op") if "async_op" in names else len(names)
    below = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)
    c10d = torch._C._distributed_c10d

    def kernel(keyset: Any, *arguments: Any) -> Any:
        listeners = _listeners
        if _known.library is not _library:
            _know_thread()
        entered_ns = time.monotonic_ns()
        start = _start(arguments, listeners) if listeners else None
        started_ns = time.monotonic_ns()
        result = hand_on(keyset & below, *arguments)
        if start is None:
            return result
        returned_ns = time.monotonic_ns()
        # A trailing argument that has its default value is not passed on: async_op is True by default.
        blocking = flag < len(arguments) and not arguments[flag]
        boxed = result if alone else result[-1]
        work = None if boxed is None else c10d.Work.unbox(boxed)
        group = c10d.ProcessGroup.unbox(arguments[2])
        try:
            issue = read(arguments)
            issue.start, issue.blocking = started_ns if type(start) is int else start, blocking
            _report(issue, group, work, listeners, (started_ns - entered_ns) - returned_ns)
        except Exception as error:  # the program's own exchange must not suffer from ours
            for listener in listeners:
                listener.broken(error)
        return result

    run_uncompiled(kernel)
    return kernel


def _stand_in() -> None:
    """Put our methods in place of those by which Python programs start an all-to-all."""
    try:
        _is_straight(torch.empty(0), torch.empty(0))
    except AttributeError:  # another version of torch keeps this elsewhere; the kernels see everything
        return
    kind = torch._C._distributed_c10d.ProcessGroup
    for name in _METHODS:
        if name not in _methods and name in kind.__dict__:
            _methods[name] = kind.__dict__[name]
            setattr(kind, name, _method(getattr(kind, name)))


def _step_aside() -> None:
    """Put the former methods back, but where another library has replaced ours, which it calls."""
    kind = torch._C._distributed_c10d.ProcessGroup
    for name in list(_methods):
        if getattr(kind.__dict__[name], "_observatory", False):
            setattr(kind, name, _methods.pop(name))


def _method(original: Callable[..., Any]) -> Callable[..., Any]:
    """An all-to-all of one tensor, started at its backend without the dispatcher."""
    options_type = torch._C._distributed_c10d.AllToAllOptions
    read = _READERS["alltoall_base_"]

    @functools.wraps(original)
    def all_to_all(group: Any, *arguments: Any, **named: Any) -> Any:
        listeners = _listeners
        if _known.library is not _library:
            _know_thread()
        if not listeners or named or len(arguments) != 5 or type(arguments[4]) is not options_type:
            return original(group, *arguments, **named)
        entered_ns = time.monotonic_ns()
        output, given, receives, sends, options = arguments
        if not (_is_plain(output) and _is_plain(given) and _is_straight(output, given)):
            return original(group, *arguments)
        try:
            exchange = group._get_backend(given.device).alltoall_base
            started_ns = time.monotonic_ns()
            work = exchange(*arguments)
        except TypeError:  # nothing was started; torch refuses it in its own words
            return original(group, *arguments)
        returned_ns = time.monotonic_ns()
        try:
            # The lists are the program's, to change as it likes.
            issue = read((output, given, group, tuple(receives), tuple(sends)))
            issue.start, issue.blocking = started_ns, not getattr(options, "asyncOp", True)
            _report(issue, group, work, listeners, (started_ns - entered_ns) - returned_ns)
        except Exception as error:  # as in the kernel
            for listener in listeners:
                listener.broken(error)
        return work

    run_uncompiled(all_to_all)
    all_to_all._observatory = True  # type: ignore[attr-defined]
    return all_to_all


def _is_plain(tensor: Any) -> bool:
    """Whether a tensor of the host is what its elements in memory are: no subclass, nothing lazy."""
    return (
        type(tensor) is torch.Tensor
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not tensor.is_neg()
        and not tensor.is_conj()
    )


def _is_straight(output: torch.Tensor, given: torch.Tensor) -> bool:
    """Whether the dispatcher would hand plain tensors to the backend without doing anything else.

    Not where autograd would warn, or where a mode, a transform or the profiler wants to see the operator.
    """
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._profiler_enabled()
        or torch._C._distributed_c10d._allow_inflight_collective_as_graph_input()
        or ((given.requires_grad or output.requires_grad) and torch.is_grad_enabled())
    )


def _start(arguments: Sequence[Any], listeners: Sequence[Listener]) -> Mark | None:
    """Mark the start where that takes more than a look at the host's clock.

    Returns:
        0 where the host's clock serves, an event on the stream otherwise, None when it is not to be timed.
    """
    try:
        given = arguments[1]
        tensor = given[0] if type(given) is list else given
        if not tensor.is_cuda:
            return 0
        if is_capturing(tensor.device):
            for listener in listeners:
                listener.untimed()
            return None
        group = torch._C._distributed_c10d.ProcessGroup.unbox(arguments[2])
        # Only NCCL works in the order of the device's streams, and is not waited for by the host.
        return mark_now(tensor.device) if group._get_backend(tensor.device).name() == "nccl" else 0
    except Exception:  # malformed calls are refused by torch itself, right after
        return 0


def _report(issue: Issue, group: Any, work: Any, listeners: Sequence[Listener], spent_ns: int) -> None:
    """Call the listeners, and arrange that the end of the exchange becomes known.

    They are called while the exchange is on its way: who waits for it anyhow does not wait for us as well.

    Args:
        issue: what was started.
        group: in this process group.
        work: its handle; None where the backend gives none.
        listeners: who is called.
        spent_ns: what it has cost before the exchange, less the time at which that was on its way.
    """
    for listener in listeners:
        listener.issued(issue, group)
    if work is None:
        issue.state = "unknown"
    elif type(issue.start) is not int:
        _mark_end(issue, work)
    elif issue.blocking:
        spent_ns -= _wait(issue, work)
    else:
        _note_end(issue, work)
    spent_ns += time.monotonic_ns()
    for listener in listeners:
        listener.spent(spent_ns)


def _wait(issue: Issue, work: Any) -> int:
    """Wait in place of the caller, who waits next; returns how long, nanoseconds."""
    before_ns = time.monotonic_ns()
    try:
        work.wait()
    except Exception:  # the caller waits as well and gets the same error
        issue.state = "failed"
        return time.monotonic_ns() - before_ns
    after_ns = time.monotonic_ns()
    issue.finish(after_ns)
    return after_ns - before_ns


def _mark_end(issue: Issue, work: Any) -> None:
    """Record an event where the result is ready on the device."""
    if issue.blocking:
        work.wait()  # as the caller does next: it makes the stream wait, where the exchange is on another
        issue.finish(mark_now(issue.device))
    else:
        # Called at once, on a stream that waits for the exchange.
        work.get_future().add_done_callback(lambda _future: issue.finish(mark_now(issue.device)))


def _note_end(issue: Issue, work: Any) -> None:
    """Take the time on the thread that completes the exchange."""

    def done(future: torch.futures.Future[Any]) -> None:
        now_ns = time.monotonic_ns()
        try:
            future.value()
        except Exception:  # the program meets the error where it waits
            issue.state = "failed"
        else:
            issue.finish(now_ns)

    try:
        work.get_future().add_done_callback(done)
    except RuntimeError:  # a backend without futures
        issue.state = "unknown"

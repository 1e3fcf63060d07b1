"""The one place that every exchange of ``torch.distributed`` passes, and how we listen there.

Whoever starts the exchange (``dist.all_to_all_single`` under any name it was imported as, the functional
collectives, autograd's backward of either, code compiled earlier), it ends in an operator of the ``c10d``
library. We register a kernel for these operators under the dispatch key ``BackendSelect``, which nothing else
uses there: it is called before the backend's kernel, with the very arguments, and hands them on. So nothing
has to be replaced in any module, and taking the kernel away restores everything.

End of an exchange, without making anybody wait who would not wait anyhow:

* host backends (gloo), blocking call: the caller waits next thing; we wait in its place and take the time.
* host backends, ``async_op=True`` and the functional collectives: a callback of the work's future.
* NCCL: timing events on the stream that the result is ready on, read much later by another thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from observatory.errors import CaptureError
from probes.exchange.issue import Issue, Side, side_of, side_of_list
from probes.exchange.streams import is_capturing, mark_now

__all__ = ["Listener", "is_tapped", "listen", "unlisten", "unsupported"]


class Listener(Protocol):
    """Is told about every exchange, on the thread that starts it; must not raise and must be quick."""

    def issued(self, issue: Issue) -> None:
        """The exchange was started; it may or may not be over."""
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

Reader = Callable[[Sequence[Any]], Issue]


def _all_to_all_single(arguments: Sequence[Any]) -> Issue:
    output, given, group, receives, sends = arguments[:5]
    send = side_of(given, sends)
    kind = given.dtype
    return Issue(
        algorithm="all_to_all_single",
        group=group,
        device=given.device,
        all_to_all=True,
        payload=kind.is_floating_point or kind.is_complex or (kind.itemsize == 1 and send.width > 1),
        send=send,
        receive=side_of(output, receives),
    )


def _all_to_all(arguments: Sequence[Any]) -> Issue:
    outputs, given, group = arguments[:3]
    send = side_of_list(given)
    kind = given[0].dtype
    return Issue(
        algorithm="all_to_all",
        group=group,
        device=given[0].device,
        all_to_all=True,
        payload=kind.is_floating_point or kind.is_complex or (kind.itemsize == 1 and send.width > 1),
        send=send,
        receive=side_of_list(outputs),
    )


def _all_gather(arguments: Sequence[Any]) -> Issue:
    output, given, group = arguments[:3]
    return Issue(
        algorithm="all_gather_into_tensor",
        group=group,
        device=given.device,
        all_to_all=False,
        payload=False,
        send=_equal_shares(output),
        receive=_equal_shares(output),
    )


def _reduce_scatter(arguments: Sequence[Any]) -> Issue:
    _output, given, group = arguments[:3]
    return Issue(
        algorithm="reduce_scatter_tensor",
        group=group,
        device=given.device,
        all_to_all=False,
        payload=False,
        send=_equal_shares(given),
        receive=_equal_shares(given),
    )


def _equal_shares(whole: torch.Tensor) -> Side:
    return Side((), whole.numel(), whole.itemsize, 1)


#: Operator of the c10d library -> how to read its arguments.
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
    return any(
        torch._C._dispatch_has_kernel_for_dispatch_key(f"c10d::{name}", "BackendSelect") for name in _READERS
    )


def listen(listener: Listener) -> None:
    """Tell this listener about every exchange from now on.

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


def unlisten(listener: Listener) -> None:
    """Tell it no more; with the last listener our kernels go. Doing it twice does nothing."""
    global _listeners, _library  # noqa: PLW0603  # likewise
    with _lock:
        _listeners = tuple(other for other in _listeners if other is not listener)
        if not _listeners and _library is not None:
            _library._destroy()
            _library = None


def _kernel(name: str, read: Reader) -> Callable[..., Any]:
    operator = getattr(torch.ops.c10d, name).default
    handle = operator._handle
    names = [argument.name for argument in operator._schema.arguments]
    flag = names.index("async_op") if "async_op" in names else len(names)
    below = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)

    def kernel(keyset: Any, *arguments: Any) -> Any:
        listeners = _listeners
        entered_ns = time.monotonic_ns()
        issue = _read(read, arguments, listeners) if listeners else None
        started_ns = time.monotonic_ns()
        if issue is not None and type(issue.start) is int:
            issue.start = started_ns
        result = handle.redispatch_boxed(keyset & below, *arguments)
        returned_ns = time.monotonic_ns()
        if issue is None:
            return result
        work = result[-1] if isinstance(result, tuple | list) else result
        waited_ns = 0
        try:
            # A trailing argument that has its default value is not passed on: async_op is True by default.
            waited_ns = _watch_end(issue, work, blocking=flag < len(arguments) and not arguments[flag])
            for listener in listeners:
                listener.issued(issue)
        except Exception as error:
            for listener in listeners:
                listener.broken(error)
        issue.group = None  # rows wait to be written: groups must not live on for their sake
        own_ns = (started_ns - entered_ns) + (time.monotonic_ns() - returned_ns) - waited_ns
        for listener in listeners:
            listener.spent(own_ns)
        return result

    return kernel


def _read(read: Reader, arguments: Sequence[Any], listeners: Sequence[Listener]) -> Issue | None:
    try:
        issue = read(arguments)
        issue.group = torch._C._distributed_c10d.ProcessGroup.unbox(issue.group)
        if issue.device.type == "cuda":
            if is_capturing(issue.device):
                for listener in listeners:
                    listener.untimed()
                return None
            if _on_stream(issue):
                issue.start = mark_now(issue.device)
    except Exception as error:  # the program's own exchange must not suffer from ours
        for listener in listeners:
            listener.broken(error)
        return None
    return issue


def _on_stream(issue: Issue) -> bool:
    """Whether the backend works in the order of the device's streams, and the host does not wait for it."""
    return issue.device.type == "cuda" and issue.group._get_backend(issue.device).name() == "nccl"


def _watch_end(issue: Issue, boxed: Any, *, blocking: bool) -> int:
    """Arrange that the end of the exchange becomes known.

    Returns:
        Host time spent waiting in place of the caller, nanoseconds.
    """
    if boxed is None:
        issue.state = "unknown"
        return 0
    work = torch._C._distributed_c10d.Work.unbox(boxed)
    if not isinstance(issue.start, int):
        if blocking:
            issue.finish(mark_now(issue.device))
        else:
            # Called at once, on a stream that waits for the exchange.
            work.get_future().add_done_callback(lambda _future: issue.finish(mark_now(issue.device)))
        return 0
    if blocking:
        before_ns = time.monotonic_ns()
        try:
            work.wait()
        except Exception:  # the caller waits as well and gets the same error
            issue.state = "failed"
            return time.monotonic_ns() - before_ns
        after_ns = time.monotonic_ns()
        issue.finish(after_ns)
        return after_ns - before_ns

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
    return 0

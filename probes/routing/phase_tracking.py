"""Which phase the model is in now, per thread, and why it is not known where it is not."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from torch import compiler, nn

from probes.routing.attachment import Attachment, PostHook, PreHook
from probes.routing.carriers import Carrier, find_carriers
from probes.routing.phases import CallPhase, Reason, phase_of_call, phase_within

__all__ = ["PhaseTracker"]

_WHY = {
    "length_not_read": "the length of the cache given as {} is on the device and was not read",
    "foreign_cache": "the cache given as {} does not report how full it is",
    "no_cache": "no cache was given or made",
    "takes_no_cache": "the model takes no cache",
    "outside": "made outside of any call of the model",
}


class _Call:
    """An eager call of a carrier, together with calls inside that are unknown for the same reason.

    Its reason counts with the first layer that is counted as unknown in it, or when it ends without one (of
    compiled layers nothing is seen), unless a call inside is known or has a reason of its own.
    """

    __slots__ = ("has_inner", "is_counted", "phase")

    def __init__(self, phase: CallPhase) -> None:
        self.phase = phase
        self.has_inner = False
        self.is_counted = phase.reason is None


class _Around:
    """What a call of a carrier in compiled code is inside of."""

    def __init__(self) -> None:
        self.slot = 0
        self.reason: Reason | None = None


class _Now:
    """What one thread is in.

    Attributes:
        slot: phase of its call, an index into ``SLOTS``; plain attributes are what compilers follow.
        reason: why that is unknown; None when it is known, and outside of calls.
        has_inner: a call inside of it had a reason of its own.
        stack: its eager calls, the innermost last.
    """

    def __init__(self) -> None:
        self.slot = 0
        self.reason: Reason | None = None
        self.has_inner = False
        self.stack: list[_Call] = []


class _Threads(threading.local):
    """Threads share a model (a server's requests, replicas of DataParallel), and each has a phase of its own.

    Compilers guard an object that a thread holds, but not attributes of the thread-local itself.
    """

    def __init__(self) -> None:
        self.now = _Now()


class PhaseTracker:
    """Follows the calls of one model.

    Attributes:
        model_called: the model was called.
    """

    def __init__(self, model: nn.Module, *, on_call: Callable[[], None]) -> None:
        """Track ``model``; ``on_call`` is called at the start of every eager call."""
        self.model_called = False
        self._carriers = find_carriers(model)
        self._on_call = on_call
        self._threads = _Threads()
        self._lock = threading.Lock()
        self._recent: Counter[Reason] = Counter()
        self._unknown: Counter[Reason] = Counter()
        self._recent_compiled: Reason | None = None
        self._unknown_compiled: set[Reason] = set()

    @property
    def slot(self) -> int:
        """Phase of the call that this thread is in, an index into ``SLOTS``; also for compiled code."""
        return self._threads.now.slot

    def attach(self) -> Iterator[Attachment]:
        """Put the hooks on, one carrier after the other."""
        for carrier in self._carriers:
            before, after = self._hooks(carrier)
            yield Attachment(carrier.module, before=before, after=after)

    def outermost_call(self) -> object | None:
        """What identifies the call of the model that this thread is in; None outside of any."""
        stack = self._threads.now.stack
        return stack[0] if stack else None

    def counted_slot(self) -> int:
        """The slot that an eager call of a watched layer counts in."""
        stack = self._threads.now.stack
        if not stack:
            self._add(Reason("outside"))
            return 0
        self._count(stack[-1])
        return stack[-1].phase.slot

    def end_stretch(self, *, is_stated: bool, unknown_calls: int) -> None:
        """Keep the reasons since the last boundary, unless the caller has said what phase it was.

        Args:
            is_stated: the caller has.
            unknown_calls: calls of watched layers that were counted as unknown.
        """
        with self._lock:
            recent, self._recent = self._recent, Counter()
        compiled, self._recent_compiled = self._recent_compiled, None
        if is_stated:
            return
        self._unknown.update(recent)
        if compiled is not None:
            self._unknown_compiled.add(compiled)
        elif unknown_calls and not recent and not self._threads.now.stack:
            self._unknown[Reason("outside")] += unknown_calls

    def notes(self, *, given_a_cache: bool) -> Iterator[str]:
        """One line for every reason why a phase is unknown; of calls that were given a cache or of others."""
        for reason, calls in sorted(self._unknown.items()):
            if bool(reason.argument) == given_a_cache:
                what = "calls of watched layers" if reason.code == "outside" else "calls of the model"
                yield f"phase unknown in {what} ({calls}): {_why(reason)}"
        for reason in sorted(self._unknown_compiled):
            if bool(reason.argument) == given_a_cache:
                yield f"phase unknown in compiled calls of the model: {_why(reason)}"

    def _count(self, call: _Call) -> None:
        if not call.is_counted and call.phase.reason is not None:
            call.is_counted = True
            self._add(call.phase.reason)

    def _add(self, reason: Reason) -> None:
        with self._lock:
            self._recent[reason] += 1

    def _hooks(self, carrier: Carrier) -> tuple[PreHook, PostHook]:
        around = _Around()

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if compiler.is_exporting():
                return
            self.model_called = True
            phase = phase_of_call(carrier, module, args, kwargs)
            if compiler.is_compiling():
                self._enter_compiled(carrier, around, phase)
            else:
                self._enter(carrier, phase)

        def leave(_module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], _output: Any) -> None:
            if compiler.is_exporting():
                return
            if compiler.is_compiling():
                self._leave_compiled(around)
            else:
                self._leave()

        return enter, leave

    def _enter(self, carrier: Carrier, phase: CallPhase) -> None:
        now = self._threads.now
        outer = now.stack[-1] if now.stack else None
        if outer is not None:
            phase = phase_within(outer.phase, phase, carrier)
        if outer is not None and phase.reason is not None and phase.reason == outer.phase.reason:
            now.stack.append(outer)
        else:
            if outer is not None:
                outer.has_inner = True
            now.stack.append(_Call(phase))
        now.slot, now.reason, now.has_inner = phase.slot, phase.reason, False
        self._on_call()

    def _leave(self) -> None:
        now = self._threads.now
        if now.stack:
            call = now.stack.pop()
            if not (call.has_inner or now.has_inner):
                self._count(call)
        outer = now.stack[-1].phase if now.stack else CallPhase(0)
        now.slot, now.reason, now.has_inner = outer.slot, outer.reason, True

    def _enter_compiled(self, carrier: Carrier, around: _Around, phase: CallPhase) -> None:
        now = self._threads.now
        around.slot, around.reason = (now.slot, now.reason) if carrier.is_inner else (0, None)
        if around.slot or around.reason is not None:
            phase = phase_within(CallPhase(around.slot, around.reason), phase, carrier)
        now.slot, now.reason, now.has_inner = phase.slot, phase.reason, False

    def _leave_compiled(self, around: _Around) -> None:
        now = self._threads.now
        if now.reason is not None and not now.has_inner:
            self._recent_compiled = now.reason
        now.slot, now.reason, now.has_inner = around.slot, around.reason, True


def _why(reason: Reason) -> str:
    return _WHY[reason.code].format(reason.argument)

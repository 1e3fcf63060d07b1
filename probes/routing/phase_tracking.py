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
    """An eager call of a carrier.

    Its reason counts with the first layer that is counted as unknown in it, or when it ends without one (of
    compiled layers nothing is seen), unless a call inside has a reason of its own.
    """

    __slots__ = ("has_inner", "is_counted", "phase")

    def __init__(self, phase: CallPhase) -> None:
        self.phase = phase
        self.has_inner = False
        self.is_counted = phase.reason is None


class _Around:
    """What a call of a carrier in compiled code is inside of: plain attributes, which compilers follow."""

    def __init__(self) -> None:
        self.slot = 0
        self.reason: Reason | None = None


class _Calls(threading.local):
    """Calls of carriers that this thread is in, the innermost last.

    Threads share a model (a server's requests, replicas of DataParallel), and each has a phase of its own.
    """

    def __init__(self) -> None:
        self.stack: list[_Call] = []


class PhaseTracker:
    """Follows the calls of one model.

    Attributes:
        model_called: the model was called.
        slot: what the latest call is, an index into ``SLOTS``; for code that is being compiled.
    """

    def __init__(self, model: nn.Module, *, on_call: Callable[[], None]) -> None:
        """Track ``model``; ``on_call`` is called at the begin of every eager call."""
        self.model_called = False
        self.slot = 0
        self._carriers = find_carriers(model)
        self._on_call = on_call
        self._calls = _Calls()
        self._lock = threading.Lock()
        self._recent: Counter[Reason] = Counter()
        self._unknown: Counter[Reason] = Counter()
        # Written by compiled code: plain attributes, as the slot.
        self._reason: Reason | None = None
        self._has_inner = False
        self._recent_compiled: Reason | None = None
        self._unknown_compiled: set[Reason] = set()

    def attach(self) -> Iterator[Attachment]:
        """Put the hooks on, one carrier after the other."""
        for carrier in self._carriers:
            before, after = self._hooks(carrier)
            yield Attachment(carrier.module, before=before, after=after)

    def current_slot(self) -> int:
        """What this thread's call is, an index into ``SLOTS``."""
        stack = self._calls.stack
        return stack[-1].phase.slot if stack else self.slot

    def counted_slot(self) -> int:
        """The slot that an eager call of a watched layer counts in."""
        stack = self._calls.stack
        if not stack:
            self._add(Reason("outside"))
            return 0
        self._count(stack[-1])
        return stack[-1].phase.slot

    def end_stretch(self, *, told: bool, unknown_calls: int) -> None:
        """Keep the reasons since the last boundary, unless the caller has said what phase it was.

        Args:
            told: the caller has.
            unknown_calls: calls of watched layers that were counted as unknown.
        """
        with self._lock:
            recent, self._recent = self._recent, Counter()
        compiled, self._recent_compiled = self._recent_compiled, None
        if told:
            return
        self._unknown.update(recent)
        if compiled is not None:
            self._unknown_compiled.add(compiled)
        elif unknown_calls and not recent and not self._calls.stack:
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
        stack = self._calls.stack
        if stack:
            phase = phase_within(stack[-1].phase, phase, carrier)
            stack[-1].has_inner = True
        stack.append(_Call(phase))
        self.slot, self._reason = phase.slot, phase.reason
        self._on_call()

    def _leave(self) -> None:
        stack = self._calls.stack
        if stack:
            call = stack.pop()
            if not call.has_inner:
                self._count(call)
        outer = stack[-1].phase if stack else CallPhase(0)
        self.slot, self._reason = outer.slot, outer.reason

    def _enter_compiled(self, carrier: Carrier, around: _Around, phase: CallPhase) -> None:
        around.slot, around.reason = (self.slot, self._reason) if carrier.is_inner else (0, None)
        if around.slot or around.reason is not None:
            phase = phase_within(CallPhase(around.slot, around.reason), phase, carrier)
        self.slot, self._reason = phase.slot, phase.reason
        self._has_inner = False

    def _leave_compiled(self, around: _Around) -> None:
        if self._reason is not None and not self._has_inner:
            self._recent_compiled = self._reason
        self.slot, self._reason = around.slot, around.reason
        self._has_inner = True


def _why(reason: Reason) -> str:
    return _WHY[reason.code].format(reason.argument)

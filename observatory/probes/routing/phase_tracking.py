"""Which phase the model is in now, per thread, and why it is not known where it is not."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import FrameType
from typing import Any

from torch import compiler, nn

from observatory.probes.routing.attachment import NO_KWARGS, Attachment, PostHook, PreHook
from observatory.probes.routing.deferral import Kept
from observatory.probes.routing.inspection import is_recomputed_or_traced
from observatory.probes.routing.phases import (
    CallPhase,
    Carrier,
    PhaseReason,
    find_carriers,
    phase_of_call,
    phase_within,
)
from observatory.probes.routing.stacks import is_running
from observatory.probes.routing.words import UnknownPhase, sentence

#: Modules that start a watch inside of a call.
_STARTER = "observatory.probes.programs."


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
        self.reason: PhaseReason | None = None


class _Now:
    """What one thread is in.

    Attributes:
        slot: phase of its call, an index into ``SLOTS``; plain attributes are what compilers follow.
        reason: why that is unknown; None when it is known, and outside of calls.
        has_inner: a call inside of it had a reason of its own.
        stack: its eager calls, the innermost last.
        frame: the outermost of them; None outside of calls.
        has_ended: the model's own call that is about to be left did not raise.
        kept: calls of watched layers since the innermost call began, which wait to be counted.
    """

    def __init__(self) -> None:
        self.slot = 0
        self.reason: PhaseReason | None = None
        self.has_inner = False
        self.stack: list[_Call] = []
        self.frame: FrameType | None = None
        self.has_ended = False
        self.kept: list[Kept] = []

    def leave_all(self) -> None:
        """Forget calls that ended without their hooks, as after Ctrl-C."""
        self.stack.clear()
        self.slot, self.reason, self.has_inner, self.frame = 0, None, True, None


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
        calls: eager calls of the model since the last ``end_stretch``.
        was_interrupted: a call ended in the middle since then.
        was_inside: threads were in a call at the last ``end_stretch``.
        before_pass: is called before each eager forward pass of the model, while no thread is in one, with a
            function that finds out whether a module's ``generate()`` makes it; None when nothing is to be
            called.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        on_call: Callable[[], None],
        count: Callable[[Sequence[Kept], int], None],
    ) -> None:
        """Track a model.

        Args:
            model: the model.
            on_call: is called at the start of every eager call.
            count: takes calls of watched layers that were kept, and the slot that they count in.
        """
        self.model_called = False
        self.calls = 0
        self.was_interrupted = False
        self.was_inside = False
        self.before_pass: Callable[[Callable[[], bool]], None] | None = None
        self._inside: dict[int, _Now] = {}
        self._carriers = find_carriers(model)
        self._on_call = on_call
        self._count_calls = count
        self._threads = _Threads()
        self._lock = threading.Lock()
        self._recent: Counter[PhaseReason] = Counter()
        self._unknown: Counter[PhaseReason] = Counter()
        self._recent_compiled: PhaseReason | None = None
        self._unknown_compiled: set[PhaseReason] = set()

    @property
    def slot(self) -> int:
        """Phase of the call that this thread is in, an index into ``SLOTS``; also for compiled code."""
        return self._threads.now.slot

    @property
    def is_inside(self) -> bool:
        """Whether a thread is in an eager call of the model."""
        return bool(self._inside)

    @property
    def passes(self) -> Mapping[int, _Now]:
        """By thread: what it is in, while that is an eager call of the model."""
        return self._inside

    def attach(self) -> Iterator[Attachment]:
        """Put the hooks on, one carrier after the other."""
        for carrier in self._carriers:
            before, after = self._hooks(carrier)
            if not carrier.is_inner:
                yield Attachment(carrier.module, after=self._end_hook())
            yield Attachment(carrier.module, before=before, after=after)

    def outermost_call(self) -> object | None:
        """What identifies the call of the model that this thread is in; None outside of any."""
        now = self._inside.get(threading.get_ident())
        return now.stack[0] if now is not None else None

    def counted_slot(self) -> int:
        """The slot that an eager call of a watched layer counts in."""
        stack = self._threads.now.stack
        if not stack:
            self._add(PhaseReason(UnknownPhase.OUTSIDE))
            return 0
        self._count(stack[-1])
        return stack[-1].phase.slot

    def count_kept(self, now: _Now) -> None:
        """Count what a thread has kept, in the slot of its innermost call."""
        with self._lock:
            number = len(now.kept)  # its thread may add to it at the same time
            kept = now.kept[:number]
            del now.kept[:number]
        if kept and now.stack:
            call = now.stack[-1]
            self._count(call)
            self._count_calls(kept, call.phase.slot)

    def count_all_kept(self) -> None:
        """Count what all threads have kept."""
        for now in list(self._inside.values()):
            self.count_kept(now)

    def end_stretch(self, *, is_stated: bool, unknown_calls: int) -> None:
        """Keep the reasons since the last boundary, unless the caller has said what phase it was.

        Args:
            is_stated: the caller has.
            unknown_calls: calls of watched layers that were counted as unknown.
        """
        self.calls, self.was_interrupted, self.was_inside = 0, False, self.is_inside
        with self._lock:
            recent, self._recent = self._recent, Counter()
        compiled, self._recent_compiled = self._recent_compiled, None
        if is_stated:
            return
        self._unknown.update(recent)
        if compiled is not None:
            self._unknown_compiled.add(compiled)
        elif unknown_calls and not recent and not self._threads.now.stack:
            self._unknown[PhaseReason(UnknownPhase.OUTSIDE)] += unknown_calls

    def find_interrupted(self) -> None:
        """Note calls that ended without their hooks, as after Ctrl-C, on this thread and on others."""
        for thread, now in list(self._inside.items()):
            if not _is_inside(thread, now):
                self.count_kept(now)
                now.leave_all()
                self._inside.pop(thread, None)
                self.was_interrupted = True

    def notes(self, *, given_a_cache: bool) -> Iterator[str]:
        """One line for every reason why a phase is unknown; of calls that were given a cache or of others."""
        for reason, calls in sorted(self._unknown.items()):
            if bool(reason.argument) == given_a_cache:
                what = (
                    "calls of watched layers" if reason.code is UnknownPhase.OUTSIDE else "calls of the model"
                )
                yield f"phase unknown in {what} ({calls}): {sentence(reason.code, argument=reason.argument)}"
        for reason in sorted(self._unknown_compiled):
            if bool(reason.argument) == given_a_cache:
                why = sentence(reason.code, argument=reason.argument)
                yield f"phase unknown in compiled calls of the model: {why}"

    def _count(self, call: _Call) -> None:
        if not call.is_counted and call.phase.reason is not None:
            call.is_counted = True
            self._add(call.phase.reason)

    def _add(self, reason: PhaseReason) -> None:
        with self._lock:
            self._recent[reason] += 1

    def _hooks(self, carrier: Carrier) -> tuple[PreHook, PostHook]:
        around = _Around()

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] = NO_KWARGS) -> None:
            if compiler.is_exporting():
                return
            if not carrier.is_inner and not compiler.is_compiling():
                self._note_pass()
            self.model_called = True
            self.calls += not carrier.is_inner
            phase = phase_of_call(carrier, module, args, kwargs)
            if compiler.is_compiling():
                self._enter_compiled(carrier, around, phase)
            else:
                self._enter(carrier, phase)

        def leave(_module: nn.Module, _args: tuple[Any, ...], _kwargs: Any, _output: Any = None) -> None:
            if compiler.is_exporting():
                return
            if compiler.is_compiling():
                self._leave_compiled(around)
            else:
                self._leave(is_models_own=not carrier.is_inner)

        return enter, leave

    def _end_hook(self) -> PostHook:
        def end(_module: nn.Module, _args: tuple[Any, ...], _kwargs: Any, _output: Any = None) -> None:
            if not compiler.is_compiling():
                self._threads.now.has_ended = True

        return end

    def _note_pass(self) -> None:
        if self.before_pass is not None and not self._inside:
            self.before_pass(partial(_is_generating, sys._getframe(2)))

    def _enter(self, carrier: Carrier, phase: CallPhase) -> None:
        now, frame = self._threads.now, _torch_frame(sys._getframe(2))
        if now.kept:
            self.count_kept(now)
        if now.stack and (now.frame is None or not is_running(now.frame, frame)):
            now.leave_all()
            self.was_interrupted = True
        if not now.stack:
            now.frame = frame
            self._inside[threading.get_ident()] = now
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

    def _leave(self, *, is_models_own: bool) -> None:
        now = self._threads.now
        if is_models_own:
            if not now.has_ended and not is_recomputed_or_traced():
                self.was_interrupted = True
            now.has_ended = False
        if now.kept:
            self.count_kept(now)
        if now.stack:
            call = now.stack.pop()
            if not (call.has_inner or now.has_inner):
                self._count(call)
        outer = now.stack[-1].phase if now.stack else CallPhase(0)
        now.slot, now.reason, now.has_inner = outer.slot, outer.reason, True
        if not now.stack:
            now.frame = None
            self._inside.pop(threading.get_ident(), None)

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


def _torch_frame(frame: FrameType) -> FrameType:
    """The frame that lasts as long as the call, also where a watch that starts inside of one calls hooks."""
    while frame.f_globals.get("__name__", "").startswith(_STARTER) and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _is_generating(frame: FrameType | None) -> bool:
    """Whether a module's method ``generate`` is among the callers."""
    while frame is not None:
        code = frame.f_code
        if code.co_name == "generate" and code.co_varnames[:1] == ("self",):
            return isinstance(frame.f_locals.get("self"), nn.Module)
        frame = frame.f_back
    return False


def _is_inside(thread: int, now: _Now) -> bool:
    """Whether a thread is still in the call that it was last seen in."""
    return now.frame is not None and is_running(now.frame, sys._current_frames().get(thread))

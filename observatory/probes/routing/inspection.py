"""Looks at the calls of MoE blocks around the sites: was the site called, and can its reading be trusted?

A block that runs without the call that is read goes round the hook. What is read is held against the rows
that the experts are used with, in the first, second, fourth ... call of each layer, or in all calls; where
rows differ or decide nothing, an intervention decides (``judgement.py``). A reading that cannot see what is
dispatched, because it infers the choice (``RoutingDecision.is_inferred``) or because experts with a capacity
drop assignments, is held against the rows of every call, and rows that differ are counted in its place.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import (  # type: ignore[attr-defined]
    _disable_current_modes,
    _get_current_dispatch_mode,
    _get_dispatch_stack_at,
)

from observatory.probes.options import Verify
from observatory.probes.routing.attachment import NO_KWARGS, Attachment, PostHook, PreHook
from observatory.probes.routing.judgement import BlockCall, Judgement, is_captured, stacks_of_site
from observatory.probes.routing.sites import RoutingDecision, RoutingSite
from observatory.probes.routing.stacks import SeenOperators, can_look_at_operators, is_running
from observatory.probes.routing.witness import RowsOfExperts, tokens_of
from observatory.probes.routing.words import Witness, verdict
from observatory.reasons import Reason
from observatory.run.files import one_line
from observatory.run.manifest import Verified

#: Waiting for another thread: short against a call of a block, long against a look.
_POLL_S = 0.001
#: A thread that is still in the block after this hangs or waits for the other ranks: better no verdict.
_PATIENCE_S = 10.0
_is_compiling = torch.compiler.is_compiling
_graph_task = torch._C._current_graph_task_id
_tracing_state = torch._C._get_tracing_state
#: The code of a module's call, its hooks included.
_MODULE_CALL = nn.Module._call_impl.__code__


def is_recomputed_or_traced() -> bool:
    """Whether a call repeats one that was counted (activation checkpointing) or is traced (``torch.jit``)."""
    return _graph_task() != -1 or _tracing_state() is not None


#: What looks at calls now, on all threads: (inspection, thread). As long as it is empty, no call is one of an
#: intervention and no block's call waits for its end, which hooks then need not ask thread by thread.
looks: set[tuple[int, int]] = set()


class _Suspension(threading.local):
    """Which inspection, of whatever watch, calls its block by itself on this thread; None when none does."""

    by: BlockInspection | None = None


suspension = _Suspension()


class _Call(threading.local):
    """The call of a block on this thread."""

    frame: FrameType | None = None
    is_checked = False
    operators: SeenOperators | None = None

    def __init__(self) -> None:
        self.decisions: list[RoutingDecision] = []


class _Exclusive:
    """Keeps the calls of other threads out of a block while it is run again with other weights.

    Attributes:
        owner: the thread that runs it again; None when none does.
    """

    def __init__(self, block: nn.Module | None) -> None:
        self.owner: int | None = None
        self._block = block
        self._waiting: set[int] = set()
        self._lock = threading.Lock()

    def enter(self) -> None:
        """Begin a call on this thread; waits while another one runs the block again."""
        thread = threading.get_ident()
        while self.is_taken():
            self._waiting.add(thread)
            time.sleep(_POLL_S)
        self._waiting.discard(thread)

    def is_taken(self) -> bool:
        """Whether another thread runs the block again."""
        return self.owner not in (None, threading.get_ident())

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other thread is in the block.

        Raises:
            TimeoutError: another one is, and stays.
        """
        thread = threading.get_ident()
        with self._lock:
            self.owner = thread
            try:
                until = time.monotonic() + _PATIENCE_S
                while self._is_called(set(sys._current_frames()) - {thread}):
                    if time.monotonic() > until:
                        raise TimeoutError("another thread does not leave it")
                    time.sleep(_POLL_S)
                yield
            finally:
                self.owner = None

    def _is_called(self, threads: set[int]) -> bool:
        """Whether one of these threads is in a call of the block, and does not wait at its start."""
        frames = sys._current_frames()
        for thread in threads - self._waiting:
            frame = frames.get(thread)
            while frame is not None:
                if frame.f_code is _MODULE_CALL and frame.f_locals.get("self") is self._block:
                    return True
                frame = frame.f_back
        return False


class _ExpertHook:
    """Called after an expert; in copies and pickles of the expert, something that does nothing."""

    def __init__(self, inspection: BlockInspection, expert: int) -> None:
        self._inspection = inspection
        self._expert = expert

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any = None) -> Any:
        return self._inspection.note_rows(self._expert, args, kwargs, output)

    def __reduce__(self) -> tuple[Any, ...]:
        return (getattr, (nullcontext(), "__exit__"))  # so that reading a pickle needs nothing of ours


class _Tally:
    """Calls of a block, on all threads.

    Attributes:
        ended: calls that ended in order.
        passing: calls that began, without being looked at, and have not ended.
    """

    __slots__ = ("ended", "passing")

    def __init__(self) -> None:
        self.ended = 0
        self.passing = 0


class BlockInspection:
    """The calls of one site's block.

    Attributes:
        was_reached: the site was called.
        was_judged: a reading was held against what the experts compute.
        was_bypassed: the block was called before the site ever was, and ended without it.
        was_repeated: the block was called more than once in one call of the model.
        site: its site.
        reached: calls of the site since the last ``end_stretch``.
        was_interrupted: a call of the block ended in the middle since then.
        has_lost_hooks: a call since then found the hooks on its experts gone.
    """

    def __init__(
        self,
        site: RoutingSite,
        *,
        verify: Verify,
        model_call: Callable[[], object | None],
        count: Callable[[RoutingDecision], None],
        fail: Callable[[Exception], None],
    ) -> None:
        """Inspect the calls of ``site.block``.

        Args:
            site: its site.
            verify: which of them are checked.
            model_call: what identifies the call of the model that the thread is in.
            count: takes what may be counted.
            fail: takes errors.
        """
        self.was_reached = False
        self.was_judged = False
        self.was_bypassed = False
        self.was_repeated = False
        self.reached = 0
        self.was_interrupted = False
        self.has_lost_hooks = False
        self._attachments: tuple[Attachment, ...] = ()
        self._model_call = model_call
        self.site = site
        self._count = count
        self._fail = fail
        self._rows = RowsOfExperts(site.spec.experts)
        self._exclusive = _Exclusive(site.block)
        self._judgement = Judgement(
            site, verify, self._rows, rerun=self._rerun, is_taken=self._exclusive.is_taken
        )
        self._call = _Call()
        self._tally = _Tally()
        #: the call of the model that the block was last called in; of whatever thread
        self._within: object | None = None

    def attach(self) -> list[Attachment]:
        """Put hooks on the block and on its experts; all of them or none."""
        assert self.site.block is not None
        attachments: list[Attachment] = []
        try:
            block = self.site.block
            attachments.append(
                Attachment(block, before=self._enter_hook(), after=self._leave_hook(), first=True)
            )
            for expert, module in enumerate(self.site.experts):
                attachments.append(Attachment(module, after=_ExpertHook(self, expert), marks=False))
            self._attachments = tuple(attachments)
        except BaseException:
            for attachment in attachments:
                attachment.remove()
            raise
        return attachments

    def take(self, decision: RoutingDecision) -> bool:
        """Take a reading of the site; True if it is judged at the end of the block's call.

        Raises:
            ModelError: it is inferred, and there is no such end.
        """
        if suspension.by is self or self._call.is_checked:
            self._call.decisions.append(decision)
            if self._call.operators is not None and not self.site.experts:
                self._call.operators.add(stacks_of_site(self.site))
            return True
        if decision.is_inferred:
            if not all(attachment.is_on() for attachment in self._attachments):
                return True  # stated between steps (integrity.py)
            raise self._judgement.unconfirmed(Reason(Witness.NO_MODULE_CALL))
        return False

    @property
    def ended(self) -> int:
        """Calls of the block that ended in order since the last ``end_stretch``, recomputations included."""
        return self._tally.ended

    @property
    def is_contradicted(self) -> bool:
        """Whether gates are counted which the experts do not follow."""
        return self._judgement.is_contradicted

    def verified(self) -> Verified:
        """What confirmed the readings of all calls: the weakest of the verdicts."""
        verdicts = self._judgement.verdicts
        if not verdicts:
            return verdict("none", Witness.NO_TOKENS if self.was_reached else Witness.NOT_CALLED)
        return weakest(verdicts.values())

    def note_reached(self) -> None:
        """The site was called."""
        self.was_reached = True
        self.reached += 1

    def end_stretch(self) -> None:
        """Count from 0 again."""
        self.reached, self.was_interrupted, self.has_lost_hooks = 0, False, False
        self._tally.ended = self._tally.passing = 0

    def close(self) -> None:
        """End the look at a call of this thread that did not come to its end, as after Ctrl-C."""
        decisions = self._call.decisions if self._call.frame is not None else []
        self._end_look()
        self._count_unjudged(decisions)

    def _end_look(self) -> None:
        operators, self._call.operators = self._call.operators, None
        if operators is not None:
            operators.is_over = True
            if _get_current_dispatch_mode() is operators:
                operators.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._call.frame, self._call.is_checked, self._call.decisions = None, False, []
        looks.discard((id(self), threading.get_ident()))

    def _note_call(self) -> None:
        model_call = self._model_call()
        if model_call is not None and model_call is self._within:
            self.was_repeated = True
        self._within = model_call

    def _enter_hook(self) -> PreHook:
        judgement, tally = self._judgement, self._tally
        modes = judgement.modes

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] = NO_KWARGS) -> None:
            if _is_compiling():
                return
            if not looks and args and type(args[0]) is torch.Tensor:
                mode = modes[module.training]
                if args[0].numel() <= mode.elements and mode.calls + 1 < mode.due:
                    mode.calls += 1
                    tally.passing += 1
                    return
            if self._is_outside():
                return
            self._exclusive.enter()
            call, frame = self._call, sys._getframe(2)
            if call.frame is not None:
                if is_running(call.frame, frame):  # a call inside of a call
                    return
                self.close()  # one that was interrupted
            self._note_call()
            tokens = tokens_of(args, kwargs)
            captured = is_captured()
            checks = not captured and judgement.starts_call(training=module.training, tokens=tokens)
            if self.was_reached and not checks:
                if args and not captured and tokens_of(args[:1], {}):
                    judgement.note_routine(training=module.training, elements=args[0].numel())
                return
            looks.add((id(self), threading.get_ident()))
            call.frame, call.is_checked = frame, checks
            self._rows.clear()
            if checks and can_look_at_operators() and judgement.wants_operators(training=module.training):
                call.operators = SeenOperators([] if self.site.experts else stacks_of_site(self.site))
                call.operators.frame = frame
                call.operators.__enter__()  # type: ignore[no-untyped-call]

        return enter

    def _leave_hook(self) -> PostHook:
        tally = self._tally

        def leave(  # noqa: PLR0912  # one way out after the other, the cheapest first
            module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any = None
        ) -> None:
            if tally.passing:  # before the compiler is asked, whose code never passes: cold calls are dear
                tally.passing -= 1
                if output is not None and not looks:
                    tally.ended += 1
                    return
            if _is_compiling():
                return
            call = self._call
            if self._is_outside():
                return
            # torch calls this hook while it handles the error of a call that raised.
            has_ended = output is not None or sys.exc_info()[0] is None
            if has_ended:
                tally.ended += 1
            else:
                self.was_interrupted = True
            if call.frame is None or not _is_caller(call.frame, sys._getframe(1)):
                return
            operators, is_checked, decisions = call.operators, call.is_checked, call.decisions
            self._end_look()
            if has_ended:
                self.was_bypassed = self.was_bypassed or not self.was_reached
            if not is_checked or not decisions:
                return
            has_hooks = all(attachment.is_on() for attachment in self._attachments)
            if not has_ended or not has_hooks:
                self._count_unjudged(decisions)
                if not has_hooks:
                    self.has_lost_hooks = True
                    removed = verdict("none", Witness.HOOKS_REMOVED)
                    self._judgement.verdicts.setdefault(module.training, removed)
                return
            self.was_judged = True
            try:
                with torch.no_grad(), own_operators():
                    checked = BlockCall(
                        module,
                        args,
                        kwargs,
                        decisions=decisions,
                        rows_E=list(self._rows.rows_E) if self.site.experts else None,
                        operators=operators,
                    )
                    for decision in self._judgement.judge(checked):
                        self._count(decision)
            except Exception as error:  # the model's own run must not suffer from ours
                failure = verdict("none", Witness.FAILED, error=one_line(error))
                self._judgement.verdicts[module.training] = failure
                self._fail(error)

        return leave

    def _count_unjudged(self, decisions: list[RoutingDecision]) -> None:
        """Count what was read in a call whose end shows nothing, where it needs no witness."""
        if not decisions or self._judgement.is_replaceable:
            return
        try:
            with torch.no_grad(), own_operators():
                for decision in decisions:
                    self._count(decision)
        except Exception as error:  # the model's own run must not suffer from ours
            self._fail(error)

    def _is_outside(self) -> bool:
        """Whether a call is not one of the model's own: an intervention's, a recomputation, a trace."""
        return suspension.by is not None or is_recomputed_or_traced()

    def note_rows(self, expert: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        """Take a call of an expert in; what takes the place of its output, None to leave it."""
        if _is_compiling() or not looks or suspension.by is not (None if self._call.is_checked else self):
            return None
        return self._rows.note(expert, args, kwargs, output)

    @contextmanager
    def _rerun(self) -> Iterator[list[RoutingDecision]]:
        """Calls of the block in here are our own; gives what is read in them."""
        with self._exclusive.alone():
            suspension.by, self._call.decisions = self, []
            looks.add((id(self), threading.get_ident()))
            try:
                yield self._call.decisions
            finally:
                looks.discard((id(self), threading.get_ident()))
                suspension.by, self._call.decisions = None, []


def weakest(verdicts: Iterable[Verified]) -> Verified:
    """The verdict that says least."""
    return min(verdicts, key=lambda given: (given.by != "none", given.code is None))


@contextmanager
def own_operators() -> Iterator[None]:
    """Hide our operators from the dispatch modes of the user (FLOP counters, selective checkpointing).

    Modes that torch's tracers are made of stay on.
    """
    modes = [_get_dispatch_stack_at(i) for i in range(torch._C._len_torch_dispatch_stack())]
    if not modes or any(mode.is_infra_mode() for mode in modes):
        yield
    else:
        with _disable_current_modes():
            yield


def _is_caller(frame: FrameType, now: FrameType) -> bool:
    """Whether a hook was called from the call of a module, from its frame or, as a rule, one right below."""
    return frame is now or frame is now.f_back

"""What a clock sweep runs over and over: one phase of a model, or any program that counts iterations."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from observatory.errors import ClockError, ModelError
from observatory.run.files import one_line
from observatory.run.manifest import Phase

if TYPE_CHECKING:
    import torch

_START_S = 600.0
#: What models are fed: real text, as the loads of experts change how long a phase takes.
TEXT = "prose"
_MOST_LINE_BYTES = 1 << 16
#: Ends a process group when its own input ends: when whoever holds the other end is gone, SIGKILL included. A
#: program that rests is stopped, and would hold the device's memory for ever.
_KEEPER = 'read -r _; kill -TERM "-$1"; kill -CONT "-$1"; sleep 5; kill -KILL "-$1"'


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadOptions:
    """What a clock sweep is to run, a model or a program, as the user states it.

    Attributes:
        program: the user's own, with its arguments; empty for a model.
        model: bundled name, checkpoint directory or hub id; None for a program.
        phase: ``prefill`` or ``decode``; of a program its label.
        batch: sequences of each series, separated by commas; None: the default of a model, not known of a
            program.
        context: tokens of context per sequence; None likewise.
        tokens_per_iteration: of a program; None when not known.
        torch_device: of a model.
        dtype: torch dtype name of the weights; None takes the loader's choice.
    """

    program: tuple[str, ...] = ()
    model: str | None = None
    phase: str = "decode"
    batch: str | None = None
    context: int | None = None
    tokens_per_iteration: int | None = None
    torch_device: str = "cuda"
    dtype: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadFacts:
    """What a workload is; fields as in :class:`observatory.run.documents.clock_sweep.ClockSeries`."""

    name: str
    phase: Phase = "unknown"
    batch_size: int | None = None
    context_tokens: int | None = None
    tokens_per_iteration: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A stretch of whole iterations, on the host's monotonic clock."""

    start_ns: int
    end_ns: int
    iterations: int


class Workload(Protocol):
    """Runs while it is measured, rests otherwise."""

    @property
    def facts(self) -> WorkloadFacts:
        """What it is."""
        ...

    def measure(self, *, settle_s: float, window_s: float) -> Window:
        """Run; let it settle; measure whole iterations for about ``window_s``; rest.

        Raises:
            ClockError: it ended, or did not finish an iteration in the time.
        """
        ...

    def close(self) -> None:
        """End it."""
        ...


class ModelWorkload:
    """One phase of a model in this process.

    Args:
        facts: what it is.
        iterate: starts one iteration.
        synchronise: waits until what was started is done.
    """

    def __init__(self, facts: WorkloadFacts, iterate: Any, synchronise: Any) -> None:
        self.facts = facts
        self._iterate = iterate
        self._synchronise = synchronise

    def measure(self, *, settle_s: float, window_s: float) -> Window:
        """See :class:`Workload`. The device is synchronised at both ends, and nowhere between."""
        self._run_for(settle_s)
        self._synchronise()
        start_ns = time.monotonic_ns()
        iterations = self._run_for(window_s)
        self._synchronise()
        return Window(start_ns=start_ns, end_ns=time.monotonic_ns(), iterations=iterations)

    def close(self) -> None:
        """Nothing to end."""

    def _run_for(self, seconds: float) -> int:
        """Iterations started within the time; a device that lags behind is waited for once a second."""
        until, count, checked = time.monotonic() + seconds, 0, time.monotonic()
        while time.monotonic() < until or count == 0:
            self._iterate()
            count += 1
            if time.monotonic() - checked > 1.0:
                self._synchronise()
                checked = time.monotonic()
        return count


@contextlib.contextmanager
def model_workload(
    model: str,
    *,
    phase: Literal["prefill", "decode"],
    batch_size: int,
    context_tokens: int,
    device: str,
    dtype: str | None,
) -> Iterator[ModelWorkload]:
    """Load a model and run one of its phases on real text.

    Prefill: the whole context at once. Decode: one further token per sequence on a context that is computed
    before; the cache is cut back to it at every iteration, so that all iterations do the same work. A
    recurrent state, of one size at any context, runs on.

    Raises:
        ModelError: the model cannot be loaded, or its cache cannot be cut back.
        DataError: the text does not fill the batch.
    """
    import torch

    from observatory.zoo.data import load_token_ids
    from observatory.zoo.models import load_model, quiet_transformers

    loaded = load_model(model, device=device, dtype=dtype)
    network = loaded.model.eval()
    stream = load_token_ids(
        TEXT,
        loaded.tokenizer,
        vocabulary_size=loaded.vocabulary_size,
        tokens=batch_size * (context_tokens + 1),
        seed=0,
    )
    ids = torch.from_numpy(stream.ids.copy()).view(batch_size, context_tokens + 1).to(device)
    facts = WorkloadFacts(
        name=f"{loaded.name} {phase}",
        phase=phase,
        batch_size=batch_size,
        context_tokens=context_tokens,
        tokens_per_iteration=batch_size * (context_tokens if phase == "prefill" else 1),
    )
    with torch.inference_mode(), quiet_transformers():
        iterate = _prefill(network, ids) if phase == "prefill" else _decode(network, ids)
        yield ModelWorkload(facts, iterate, torch.cuda.synchronize if device.startswith("cuda") else _nothing)


def _prefill(network: Any, ids: torch.Tensor) -> Any:
    return lambda: network(input_ids=ids[:, :-1], use_cache=False)


def _decode(network: Any, ids: torch.Tensor) -> Any:
    cache = network(input_ids=ids[:, :-1], use_cache=True).past_key_values

    def iterate() -> None:
        network(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
        cut_back(cache, 1, network, recurrent_runs_on=True)

    iterate()  # a cache that cannot be cut back says so here rather than in the middle of a sweep
    return iterate


def cut_back(cache: Any, tokens: int, network: Any, *, recurrent_runs_on: bool = False) -> None:
    """Take the last tokens off a cache.

    Args:
        cache: what the model returned.
        tokens: how many.
        network: the model, for the message.
        recurrent_runs_on: leave layers alone that hold nothing but a recurrent state, which lets go of none.

    Raises:
        ModelError: this kind of cache does not let go of tokens.
    """
    try:
        if not recurrent_runs_on:
            cache.crop(-tokens)
            return
        for layer in cache.layers:
            if not hasattr(layer, "recurrent_states") or hasattr(layer, "keys"):
                layer.crop(-tokens)
    except (AttributeError, RuntimeError, ValueError, NotImplementedError) as error:
        reason = one_line(error, 200)
        raise ModelError(
            f"the cache of {type(network).__name__} cannot be cut back to its context ({reason}), so a step "
            "behind it cannot be repeated",
            remedy="take a model with keys and values of all tokens in every layer, or sweep --phase "
            "prefill or a program of your own",
        ) from error


def _nothing() -> None:
    """A processor is never ahead of its program."""


class CommandWorkload:
    """A program that prints one line per iteration; it is stopped (SIGSTOP) while it rests.

    Args:
        command: program and arguments; it runs until it is ended.
        facts: what it is.

    Raises:
        ClockError: it cannot be started, or prints nothing.
    """

    def __init__(self, command: Sequence[str], facts: WorkloadFacts) -> None:
        self.facts = facts
        self._command = list(command)
        try:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
            )
        except OSError as error:
            raise ClockError(
                f"{command[0]} cannot be started: {error.strerror}", remedy="give a program on PATH"
            ) from error
        self._keeper = subprocess.Popen(
            ["/bin/sh", "-c", _KEEPER, "keeper", str(self._process.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._output = self._process.stdout.fileno()
        os.set_blocking(self._output, False)
        try:
            self._await_line(_START_S)
        except BaseException:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def measure(self, *, settle_s: float, window_s: float) -> Window:
        """See :class:`Workload`; the window begins and ends with a line."""
        self._signal(signal.SIGCONT)
        try:
            settled = time.monotonic() + settle_s
            while time.monotonic() < settled:
                self._await_line(max(30.0, window_s))
            start_ns, _ = self._await_line(max(30.0, window_s))
            iterations, end_ns = 0, start_ns
            while end_ns - start_ns < window_s * 1e9:
                end_ns, lines = self._await_line(max(30.0, window_s))
                iterations += lines
        finally:
            self._signal(signal.SIGSTOP)
        return Window(start_ns=start_ns, end_ns=end_ns, iterations=iterations)

    def close(self) -> None:
        """End the program and what it has started."""
        for sign in (signal.SIGCONT, signal.SIGTERM):
            self._signal(sign)
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._keeper.kill()
        self._keeper.wait()
        if self._keeper.stdin is not None:
            self._keeper.stdin.close()

    def _signal(self, sign: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, sign)

    def _await_line(self, timeout_s: float) -> tuple[int, int]:
        """Wait for output: when it came, and how many lines it ended."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            readable, _, _ = select.select([self._output], [], [], 0.5)
            if not readable:
                continue
            piece, now_ns = os.read(self._output, _MOST_LINE_BYTES), time.monotonic_ns()
            if not piece:
                code = self._process.wait()
                raise ClockError(
                    f"{self._command[0]} ended with exit code {code} before the sweep was over; it must "
                    "run, and print a line per iteration, until it is ended"
                )
            if lines := piece.count(b"\n"):
                return now_ns, lines
        raise ClockError(
            f"{self._command[0]} printed no line for {timeout_s:g} s; it must print, and flush, one line per "
            "iteration of the phase"
        )

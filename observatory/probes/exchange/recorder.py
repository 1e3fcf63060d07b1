"""The way in for exchanges that do not go through ``torch.distributed``: our own transports over MPI."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from observatory.probes.timeline.groups import GroupFacts
from observatory.probes.timeline.issue import Issue, Side
from observatory.probes.timeline.log import SeenExchange, SeenSpan

_TAPPED = frozenset({"gloo", "nccl", "ucc", "mpi-torch"})
_CPU = torch.device("cpu")


class RunRecorder:
    """Takes what dispatchers tell (``observatory.probes.exchange.labels.Recorder``) into the run.

    Spans are always taken. Exchanges over ``torch.distributed`` are not: they are seen from below, where
    their end is known better, and must not be counted twice.
    """

    def __init__(
        self, add: Callable[[SeenExchange | SeenSpan], None], situation: Callable[[bool], tuple[int, str]]
    ) -> None:
        self._add = add
        self._situation = situation

    @contextlib.contextmanager
    def span(self, name: str, layer: int | None) -> Iterator[None]:
        """Around one phase of one layer."""
        start_ns = time.monotonic_ns()
        try:
            yield
        finally:
            step, phase = self._situation(False)
            self._add(SeenSpan(name, step, phase, layer, _CPU, start_ns, time.monotonic_ns()))

    def exchange(
        self,
        *,
        role: str,
        layer: int | None,
        group: str,
        sequence: int,
        algorithm: str | None,
        backend: str,
        send_bytes: Sequence[int],
        receive_bytes: Sequence[int],
        start_ns: int,
        end_ns: int,
    ) -> None:
        """After one exchange."""
        if backend in _TAPPED:
            return
        step, phase = self._situation(False)
        issue = Issue(
            algorithm=algorithm or "all_to_all",
            device=_CPU,
            dtype=torch.uint8,
            send=Side((len(send_bytes),), 1, tuple(send_bytes), True),
            receive=Side((len(receive_bytes),), 1, tuple(receive_bytes), True),
            start=start_ns,
        )
        issue.finish(end_ns)
        self._add(
            SeenExchange(
                issue,
                step,
                phase,
                layer,
                role,
                issue.algorithm,
                GroupFacts(group, None, len(send_bytes)),
                sequence,
                backend,
            )
        )

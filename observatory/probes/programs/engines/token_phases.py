"""The phase of every row of an engine's forward pass, where the watched layers find it.

Shapes: T rows of a forward pass, N requests in it.

The buffer keeps its address, so that compiled code and replayed CUDA graphs read what was put there last.
Between the steps of the engine it says that nothing counts: warm-up, profiling, the capture of graphs and the
dummy batches of idle ranks run with it as it is then.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from observatory.errors import CaptureError
from observatory.probes.routing.counters import NO_SLOT, SLOTS
from observatory.run.manifest import Phase

_PREFILL, _DECODE = SLOTS.index("prefill"), SLOTS.index("decode")


def token_slots(
    boundaries: NDArray[np.integer], computed_N: NDArray[np.integer], prompts_N: NDArray[np.integer]
) -> NDArray[np.int64]:
    """Slot of each token of a batch, (T,): prefill up to the prompt's end, decode from there on.

    Args:
        boundaries: (N + 1,) first row of each request, and the end of the last one.
        computed_N: tokens of each request that were computed before.
        prompts_N: tokens of each request's prompt.
    """
    starts_N, lengths_N = boundaries[:-1].astype(np.int64), np.diff(boundaries)
    rows_T = np.arange(int(boundaries[0]), int(boundaries[-1]), dtype=np.int64)
    left_N = prompts_N.astype(np.int64) - computed_N.astype(np.int64) + starts_N
    return np.where(rows_T < np.repeat(left_N, lengths_N), _PREFILL, _DECODE)


def phase_of(slots_T: NDArray[np.int64]) -> Phase:
    """The phase of all tokens of a batch; ``mixed`` where they are of several, ``unknown`` without tokens."""
    slots = set(np.unique(slots_T).tolist()) - {NO_SLOT}
    if len(slots) > 1:
        return "mixed"
    return cast("Phase", SLOTS[slots.pop()]) if slots else "unknown"


class TokenPhases:
    """The slots of the rows of one device.

    Attributes:
        slots: (most rows,) int64, as ``RoutingDecision.token_slots``.
    """

    def __init__(self, most_rows: int, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.slots = torch.full((most_rows,), NO_SLOT, dtype=torch.int64, device=device)
        self._filled = 0

    def fill(self, slots_T: NDArray[np.int64]) -> None:
        """State the rows of the forward pass that comes next; all others do not count.

        Raises:
            CaptureError: there are more than the engine said there would be.
        """
        self.clear()
        if len(slots_T) > len(self.slots):
            raise CaptureError(f"a batch has {len(slots_T)} tokens; expected {len(self.slots)} at most")
        host_T = torch.from_numpy(slots_T)
        if self.slots.is_cuda:
            host_T = host_T.pin_memory()
        with torch.inference_mode(False), torch.no_grad():
            self.slots[: len(slots_T)].copy_(host_T, non_blocking=True)
        self._filled = len(slots_T)

    def clear(self) -> None:
        """Nothing counts."""
        if self._filled:
            with torch.inference_mode(False), torch.no_grad():
                self.slots[: self._filled].fill_(NO_SLOT)
            self._filled = 0

"""The auxiliary loss by which a model balances its routers, as its output states it (``aux_loss``).

transformers' models state it where ``output_router_logits`` is on, not yet multiplied with its coefficient.
Values stay on the device and are fetched for several steps at once: the device is rarely waited for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import torch
from torch import nn

from observatory.errors import ObservatoryError
from observatory.probes.part import Boundary, Part
from observatory.probes.routing.attachment import NO_KWARGS, Attachment
from observatory.probes.routing.part import RoutingPart
from observatory.run import RunWriter
from observatory.run.tables import AUXILIARY_LOSS_SCHEMA

#: Rows that are fetched together.
_MOST_WAITING = 8


class AuxiliaryLoss(Part):
    """Keeps the mean over the calls of each step and phase; does nothing where no output states one."""

    def __init__(self, model: nn.Module, routing: RoutingPart, writer: RunWriter) -> None:
        self._model = model
        self._routing = routing
        self._writer = writer
        self._attachment: Attachment | None = None
        self._seen: dict[str, list[torch.Tensor]] = {}
        self._of_step: dict[str, list[torch.Tensor]] = {}
        self._waiting: list[tuple[int, str, int, torch.Tensor]] = []
        self._error: str | None = None

    def attach(self) -> None:
        """Look at every output of the model, as long as the phase of its call is known."""

        def after(_module: nn.Module, _args: Any, kwargs: Any = NO_KWARGS, output: Any = None) -> None:
            del kwargs
            if not torch.compiler.is_compiling():
                self._see(output)

        self._attachment = Attachment(self._model, after=after, first=True, marks=False)

    def boundary(self, boundary: Boundary) -> None:
        """Keep what the stretch had, and at the end of a step what all its stretches had."""
        seen, self._seen = self._seen, {}
        if boundary.is_refused:
            return
        for phase, values in seen.items():
            self._of_step.setdefault(boundary.phase or phase, []).extend(values)
        if boundary.ends_step:
            self._end_step(boundary.step)
        if len(self._waiting) >= _MOST_WAITING or boundary.is_last:
            self._write()

    def pause(self) -> None:
        """Take the hook off."""
        if self._attachment is not None:
            self._attachment.pause()

    def resume(self) -> None:
        """Put it on again."""
        self._seen.clear()
        if self._attachment is not None:
            self._attachment.resume()

    def detach(self, *, failed: bool) -> None:
        """Take the hook off."""
        del failed
        self.abandon()

    def abandon(self) -> None:
        """Likewise."""
        if self._attachment is not None:
            self._attachment.remove()

    def problem(self) -> str | None:
        """The first row that could not be kept; None when there was none."""
        return self._error

    def _see(self, output: Any) -> None:
        value = output.get("aux_loss") if isinstance(output, Mapping) else getattr(output, "aux_loss", None)
        if type(value) is torch.Tensor and value.numel() == 1 and value.is_floating_point():
            of_phase = self._seen.setdefault(self._routing.phase_now(), [])
            of_phase.append(value.detach().reshape(()).double())

    def _end_step(self, step: int) -> None:
        of_step, self._of_step = self._of_step, {}
        with torch.inference_mode(False), torch.no_grad():
            for phase, values in of_step.items():
                mean = torch.stack([value.to(values[0].device) for value in values]).mean()
                self._waiting.append((step, phase, len(values), mean))

    def _write(self) -> None:
        rows, self._waiting = self._waiting, []
        if not rows:
            return
        steps, phases, calls, means = zip(*rows, strict=True)
        values = torch.stack([mean.to(means[0].device) for mean in means]).tolist()
        table = pa.Table.from_pydict(
            {
                "step": steps,
                "phase": phases,
                "source_rank": [self._writer.rank] * len(rows),
                "value": [value if math.isfinite(value) else None for value in values],
                "calls": calls,
            },
            schema=AUXILIARY_LOSS_SCHEMA,
        )
        try:
            self._writer.append("auxiliary_loss", table)
        except ObservatoryError as error:  # the program meets it at its next step
            self._error = self._error or f"captured auxiliary losses could not be kept: {error}"

"""Which steps are captured: those asked for at the start, until a command says otherwise."""

from __future__ import annotations

from dataclasses import dataclass

from observatory.probes.options import StepOptions
from observatory.run.manifest import CapturedSteps

#: Stretches of steps; a run states them all.
_MOST_STRETCHES = 1024


@dataclass(slots=True)
class _Stretch:
    first: int
    end: int | None = None


class StepSchedule:
    """Stretches of steps that are captured, in order; the last may have no end yet.

    A command replaces what was asked for at the start from its step on.
    """

    def __init__(self, options: StepOptions) -> None:
        self._at = options.at
        self._every = options.every
        self._stretches = [] if options.stopped else [_Stretch(max(options.first, options.at), options.end)]
        #: Where nothing more is captured, whatever is asked for; None before it is known.
        self._over = options.end

    def is_wanted(self, step: int) -> bool:
        """Whether a step is captured."""
        last = self._stretches[-1] if self._stretches else None
        return last is not None and self._is_in(last, step) and (step - last.first) % self._every == 0

    def is_open(self, step: int) -> bool:
        """Whether steps are captured around this one, if not each of them."""
        return bool(self._stretches) and self._is_in(self._stretches[-1], step)

    def is_over(self, step: int) -> bool:
        """Whether nothing is captured from this step on, for good."""
        return self._over is not None and step >= self._over

    def start(self, step: int) -> None:
        """Capture from this step on, without an end; nothing changes where it is captured already."""
        self._over = None
        last = self._stretches[-1] if self._stretches else None
        if last is not None and last.first > step:
            self._stretches.pop()
        elif last is not None and (last.end is None or last.end >= step):
            last.end = None
            return
        if len(self._stretches) < _MOST_STRETCHES:
            self._stretches.append(_Stretch(step))

    def stop(self, step: int) -> None:
        """Capture nothing from this step on."""
        self._over = None
        while self._stretches and self._stretches[-1].first >= step:
            self._stretches.pop()
        if self._stretches and self._is_in(self._stretches[-1], step):
            self._stretches[-1].end = step

    def end(self, step: int) -> None:
        """Capture nothing from this step on, for good."""
        self.stop(step)
        self._over = step

    def captured(self, steps: int | None = None) -> tuple[CapturedSteps, ...] | None:
        """The steps for the run, cut at ``steps`` where the run has ended; None where no step is left out."""
        stretches = [item for item in self._stretches if steps is None or item.first < steps]
        ends = [None if item.end is None or (steps is not None and item.end >= steps) else item.end
                for item in stretches]  # fmt: skip
        if self._every == 1 and [(item.first, end) for item, end in zip(stretches, ends, strict=True)] == [
            (self._at, None)
        ]:
            return None
        return tuple(
            CapturedSteps(first_step=item.first, end_step=steps if end is None else end, every=self._every)
            for item, end in zip(stretches, ends, strict=True)
        )

    @staticmethod
    def _is_in(stretch: _Stretch, step: int) -> bool:
        return stretch.first <= step and (stretch.end is None or step < stretch.end)

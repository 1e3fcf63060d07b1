"""What was not captured, added up over the steps of a run; runs in the background thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from observatory.run.manifest import CaptureGap, MoeLayerSpec

#: Codes after which rows hold all that was called.
_LOSES_NOTHING = frozenset(
    (
        "checks_removed",
        "exchange_hooks_removed",
        "gate_mass",
        "idle",
        "interrupted",
        "model_hooks_removed",
        "moved",
    )
)
#: Layers that are not watched are named up to this number.
_MOST_UNWATCHED = 256


@dataclass(slots=True)
class _Steps:
    first: int
    last: int
    count: int


class GapLog:
    """Steps by code and layer."""

    def __init__(self, specs: Sequence[MoeLayerSpec]) -> None:
        """Args: the layer of each site."""
        self._specs = tuple(specs)
        self._steps: dict[tuple[str, int | None, str | None], _Steps] = {}

    def add(self, code: str, step: int, *, site: int | None = None, module: str | None = None) -> None:
        """Something happened in a step; steps come in order.

        Args:
            code: a code of ``observatory.run.gaps``.
            step: the step.
            site: index of the site; None where it is about all, or about none.
            module: name of a layer that is not watched.
        """
        key = (code, site, module)
        steps = self._steps.get(key)
        if steps is None:
            if module is None or sum(name is not None for *_, name in self._steps) < _MOST_UNWATCHED:
                self._steps[key] = _Steps(step, step, 1)
        elif steps.last < step:
            steps.last, steps.count = step, steps.count + 1

    def records(self) -> tuple[CaptureGap, ...]:
        """The gaps for the rank's status, in the order in which they started."""
        return tuple(
            CaptureGap(
                code=code,
                layer=None if site is None else self._specs[site].layer,
                module=module if site is None else self._specs[site].module,
                first_step=steps.first,
                last_step=steps.last,
                steps=steps.count,
                loses_rows=code not in _LOSES_NOTHING,
            )
            for (code, site, module), steps in list(self._steps.items())
        )

"""The routing of a capture: what the probe counts, the rows that come of it, and what is missing in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

import torch
from pydantic import JsonValue
from torch import nn

from observatory.probes.options import RoutingOptions
from observatory.probes.part import Boundary, Part
from observatory.probes.routing.accumulation import SnapshotAccumulator
from observatory.probes.routing.counters import SLOTS
from observatory.probes.routing.flushing import Flusher
from observatory.probes.routing.probe import RoutingProbe
from observatory.probes.routing.sites import RoutingSite, may_drop_inside
from observatory.run import RunWriter
from observatory.run.manifest import CaptureGap, Verified
from observatory.text import listing

#: Modules that a note names: as many as fit into three lines of a terminal.
_MOST_NAMED = 7


class RoutingPart(Part):
    """Counts what the sites choose, from ``attach`` to ``detach``."""

    def __init__(
        self, model: nn.Module, sites: Sequence[RoutingSite], writer: RunWriter, options: RoutingOptions
    ) -> None:
        self._probe = RoutingProbe(model, sites, options)
        self._repeated = _repeated(model, sites)
        self._is_on = False
        self._is_paused = False
        self._rows = SnapshotAccumulator(
            self._probe.layout,
            [site.spec for site in sites],
            rank=writer.rank,
            window_steps=options.window_steps,
        )

    def attach(self) -> None:
        """Put the hooks on."""
        self._probe.attach()
        self._is_on = True

    def boundary(self, boundary: Boundary) -> None:
        """Take what was counted.

        Raises:
            CaptureError: inside the capture of a CUDA graph.
        """
        if self._is_paused:
            self._drop()
        boundary.counted = self._probe.take(
            step=boundary.step, stated_phase=boundary.phase, ends_step=boundary.ends_step
        )
        boundary.is_refused = self.refusal() is not None

    def pause(self) -> None:
        """Take the hooks off, between steps."""
        self._is_paused = True
        self._probe.pause()

    def resume(self) -> None:
        """Put them on again."""
        self._is_paused = False
        self._probe.resume()
        self._drop()

    def detach(self, *, failed: bool) -> None:
        """Look once more whether everything is in its place, and take the hooks off."""
        del failed
        if self._is_on:
            self._is_on = False
            self._probe.look()
            self._probe.detach()

    def close(self) -> None:
        """Give the counters back."""
        self._probe.release()

    def abandon(self) -> None:
        """Take the hooks off the child's copy of the model."""
        self._probe.detach()
        self._probe.release()

    def _drop(self) -> None:
        """Forget what hooks saw of a call that had begun when the pause did: torch calls them once more."""
        self._probe.take(step=0, stated_phase="unknown", ends_step=False)

    @property
    def sites(self) -> Sequence[RoutingSite]:
        """The MoE layers as they are watched now: modules may have been replaced."""
        return self._probe.sites

    @property
    def device(self) -> torch.device:
        """The first of the model's accelerators, else the CPU."""
        return self._probe.main_device

    @property
    def last_step(self) -> int:
        """The last step that anything was counted in; -1 when nothing was. Final after the writer's end."""
        return self._rows.last_counted_step

    @property
    def rows(self) -> int:
        """Rows of routing so far."""
        return self._rows.all_rows

    def row_writer(self, writer: RunWriter, *, flush_s: float) -> Flusher:
        """The part that keeps what this one counts; it comes after all that may find losses."""
        return Flusher(writer, self._rows, flush_s=flush_s)

    def phase_now(self) -> str:
        """Phase of the model's call in progress, as far as it is known."""
        return SLOTS[self._probe.phases.slot]

    def before_pass(self, call: Callable[[Callable[[], bool]], None]) -> None:
        """Call this before each forward pass; its argument finds out whether ``generate()`` makes it."""
        self._probe.phases.before_pass = call

    def on_routed(self, routed: Callable[[int, str], None]) -> None:
        """Call this with the layer and the phase of each eager call of a site, on its thread."""

        def call(layer: int, slot: int) -> None:
            routed(layer, SLOTS[slot])

        for site, counter in zip(self._probe.sites, self._probe.counters, strict=True):
            counter.on_call = partial(call, site.spec.layer)

    def refusal(self) -> str | None:
        """Why nothing of the model may be counted, in one line; None when nothing speaks against it."""
        return self._probe.refusal()

    def problem(self) -> str | None:
        """The first failure of a hook, in one line; None when there was none."""
        return self._probe.problem()

    def verified(self) -> tuple[Verified, ...]:
        """What confirmed the counts of each site."""
        return self._probe.verified()

    def gaps(self) -> tuple[CaptureGap, ...]:
        """What was not captured, or not as a whole; final after the writer's end.

        An idle step has lost calls where there are copies, which may have run instead.
        """
        has_copies = self._probe.was_copied()
        return tuple(
            gap.model_copy(update={"loses_rows": True}) if has_copies and gap.code == "idle" else gap
            for gap in self._rows.gaps()
        )

    def notes(self, *, steps: int) -> tuple[str, ...]:
        """Layers without rows, and limits of what calls show."""
        probe, notes = self._probe, list[str]()
        counters = [(site.spec.module, c) for site, c in zip(probe.sites, probe.counters, strict=True)]
        counted = self._rows.counted_sites
        silent = [name for name, c in counters if not c.ever_called and c.index not in counted]
        silent = silent if probe.refusal() is None else []
        if len(silent) == len(probe.sites) and (probe.phases.model_called or steps or probe.was_copied()):
            notes.append(
                "nothing was counted: no watched module was called; a CUDA graph captured or a model "
                "exported before the watch began does not show its routing"
            )
        elif silent and (probe.phases.model_called or steps):
            notes.append(f"never called, so without rows: {_named(silent)}")
        if self._repeated:
            notes.append(
                "part of the model in several places, whose calls add up in one layer: "
                f"{_named(self._repeated)}"
            )
        dropping = [
            site.spec.module
            for site, verdict in zip(probe.sites, probe.verified(), strict=True)
            if may_drop_inside(site) and verdict.by != "rows"
        ]
        if dropping:
            notes.append(
                "experts that state a capacity may drop assignments after they are given them, which is not "
                f"visible: {_named(dropping)}"
            )
        if contradicted := probe.contradicted():
            notes.append(
                "the gates are counted, but the experts compute other tokens than they say: "
                f"{_named(contradicted)}"
            )
        if unsized := [name for name, c in counters if c.tokens_unknown]:
            notes.append(f"tokens is 0 where calls do not show how many there were: {_named(unsized)}")
        notes += probe.phases.notes(given_a_cache=True)
        if self.last_step >= 0 and steps == 0:
            notes.append(
                "watch.step() was never called, and no generate() made steps: the whole run is one step"
            )
        return tuple(notes)

    def quiet_notes(self) -> tuple[str, ...]:
        """Unknown phases, repeated calls and copies."""
        notes = [*self._probe.phases.notes(given_a_cache=False)]
        if repeated := self._probe.repeated():
            notes.append(
                "called more than once in one call of the model, so that tokens are calls times tokens: "
                f"{_named(repeated)}"
            )
        if self._probe.was_copied():
            notes.append("watched modules were copied or pickled; calls of copies are not counted")
        return tuple(notes)

    def cost(self) -> dict[str, JsonValue]:
        """Host time of the hooks; compiled calls are not timed."""
        cost = self._probe.cost
        mean_us = cost.us_per_layer_call()
        return {
            "eager_layer_calls": cost.layer_calls,
            "host_us_per_layer_call": None if mean_us is None else round(mean_us, 3),
        }


def _repeated(model: nn.Module, sites: Sequence[RoutingSite]) -> list[str]:
    """Names of the watched modules that are, or are inside of, a module with more than one parent."""
    parents = Counter(id(child) for module in model.modules() for child in module._modules.values())
    modules = dict(model.named_modules())
    return [
        site.spec.module
        for site in sites
        if any(
            parents[id(modules[path])] > 1 for path in accumulate(site.spec.module.split("."), "{}.{}".format)
        )
    ]


def _named(modules: Sequence[str]) -> str:
    return listing(modules, most=_MOST_NAMED)

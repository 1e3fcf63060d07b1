"""The routing probe: attached to the MoE layers of one model, it counts until it is detached.

On the hot path it copies the ids of a small call, to count them with those of the other layers when the pass
ends (``deferral.py``), or reads the decision from the call's tensors and adds it to a buffer on the same
device, two small kernels as a rule. At a boundary (a step ends, a stated phase begins or ends) the buffers
are copied to the host in stream order, zeroed, and handed to a background thread. Neither waits for the
device.

A failure of the probe never changes what the model does: the call goes on, the site stays uncounted for it,
and the first error is raised at the next boundary.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from observatory.errors import CaptureError, ModelError
from observatory.probes.options import RoutingOptions, Verify
from observatory.probes.routing.accumulation import Snapshot
from observatory.probes.routing.attachment import NO_KWARGS, Attachment, PostHook, PreHook
from observatory.probes.routing.counters import DeviceCounters, Layout
from observatory.probes.routing.counting import SiteCounter, count_in_graph
from observatory.probes.routing.deferral import HookCost, Kept, KeptCounts, keeping_hook
from observatory.probes.routing.discover import find_sites
from observatory.probes.routing.inspection import (
    BlockInspection,
    is_recomputed_or_traced,
    looks,
    own_operators,
    suspension,
    weakest,
)
from observatory.probes.routing.integrity import HookKeeper, Loss
from observatory.probes.routing.phase_tracking import PhaseTracker
from observatory.probes.routing.sites import RoutingDecision, RoutingSite, shown_by
from observatory.probes.routing.words import Witness, verdict
from observatory.run.manifest import Verified

_CPU = torch.device("cpu")


class RoutingProbe:
    """Counts the assignments of the given sites.

    Attributes:
        counters: one counter per site.
        phases: which phase the model is in.
        cost: of eager calls of sites.
        inferred_in_graph: a compiled call has a choice that was inferred.
        main_device: the first of the model's accelerators, else the CPU.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[RoutingSite],
        options: RoutingOptions = RoutingOptions(),  # noqa: B008  # frozen
    ) -> None:
        self.layout = Layout.of_sites(sites, sample_tokens=options.sample_tokens, gate_mass=options.gate_mass)
        self.counters = tuple(SiteCounter(index, self.layout) for index in range(len(sites)))
        self._verify = options.verify
        self.inferred_in_graph = False
        self.cost = HookCost()
        self.phases = PhaseTracker(model, on_call=self._note_streams, count=self._count_kept)
        self._kept_counts = KeptCounts()
        self._keeps = not (options.gate_mass or options.sample_tokens)
        self._devices: dict[torch.device, DeviceCounters] = {}
        self._error: tuple[str, Exception] | None = None
        self._lock = threading.Lock()
        self._keeper = HookKeeper(
            model,
            sites,
            attach=self._attach_site,
            attach_to_model=self._attach_to_model,
            find=partial(find_sites, model, adapters=options.adapters),
        )
        self._losses: list[Loss] = []
        #: of each site, those of modules that were replaced first
        self._inspections: dict[int, list[BlockInspection]] = {}
        self._newest: dict[int, BlockInspection] = {}
        self._former_refusal: str | None = None
        for index, site in enumerate(sites):
            self._inspect(index, site)
        tensors = [*model.parameters(), *model.buffers()]
        for device in {tensor.device for tensor in tensors if not tensor.is_meta}:
            self._device(device)
        self.main_device = next((d for d in self._devices if d.type != "cpu"), torch.device("cpu"))

    @property
    def sites(self) -> Sequence[RoutingSite]:
        """What is watched now."""
        return self._keeper.sites

    def attach(self) -> None:
        """Put the hooks on; all of them or, when one cannot be put on, none."""
        self._keeper.attach()

    def pause(self) -> None:
        """Take the hooks off until `resume`, between steps."""
        self._keeper.pause()

    def resume(self) -> None:
        """Put them on again."""
        self._keeper.resume()

    def look(self) -> None:
        """Look whether hooks and modules are what they were; ``take`` has the losses."""
        at_all = any(inspection.has_lost_hooks for inspection in self._newest.values())
        self._losses += self._keeper.look(at_all=at_all)

    def detach(self) -> None:
        """Take all hooks off; doing it twice does nothing."""
        self._keeper.detach()

    def release(self) -> None:
        """Give the counters' handles back, after the last ``take``."""
        for counter in self.counters:
            counter.release()

    def take(self, *, step: int, stated_phase: str | None, ends_step: bool) -> Snapshot:
        """Take what was counted since the last time.

        Raises:
            CaptureError: inside the capture of a CUDA graph, where no boundary can be.
        """
        if (
            any(device.type == "cuda" for device in self._devices)
            and torch.cuda.is_current_stream_capturing()
        ):
            raise CaptureError(
                "a step or phase boundary falls inside the capture of a CUDA graph; expected it between "
                "replays, move watch.step() and watch.phase() out of torch.cuda.graph(...)"
            )
        self.look()
        was_split = self.phases.was_inside
        self.phases.count_all_kept()
        self.phases.find_interrupted()
        for inspection in self._all_inspections():
            inspection.close()
        kept = [counter.kept_calls for counter in self.counters]
        calls: NDArray[np.int64] = np.stack([counter.take_calls() for counter in self.counters], axis=1)
        losses, bypassed = self._end_stretch(calls, kept)
        # Without its hooks a call of the model does not show how it ended.
        was_interrupted = self.phases.was_interrupted and not any(
            loss.code == "model_hooks_removed" for loss in losses
        )
        was_interrupted = was_interrupted or any(i.was_interrupted for i in self._all_inspections())
        for inspection in self._all_inspections():
            inspection.end_stretch()
        self.phases.end_stretch(is_stated=stated_phase is not None, unknown_calls=int(calls[0].sum()))
        return Snapshot(
            step=step,
            stated_phase=stated_phase,
            ends_step=ends_step,
            copies=[counters.snapshot() for counters in list(self._devices.values())],
            calls=calls,
            widths=np.array([counter.width for counter in self.counters], dtype=np.int64),
            losses=losses,
            bypassed=bypassed,
            was_interrupted=was_interrupted,
            is_split=was_split or self.phases.is_inside,
        )

    def problem(self) -> str | None:
        """The first failure of a hook, in one line; None when there was none."""
        refusal = self.refusal()
        if refusal is not None:
            return refusal
        uncounted = ((c.error, self.sites[c.index].spec.module) for c in self.counters)
        first = self._error or next(((module, error) for error, module in uncounted if error), None)
        if first is None:
            return None
        module, error = first
        return f"routing of {module} could not be read: {type(error).__name__}: {error}"

    def refusal(self) -> str | None:
        """Why nothing of the model may be counted, in one line; None when nothing speaks against it."""
        if self._error is not None and isinstance(self._error[1], ModelError):
            return str(self._error[1])
        if self._former_refusal is not None:
            return self._former_refusal
        for index, inspection in self._newest.items():
            site, counter = self.sites[index], self.counters[index]
            if site.infers and (
                self.inferred_in_graph or (counter.ever_called and not inspection.was_judged)
            ):
                return (
                    f"what {site.spec.module} chooses is inferred from its logits, which cannot be confirmed "
                    "in compiled code; watch the model uncompiled, or pass an Adapter that reads what is "
                    "dispatched (docs/supported-models.md#adapters)"
                )
            if inspection.was_bypassed and not (inspection.was_reached or counter.ever_called):
                return (
                    f"the block of {site.spec.module} was called and ended without calling it: it reaches "
                    "its experts in another way (their forward or a kernel), which hooks do not see; "
                    "pass an Adapter that reads a call it makes (docs/supported-models.md#adapters)"
                )
        return None

    def verified(self) -> tuple[Verified, ...]:
        """What confirmed the counts of each site, in their order."""
        return tuple(self._verified(counter.index) for counter in self.counters)

    def contradicted(self) -> list[str]:
        """Modules whose gates are counted though the experts compute something else."""
        return [
            self.sites[index].spec.module
            for index, inspections in self._inspections.items()
            if any(inspection.is_contradicted for inspection in inspections)
        ]

    def was_copied(self) -> bool:
        """Whether watched modules were copied or pickled; final after ``detach``."""
        return self._keeper.was_copied()

    def repeated(self) -> list[str]:
        """Modules of blocks that were called more than once in one call of the model."""
        return [
            self.sites[index].spec.module
            for index, inspections in self._inspections.items()
            if any(inspection.was_repeated for inspection in inspections)
        ]

    def _verified(self, index: int) -> Verified:
        inspections = self._inspections[index]
        if not inspections:
            return verdict("none", Witness.READ_BY_ADAPTER)
        if self._verify == "none" and not any(inspection.was_judged for inspection in inspections):
            return verdict("none", Witness.TURNED_OFF)
        called = [inspection for inspection in inspections if inspection.was_reached] or inspections
        return weakest([inspection.verified() for inspection in called])

    def _all_inspections(self) -> Iterator[BlockInspection]:
        return (inspection for _, inspection in self._indexed_inspections())

    def _indexed_inspections(self) -> Iterator[tuple[int, BlockInspection]]:
        return ((index, one) for index, inspections in self._inspections.items() for one in inspections)

    def _inspect(self, index: int, site: RoutingSite) -> BlockInspection | None:
        """Inspect the block of a site, if it is known."""
        inspections = self._inspections.setdefault(index, [])
        if inspections:
            self._former_refusal = self.refusal()
            self.counters[index].ever_called = False
        self._newest.pop(index, None)
        if site.block is None or site.block is site.module:
            return None
        inspections.append(
            BlockInspection(
                site,
                verify=self._verify,
                model_call=self.phases.outermost_call,
                count=partial(self._count, self.counters[index]),
                fail=partial(self._fail, site),
            )
        )
        self._newest[index] = inspections[-1]
        return inspections[-1]

    def _attach_to_model(self) -> Iterator[Attachment]:
        """Put the hooks on that show the phase, unless all decisions state it themselves."""
        if any(site.listen is None for site in self.sites):
            yield from self.phases.attach()

    def _attach_site(self, index: int, site: RoutingSite) -> list[Attachment]:
        """Put the hooks on of a site; all of them or none."""
        if site.listen is not None:
            heard = partial(self._hear, site, self.counters[index])
            return [Attachment(site.module, marks=False, listen=partial(site.listen, site.module, heard))]
        inspections = self._inspections[index]
        current = next((one for one in inspections if one.site is site), None)
        inspection = current or self._inspect(index, site)
        first, last = self._hooks(site, self.counters[index])
        attachment = Attachment(site.module, before=first, after=last)
        try:
            return [attachment, *(() if inspection is None else inspection.attach())]
        except BaseException:
            attachment.remove()
            raise

    def _end_stretch(
        self, calls: NDArray[np.int64], kept: Sequence[int]
    ) -> tuple[tuple[Loss, ...], NDArray[np.bool_]]:
        """What was lost since the last boundary, and whose blocks were called more often, (sites,)."""
        losses, self._losses = tuple(dict.fromkeys(self._losses)), []
        if not self.phases.calls and not calls.any():
            # Nothing ran, unless the hooks are gone that would have seen it.
            losses = losses if any(loss.code == "model_hooks_removed" for loss in losses) else ()
        bypassed = np.zeros(len(self.counters), dtype=bool)
        for index, inspection in self._indexed_inspections():
            reached = inspection.reached + int(kept[index])
            bypassed[index] |= inspection.ended > max(reached, int(calls[:, index].sum()))
        return losses, bypassed

    def _hooks(self, site: RoutingSite, counter: SiteCounter) -> tuple[PreHook | None, PostHook | None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] = NO_KWARGS) -> None:
            self._see(site, counter, module, args, kwargs, None)

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any = None) -> None:
            if output is None and not isinstance(kwargs, dict):  # put back by another library (attachment.py)
                kwargs, output = NO_KWARGS, kwargs
            self._see(site, counter, module, args, kwargs, output)

        if site.when == "after":
            return None, after
        if self._keeps and site.plain_ids is not None:
            before = keeping_hook(
                site.plain_ids,
                counter,
                see=before,
                is_ready=partial(self._may_keep, counter),
                passes=self.phases.passes,
                count=self.phases.count_kept,
                looks=looks,
                cost=self.cost,
            )
        return before, None

    def _may_keep(self, counter: SiteCounter) -> bool:
        """Whether calls of a site may be counted later: one was before, and none is asked for at once."""
        inspection = self._newest.get(counter.index)
        was_reached = inspection is None or inspection.was_reached
        return was_reached and counter.width > 0 and counter.on_call is None

    def _count_kept(self, kept: Sequence[Kept], slot: int) -> None:
        start_ns = time.perf_counter_ns()
        try:
            device = self._devices.get(_CPU) or self._device(_CPU)
            with own_operators() if torch._C._len_torch_dispatch_stack() else nullcontext():
                self._kept_counts.add(kept, slot, device)
        except Exception as error:  # the model's own run must not suffer from ours
            self._fail(self.sites[kept[0][0].index], error)
        self.cost.layer_calls += len(kept)
        self.cost.pass_ns += time.perf_counter_ns() - start_ns

    def _see(
        self,
        site: RoutingSite,
        counter: SiteCounter,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Any,
    ) -> None:
        if torch.compiler.is_compiling():
            self._see_in_graph(site, counter, module, args, kwargs, output)
            return
        if is_recomputed_or_traced():
            inspection = self._newest.get(counter.index)
            if inspection is not None:  # its block has been called once more as well
                inspection.reached += 1
            return
        start_ns = time.perf_counter_ns()
        with_gradients = torch.is_grad_enabled()
        if with_gradients:  # torch.no_grad() does the same at several times the cost
            torch._C._set_grad_enabled(False)
        try:
            with own_operators() if torch._C._len_torch_dispatch_stack() else nullcontext():
                decision = site.read(module, args, kwargs, output)
            if decision is not None and not self._is_judged_later(counter, decision):
                self._count(counter, decision)
        except Exception as error:  # the model's own run must not suffer from ours
            self._fail(site, error)
        finally:
            if with_gradients:
                torch._C._set_grad_enabled(True)
        self.cost.layer_calls += 1
        self.cost.add(time.perf_counter_ns() - start_ns)

    def _fail(self, site: RoutingSite, error: Exception) -> None:
        # Without what the error holds: the tensors of the call would be kept with its frames.
        self._error = self._error or (site.spec.module, error.with_traceback(None))

    def _is_judged_later(self, counter: SiteCounter, decision: RoutingDecision) -> bool:
        """Whether the reading is for the inspection of its block, or of no call of the model's own."""
        inspection, by = self._newest.get(counter.index), suspension.by
        if by is not None and by is not inspection:
            return True
        if inspection is None:
            return False
        inspection.note_reached()
        return _has_values(decision) and inspection.take(decision)

    def _count(self, counter: SiteCounter, decision: RoutingDecision) -> None:
        shown = shown_by(decision)
        if shown is None or not _has_values(decision):
            return
        counters = self._devices.get(shown.device) or self._device(shown.device)
        slot = self.phases.counted_slot()
        if torch._C._len_torch_dispatch_stack():
            count_in_graph(counter, decision, slot, counters)
        else:
            counter.add(decision, slot, counters.parts[slot][counter.index], counters)

    def _hear(self, site: RoutingSite, counter: SiteCounter, decision: RoutingDecision) -> None:
        """Count what a program reports itself, also in code that a compiler traces: the operator alone."""
        shown = shown_by(decision)
        if shown is None:
            self._fail(site, ModelError("the program reported a decision without ids"))
            return
        if torch.compiler.is_compiling():
            counters = self._devices.get(shown.device)
            if counters is not None:
                count_in_graph(counter, decision, 0, counters)
            return
        start_ns = time.perf_counter_ns()
        try:
            count_in_graph(counter, decision, 0, self._device(shown.device))
        except Exception as error:  # the model's own run must not suffer from ours
            self._fail(site, error)
        self.cost.layer_calls += 1
        self.cost.add(time.perf_counter_ns() - start_ns)

    def _see_in_graph(
        self,
        site: RoutingSite,
        counter: SiteCounter,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Any,
    ) -> None:
        """The same for a compiler that traces the call; an exported program stays free of us."""
        if torch.compiler.is_exporting():
            return
        with torch.no_grad():
            decision = site.read(module, args, kwargs, output)
            if decision is None:
                return
            if decision.is_inferred:
                self.inferred_in_graph = True
            shown = shown_by(decision)
            if shown is not None:
                count_in_graph(counter, decision, self.phases.slot, self._devices[shown.device])

    def _note_streams(self) -> None:
        for counters in self._devices.values():
            counters.note_stream()

    def _device(self, device: torch.device) -> DeviceCounters:
        with self._lock:
            if device not in self._devices:
                if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                    raise CaptureError(
                        f"a CUDA graph is captured on {device} before anything was counted there; call the "
                        "model once before the capture"
                    )
                self._devices[device] = DeviceCounters(self.layout, device)
                for counter in self.counters:
                    counter.devices[device] = self._devices[device]
            return self._devices[device]


def verify_sites(
    model: nn.Module, sites: Sequence[RoutingSite], call: Callable[[], object], *, verify: Verify
) -> tuple[tuple[Verified, ...], str | None]:
    """Run a model once under the routing probe; nothing that is counted is kept.

    Args:
        model: the model.
        sites: its MoE layers, from ``find_sites``.
        call: runs the model; without gradients.
        verify: which witness looks at the calls.

    Returns:
        What confirmed each site, and why nothing of the model may be counted, None when nothing speaks
        against it.

    Raises:
        CaptureError: a call could not be read.
    """
    probe = RoutingProbe(model, sites, RoutingOptions(verify=verify))
    probe.attach()
    try:
        with torch.no_grad():
            call()
        probe.take(step=0, stated_phase=None, ends_step=True)
    finally:
        probe.detach()
        probe.release()
    refusal, problem = probe.refusal(), probe.problem()
    if refusal is None and problem is not None:
        raise CaptureError(problem)
    return probe.verified(), refusal


def _has_values(decision: RoutingDecision) -> bool:
    shown = shown_by(decision)
    return shown is not None and not shown.is_meta and not _is_fake(shown)


def _is_fake(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a shape but no values (``FakeTensorMode``)."""
    return type(tensor) is not torch.Tensor and type(tensor).__name__ == "FakeTensor"

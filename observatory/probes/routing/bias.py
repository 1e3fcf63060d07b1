"""The correction bias of routers, which balances loads without a loss (arXiv 2408.15664), as it moves.

The bias is added to the scores for the choice of experts alone, and training moves it against the loads. It
is read when the watch starts, after every ``bias_steps`` steps and when the watch ends; a row is written
where the values differ from those of the row before. Reading waits for the device.

Shapes: E experts, null experts included.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import nn

from observatory.errors import ObservatoryError
from observatory.probes.options import WatchOptions
from observatory.probes.part import Boundary, Part
from observatory.probes.routing.part import RoutingPart
from observatory.probes.routing.rules import CORRECTION_BIASES
from observatory.probes.routing.sites import RoutingSite
from observatory.run import RunWriter
from observatory.run.tables import ROUTER_BIAS_SCHEMA


class RouterBias(Part):
    """Keeps the correction biases of the layers that have one; does nothing where none has."""

    def __init__(
        self, model: nn.Module, routing: RoutingPart, writer: RunWriter, options: WatchOptions
    ) -> None:
        self._model = model
        self._routing = routing
        self._writer = writer
        #: by layer: its site, and the module that has the bias with the bias's name there
        self._holders: dict[int, tuple[RoutingSite, tuple[nn.Module, str] | None]] = {}
        self._kept: dict[int, NDArray[np.float64]] = {}
        self._every = options.routing.bias_steps
        self._last_step = options.steps.at
        self._was_paused = False
        self._unread: set[str] = set()
        self._error: str | None = None

    def attach(self) -> None:
        """Keep the values that the first step has."""
        self._keep(self._last_step)

    def boundary(self, boundary: Boundary) -> None:
        """Keep what has changed, at the end of some steps and of the watch."""
        if self._was_paused and not boundary.is_refused:
            self._was_paused = False
            self._keep(boundary.step)
        if boundary.is_refused or not boundary.ends_step:
            return
        if boundary.is_last:
            self._keep(max(boundary.step, self._last_step + 1))
        elif (boundary.step + 1) % self._every == 0:
            self._keep(boundary.step + 1)

    def resume(self) -> None:
        """The values may have moved meanwhile."""
        self._was_paused = True

    def problem(self) -> str | None:
        """The first row that could not be kept; None when there was none."""
        return self._error

    def quiet_notes(self) -> tuple[str, ...]:
        """Biases of which this rank holds a part only, or none."""
        if not self._unread:
            return ()
        names = ", ".join(sorted(self._unread)[:3])
        return (f"router biases that were not read, being sharded or not finite: {names}",)

    def _keep(self, step: int) -> None:
        """Write rows of the layers whose values are not those of the row before."""
        layers: list[int] = []
        biases: list[NDArray[np.float64]] = []
        with torch.inference_mode(False), torch.no_grad():
            for site in self._routing.sites:
                bias_E = self._read(site)
                layer = site.spec.layer
                kept_E = self._kept.get(layer)
                if bias_E is not None and (kept_E is None or not np.array_equal(bias_E, kept_E)):
                    self._kept[layer] = bias_E
                    layers.append(layer)
                    biases.append(bias_E)
        self._last_step = step
        if not layers:
            return
        rows = pa.Table.from_pydict(
            {
                "step": [step] * len(layers),
                "layer": layers,
                "source_rank": [self._writer.rank] * len(layers),
                "bias": biases,
            },
            schema=ROUTER_BIAS_SCHEMA,
        )
        try:
            self._writer.append("router_bias", rows)
        except ObservatoryError as error:  # the program meets it at its next step
            self._error = self._error or f"captured router biases could not be kept: {error}"

    def _read(self, site: RoutingSite) -> NDArray[np.float64] | None:
        """The values of a layer's bias, (E,); None where it has none that can be read."""
        known, holder = self._holders.get(site.spec.layer, (None, None))
        if known is not site:
            holder = _holder(self._model, site)
            self._holders[site.spec.layer] = (site, holder)
        if holder is None:
            return None
        module, name = holder
        bias = getattr(module, name, None)
        if isinstance(bias, torch.Tensor) and type(bias.data) is torch.Tensor and not bias.is_meta:
            values: NDArray[np.float64] = bias.detach().to("cpu", torch.float64).flatten().numpy().copy()
            if np.isfinite(values).all():
                return values
        self._unread.add(f"{name} of {site.spec.module}")
        return None


def _holder(model: nn.Module, site: RoutingSite) -> tuple[nn.Module, str] | None:
    """The module of a layer that has a correction bias of one value per expert, and the bias's name."""
    spec = site.spec
    path = spec.module.rpartition(".")[0]
    block = site.block or (model.get_submodule(path) if path else site.module)
    sizes = {spec.experts, spec.experts + spec.null_experts}
    for module in block.modules():
        for name in CORRECTION_BIASES:
            bias = getattr(module, name, None)
            if isinstance(bias, torch.Tensor) and bias.numel() in sizes:
                return module, name
    return None

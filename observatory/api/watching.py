"""``observatory.watch``: watch the routing, exchanges and power of a running model."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue

from observatory.api.runs import Run, open_run
from observatory.errors import CaptureError
from observatory.host.ranks import find_rank
from observatory.probes.options import (
    ExchangeOptions,
    PowerOptions,
    RoutingOptions,
    RunLabels,
    Verify,
    WatchOptions,
)
from observatory.probes.watch import Watch as RunningWatch
from observatory.run.manifest import DataSpec, Phase, Topology

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from observatory.probes.routing.adapters import Adapter


def watch(
    model: nn.Module,
    out: str | os.PathLike[str] | None = None,
    *,
    phase: Phase | None = None,
    gate_mass: bool = False,
    sample_tokens: int = 0,
    verify: Verify = "first",
    bias_steps: int = 8,
    window_steps: int = 1,
    flush_s: float = 10.0,
    exchanges: bool | None = None,
    power: bool | Sequence[str] | None = None,
    own_devices: Sequence[str] | None = None,
    power_period_s: float = 0.05,
    align_clocks: bool = True,
    clock_timeout_s: float = 30.0,
    flight_recorder: bool = False,
    overwrite: bool = False,
    run_id: str | None = None,
    adapters: Sequence[Adapter] = (),
    model_name: str | None = None,
    family: str | None = None,
    mixer: str | None = None,
    data: DataSpec | None = None,
    config: Mapping[str, JsonValue] | None = None,
    topology: Topology | None = None,
    rank: int | None = None,
    world: int | None = None,
) -> Watch:
    """Watch a model: a context manager that counts assignments per expert, layer, step and phase.

    Args:
        model: module with MoE layers; may be compiled, wrapped, on several devices.
        out: run directory to make. None: a temporary one, which goes with the watch or at the end of the
            process.
        phase: phase of everything outside ``watch.phase(...)``. None: derived from the cache given to the
            model and from training mode, else ``unknown``.
        gate_mass: also sum the gate weights per expert.
        sample_tokens: per step, phase and layer keep the expert ids of the first that many token positions
            of the first call. Never token ids or text.
        verify: what is counted is held against what the experts compute
            (docs/supported-models.md#verification). ``first``: the rows that experts are used with, in the
            first, second, fourth ... call of each layer. ``rows``: in all calls. ``intervention``: the first
            call is also run again with each expert changed in turn, E + 2 calls of each MoE block with 64
            tokens at most. ``none``: only where what is read cannot show what is dispatched. The verdict of
            each layer stands in the manifest; a contradiction raises ``ModelError``, and nothing of that
            step is counted.
        bias_steps: steps between two readings of the correction biases of routers; each waits for the device.
        window_steps: steps folded into one row, with the per-step extremes.
        flush_s: seconds after which captured rows are on disk.
        exchanges: also time every all-to-all of ``torch.distributed`` (docs/exchange.md). None: when it is
            initialised with more than one rank.
        power: also sample power, clocks and temperature, in a process of its own, and note when each phase
            was computed (docs/power.md). Devices by name; True for the GPUs of this process or else its
            processors; None for its GPUs if the model is on one; False for none. Starting takes about 2 s.
        own_devices: power devices by name that this rank computes on, for energy per rank where several share
            a node. None: the GPUs that hold the model, by torch's UUIDs; name them where torch has none (CPU,
            AMD). Naming them requests power, too.
        power_period_s: time between samples, seconds.
        flight_recorder: with exchanges, also keep what torch's flight recorder states of each, as a second
            source (docs/exchange.md#the-flight-recorder-as-a-second-source).
        align_clocks: where exchanges are watched, relate the time bases of all hosts to each other at enter
            and at exit (docs/waiting.md#one-clock). False: wait for no other rank there; waiting is then
            known between ranks of one host only, unless the program calls ``set_clock``.
        clock_timeout_s: how long to wait for the other ranks then, seconds; never longer, and never an error.
        overwrite: replace an existing run; with several ranks only where a ``run_id`` is given.
        run_id: id of the run, new and the same on all ranks: a rank then never joins an older run at the
            same place. None: made by rank 0, and the others join the run that is being written.
        adapters: how to read layers that are not understood by themselves.
        model_name: name for the manifest.
        family: architecture name, the configuration's ``model_type`` by default.
        mixer: sequence mixer for the manifest.
        data: what the model is fed, for the manifest.
        config: further options for the manifest.
        topology: how the ranks are arranged, for the manifest; by default all of them hold all experts.
        rank: this process's rank; found from torch.distributed or torchrun by default.
        world: number of ranks, likewise.

    Raises:
        CaptureError: an option that does not fit, or no ``out`` on one of several ranks.
        ModelError: on entering; no MoE layers, or some only partly understood.
        RunError: on entering; the run directory cannot be made.
    """
    return Watch(
        model,
        out,
        WatchOptions(
            where=find_rank(rank, world),
            phase=phase,
            flush_s=flush_s,
            overwrite=overwrite,
            run_id=run_id,
            routing=RoutingOptions(
                gate_mass=gate_mass,
                sample_tokens=sample_tokens,
                window_steps=window_steps,
                verify=verify,
                bias_steps=bias_steps,
                adapters=tuple(adapters),
            ),
            exchange=ExchangeOptions(
                exchanges=exchanges,
                flight_recorder=flight_recorder,
                align_clocks=align_clocks,
                clock_timeout_s=clock_timeout_s,
            ),
            power=PowerOptions(
                power=power,
                own_devices=own_devices,
                power_period_s=power_period_s,
            ),
            labels=RunLabels(
                model_name=model_name,
                family=family,
                mixer=mixer,
                data=data,
                config=dict(config or {}),
                topology=topology,
            ),
        ),
    )


class Watch(RunningWatch):
    """A running watch; made by :func:`watch`.

    ``phase`` and ``step`` are called from one thread, between calls of the model.

    Attributes:
        run_path: the run directory.
        sites: the MoE layers that are watched, and how; empty before entering.
        steps: steps that ``step()`` has ended.
    """

    def __init__(self, model: nn.Module, out: str | os.PathLike[str] | None, options: WatchOptions) -> None:
        super().__init__(model, Path(out or self._temporary_place(options)), options)

    def summary(self) -> pd.DataFrame:
        """Imbalance so far, one row per layer and phase, as :meth:`Run.imbalance` gives it.

        Inside the ``with`` block of the steps that have ended; ``expert_max_over_mean`` is the load of the
        busiest expert over the mean, ``gini_floor`` what uniform routing of as many tokens shows.

        Raises:
            RunError: the watch was never entered.
        """
        return self.run().imbalance()

    def run(self) -> Run:
        """The run as it is now, opened.

        Raises:
            RunError: the watch was never entered.
        """
        if self._session is not None and not self._ended:
            self._session.hurry()
        return open_run(self.run_path)

    def _temporary_place(self, options: WatchOptions) -> Path:
        """A folder that goes when this object does, or the process."""
        if options.where.world > 1:
            raise CaptureError(
                f"watch is given no directory on one of {options.where.world} ranks",
                remedy="give all ranks the same one",
            )
        folder = Path(tempfile.mkdtemp(prefix="observatory-"))
        weakref.finalize(self, _remove, folder, os.getpid())
        return folder / "run"


def _remove(folder: Path, maker: int) -> None:
    """Not by a fork of the process that made it."""
    if os.getpid() == maker:
        shutil.rmtree(folder, ignore_errors=True)

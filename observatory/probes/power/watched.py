"""Which devices a watch samples, and on which of the ranks of a node.

A node has one sampling process, that of its first rank, where all its ranks see the same devices. Where each
rank sees only its own (a scheduler that binds them), each samples those. No message between ranks is needed:
a rank that sees at least as many devices as its node has ranks leaves them to the first one. Where there are
fewer, ranks may see the same one: whoever claims it first samples it.
"""

from __future__ import annotations

import errno
import hashlib
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from observatory.devices.find import local_devices, open_device, readable_devices
from observatory.devices.words import gpu_words
from observatory.errors import CaptureError, DeviceError, ModelError
from observatory.host.ranks import RankOf
from observatory.probes.options import PowerOptions
from observatory.probes.part import Part
from observatory.probes.power.sampler import PowerSampler
from observatory.run import RunWriter
from observatory.run.files import one_line
from observatory.run.manifest import RankPower

if TYPE_CHECKING:
    from torch import nn


class WatchedPower(Part):
    """Power sampling of one rank's watch.

    Args:
        model: whose devices are the rank's own.
        writer: of the run.
        where: this rank.
        options: what to sample.
        flush_s: seconds after which samples are on disk.
    """

    def __init__(
        self, model: nn.Module, writer: RunWriter, where: RankOf, options: PowerOptions, *, flush_s: float
    ) -> None:
        self._model, self._writer, self._where = model, writer, where
        self._options, self._flush_s = options, flush_s
        #: UUIDs of the devices that this rank computes on, as far as torch or the caller states them.
        self._own_devices: tuple[str, ...] = ()
        #: None when this rank samples nothing.
        self._sampler: PowerSampler | None = None
        #: Why nothing is sampled though it was requested, or not every GPU.
        self._reason: str | None = None
        #: Keep other ranks of the node from sampling the same devices, while this one does.
        self._claims: tuple[socket.socket, ...] = ()
        self._notes: tuple[str, ...] = ()
        self._is_closed = False

    def attach(self) -> None:
        """Start sampling, if this rank is to.

        Raises:
            CaptureError: power was requested by name, and cannot be sampled; or ``own_devices`` are not
                devices of this machine, or not those that torch names.
        """
        options = self._options
        self._own_devices = _own_devices(self._model, options.own_devices)
        wanted = True if options.power is None and options.own_devices else options.power
        is_wanted = wanted is not False and (wanted is not None or bool(self._own_devices))
        if is_wanted:
            try:
                self._start(wanted)
            except DeviceError as error:
                _close(self._claims)
                if wanted is not None and wanted is not True:
                    raise CaptureError(f"power cannot be sampled: {error}") from error
                self._reason = str(error)
        self._writer.set_power(
            RankPower(own_devices=self._own_devices) if self._sampler is None else self._sampler.begun()
        )

    def close(self) -> None:
        """End sampling, and state what was sampled and why not more."""
        if self._is_closed:
            return
        self._is_closed, sampler = True, self._sampler
        if sampler is not None:
            power = sampler.stop()
            _close(self._claims)
            notes = () if self._reason is None else (f"not every GPU was sampled: {self._reason}",)
        else:
            power = RankPower(own_devices=self._own_devices)
            notes = () if self._reason is None else (f"power was not sampled: {self._reason}",)
        power = power.model_copy(update={"notes": (*notes, *power.notes)})
        self._notes = power.notes
        self._writer.set_power(power)

    def abandon(self) -> None:
        """Leave the sampling to the parent: in a forked child."""
        if self._sampler is not None:
            self._sampler.abandon()
            _close(self._claims)

    def notes(self, *, steps: int) -> tuple[str, ...]:
        """What was not sampled, and why."""
        del steps
        return self._notes

    def _start(self, wanted: bool | Sequence[str] | None) -> None:
        where = self._where
        selectors, self._reason = _selectors(wanted, where)
        self._claims, selectors = _claimed(self._writer.path, selectors)
        if selectors:
            sampler = PowerSampler(
                self._writer.path,
                rank=where.rank,
                ranks=where.world,
                selectors=selectors,
                own_devices=self._own_devices,
                period_s=self._options.power_period_s,
                flush_s=self._flush_s,
            )
            sampler.start()
            self._sampler = sampler


def _selectors(wanted: bool | Sequence[str] | None, where: RankOf) -> tuple[tuple[str, ...], str | None]:
    """Devices that this rank samples, none when it leaves them to another rank; and why not every GPU.

    Raises:
        DeviceError: there are none to sample.
    """
    first = where.rank == 0 if where.local_rank is None else where.local_rank == 0
    if isinstance(wanted, str):
        wanted = (wanted,)
    if wanted is not None and not isinstance(wanted, bool):
        return (tuple(wanted) if first else ()), None
    local = local_devices()
    why_not_all = None if local.reason is None else gpu_words(local.reason)
    if local.selectors:
        shared = where.local_world is None or len(local.selectors) >= where.local_world
        return ((), None) if shared and not first else (local.selectors, why_not_all)
    if wanted is None:
        raise DeviceError(str(why_not_all))
    if not first:
        return (), None
    return readable_devices(no_gpu=local.reason), None


def _claimed(run: Path, selectors: tuple[str, ...]) -> tuple[tuple[socket.socket, ...], tuple[str, ...]]:
    """Those devices that no other rank of this node samples into this run, and what claims them.

    A claim is a socket with a name of Linux's abstract kind: known on one node, and gone with its process.
    """
    claims, ours = [], []
    for selector in selectors:
        name = hashlib.sha256(f"{run.resolve()}\0{selector}".encode()).hexdigest()
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            claim.bind(f"\0moe-observatory/{name}")
        except OSError as error:
            claim.close()
            if error.errno == errno.EADDRINUSE:
                continue
        else:
            claims.append(claim)
        ours.append(selector)
    return tuple(claims), tuple(ours)


def _close(claims: Sequence[socket.socket]) -> None:
    for claim in claims:
        claim.close()


def _own_devices(model: nn.Module, selectors: Sequence[str] | None) -> tuple[str, ...]:
    """UUIDs of the devices that a rank computes on: those that torch names, else those of the caller.

    Raises:
        CaptureError: a name names no device, or another than torch does.
    """
    gpus = _gpus_of(model)
    if selectors is None:
        return gpus
    named: list[str] = []
    for selector in (selectors,) if isinstance(selectors, str) else selectors:
        try:
            with open_device(selector) as device:
                named.append(device.uuid)
        except DeviceError as error:
            raise CaptureError(f"own_devices: {error}") from error
    if gpus and set(named) != set(gpus):
        raise CaptureError(
            f"own_devices names {', '.join(named) or 'none'}, but the model of this rank is on "
            f"{', '.join(gpus)}; leave it out where the model is on a GPU that torch knows"
        )
    return tuple(dict.fromkeys(named))


def gpu_uuid(device: str) -> str | None:
    """UUID of the NVIDIA GPU that torch calls so; None where torch names none (CPU, AMD).

    Raises:
        ModelError: torch has no such device.
    """
    import torch

    try:
        named = torch.device(device)
        if named.type != "cuda" or torch.version.hip is not None:
            return None
        index = torch.cuda.current_device() if named.index is None else named.index
        return f"GPU-{torch.cuda.get_device_properties(index).uuid}"
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"torch has no device {device[:40]!r} here ({one_line(error, 200)}); expected cpu, cuda or cuda:N"
        ) from error


def _gpus_of(model: nn.Module) -> tuple[str, ...]:
    """UUIDs of the NVIDIA GPUs that hold parameters of the model."""
    indices = {parameter.device.index for parameter in model.parameters() if parameter.is_cuda}
    return tuple(filter(None, [gpu_uuid(f"cuda:{index}") for index in sorted(indices)]))

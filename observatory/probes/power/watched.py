"""Which devices a watch samples, and on which of the ranks of a node.

A node has one sampling process, that of its first rank, where all its ranks see the same devices. Where each
rank sees only its own (a scheduler that binds them), each samples those. The ranks need not talk about it:
a rank that sees at least as many devices as its node has ranks leaves them to the first one. Where there are
fewer, ranks may see the same one: whoever claims it first samples it.
"""

from __future__ import annotations

import errno
import hashlib
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from observatory.devices.find import find_devices, local_devices, open_device
from observatory.errors import CaptureError, DeviceError, ModelError
from observatory.host.ranks import RankOf
from observatory.probes.power.sampler import PowerSampler
from observatory.run.manifest import RankPower

if TYPE_CHECKING:
    from torch import nn

    from observatory.probes.power.pauses import PhaseShifts


@dataclass(slots=True)
class WatchedPower:
    """Power sampling of one rank's watch.

    Attributes:
        active: devices of the node are sampled, by this rank or by its first one.
        own_devices: UUIDs of the devices that this rank computes on, as far as torch or the caller tells.
        sampler: runs; None when this rank samples nothing.
        reason: why nothing is sampled though it was asked for, or not every GPU; None otherwise.
        claims: keep other ranks of the node from sampling the same devices, while this one does.
    """

    active: bool = False
    own_devices: tuple[str, ...] = ()
    sampler: PowerSampler | None = None
    reason: str | None = None
    claims: tuple[socket.socket, ...] = ()

    @classmethod
    def start(
        cls,
        model: nn.Module,
        run: Path,
        *,
        where: RankOf,
        wanted: bool | Sequence[str] | None,
        own_devices: Sequence[str] | None,
        period_s: float,
        flush_s: float,
    ) -> WatchedPower:
        """Start sampling, if this rank is to.

        Args:
            model: whose devices are the rank's own.
            run: run directory, which exists.
            where: this rank.
            wanted: devices by name; True for the GPUs of this process, or, without any, its processors; None
                for its GPUs if the model is on one; False for none.
            own_devices: devices that this rank computes on, by name; None: the GPUs that torch tells.
            period_s: time between samples.
            flush_s: seconds after which samples are on disk.

        Raises:
            CaptureError: power was asked for by name, and cannot be sampled; or ``own_devices`` are not
                devices of this machine, or not those that torch tells.
        """
        own = _own_devices(model, own_devices)
        if wanted is None and own_devices:
            wanted = True
        if wanted is False or (wanted is None and not own):
            return cls(own_devices=own)
        claims: tuple[socket.socket, ...] = ()
        try:
            selectors, reason = _selectors(wanted, where)
            claims, selectors = _claimed(run, selectors)
            if not selectors:
                return cls(active=True, own_devices=own)
            sampler = PowerSampler(
                run,
                rank=where.rank,
                ranks=where.world,
                selectors=selectors,
                own_devices=own,
                period_s=period_s,
                flush_s=flush_s,
            )
            sampler.start()
        except DeviceError as error:
            _close(claims)
            if wanted is None or wanted is True:
                return cls(own_devices=own, reason=str(error))
            raise CaptureError(f"power cannot be sampled: {error}") from error
        return cls(active=True, own_devices=own, sampler=sampler, reason=reason, claims=claims)

    def shifts(self, model: nn.Module, steps: bool | int) -> PhaseShifts:
        """Pauses between steps for the sensors of the devices that this rank samples.

        Args:
            model: whose devices are waited for before a pause.
            steps: of one rhythm; True where that is not known.
        """
        # Analysis is loaded for those who ask for it only.
        from observatory.devices.sensors import calibration_entry, sensor_of
        from observatory.probes.power.pauses import PhaseShifts

        sensors = []
        if self.sampler is not None:
            for spec in self.sampler.devices:
                measured = self.sampler.calibration.get(spec.uuid or "")
                entry = None if measured is None else calibration_entry(measured)
                sensors.append(sensor_of(spec.name, entry, kind=spec.kind))
        return PhaseShifts(
            sensors, synchronise=lambda: _synchronise(model), steps=None if steps is True else int(steps)
        )

    def begun(self) -> RankPower:
        """What is known before the first step: devices and their calibration."""
        if self.sampler is not None:
            return self.sampler.begun()
        return RankPower(own_devices=self.own_devices)

    def stop(self) -> RankPower:
        """End sampling; what was sampled, and why not."""
        if self.sampler is not None:
            power = self.sampler.stop()
            _close(self.claims)
            if self.reason is None:
                return power
            note = f"not every GPU was sampled: {self.reason}"
            return power.model_copy(update={"notes": (note, *power.notes)})
        notes = () if self.reason is None else (f"power was not sampled: {self.reason}",)
        return RankPower(own_devices=self.own_devices, notes=notes)

    def abandon(self) -> None:
        """Leave the sampling to the parent: in a forked child."""
        if self.sampler is not None:
            self.sampler.abandon()
            _close(self.claims)


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
    if local.selectors:
        shared = where.local_world is None or len(local.selectors) >= where.local_world
        return ((), None) if shared and not first else (local.selectors, local.reason)
    if wanted is None:
        raise DeviceError(str(local.reason))
    if not first:
        return (), None
    processors = []
    for device in find_devices():
        processors.append(device.uuid)
        device.close()
    if not processors:
        raise DeviceError(f"no device tells its power here ({local.reason}); `observatory doctor` says why")
    return tuple(processors), None


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


def _synchronise(model: nn.Module) -> None:
    """Wait for the devices of the model."""
    import torch

    for device in {parameter.device for parameter in model.parameters() if parameter.is_cuda}:
        torch.cuda.synchronize(device)


def _own_devices(model: nn.Module, told: Sequence[str] | None) -> tuple[str, ...]:
    """UUIDs of the devices that a rank computes on: those that torch tells, else those that were named.

    Raises:
        CaptureError: a name names no device, or another than torch does.
    """
    known = _gpus_of(model)
    if told is None:
        return known
    named: list[str] = []
    for selector in (told,) if isinstance(told, str) else told:
        try:
            with open_device(selector) as device:
                named.append(device.uuid)
        except DeviceError as error:
            raise CaptureError(f"own_devices: {error}") from error
    if known and set(named) != set(known):
        raise CaptureError(
            f"own_devices names {', '.join(named) or 'none'}, but the model of this rank is on "
            f"{', '.join(known)}; leave it out where the model is on a GPU that torch knows"
        )
    return tuple(dict.fromkeys(named))


def gpu_uuid(device: str) -> str | None:
    """UUID of the NVIDIA GPU that torch calls so; None where torch does not tell one (CPU, AMD).

    Raises:
        ModelError: torch has no such device.
    """
    import torch

    try:
        found = torch.device(device)
        if found.type != "cuda" or torch.version.hip is not None:
            return None
        index = torch.cuda.current_device() if found.index is None else found.index
        return f"GPU-{torch.cuda.get_device_properties(index).uuid}"
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"torch has no device {device[:40]!r} here ({reason}); expected cpu, cuda or cuda:N"
        ) from error


def _gpus_of(model: nn.Module) -> tuple[str, ...]:
    """UUIDs of the NVIDIA GPUs that hold parameters of the model."""
    indices = {parameter.device.index for parameter in model.parameters() if parameter.is_cuda}
    return tuple(filter(None, [gpu_uuid(f"cuda:{index}") for index in sorted(indices)]))

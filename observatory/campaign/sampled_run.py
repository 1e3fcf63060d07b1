"""A run directory whose devices are sampled while something is measured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from observatory.host.provenance import find_rank_provenance, new_manifest
from observatory.probes.power.sampler import PowerSampler
from observatory.run import RunWriter
from observatory.run.manifest import ModelSpec, RankPower


@dataclass(slots=True)
class SampledRun:
    """What is sampled.

    Attributes:
        sampler: runs until the context ends.
        power: what was sampled, once the context has ended.
    """

    sampler: PowerSampler
    power: RankPower = field(default_factory=RankPower)


@contextlib.contextmanager
def sampled_run(
    out: Path,
    name: str,
    selectors: Sequence[str],
    *,
    period_s: float,
    calibrate_s: float = 1.2,
    flush_s: float = 10.0,
    notes: tuple[str, ...] = (),
    overwrite: bool = False,
    created: Callable[[], None] = lambda: None,
) -> Iterator[SampledRun]:
    """Make a run, sample while the context lasts, and keep what was sampled however it ends.

    Args:
        out: run directory to make.
        name: what is measured, for the manifest.
        selectors: devices (docs/power.md#selection).
        period_s: time between samples, seconds.
        calibrate_s: how long to calibrate before; 0 leaves it out.
        flush_s: seconds after which samples are on disk.
        notes: for the manifest.
        overwrite: replace an existing run.
        created: called when the run directory exists and nothing is sampled yet.

    Raises:
        DeviceError: no device can be read.
        RunError: the run directory cannot be made or written.
    """
    manifest = new_manifest(model=ModelSpec(name=name[:200]), notes=notes)
    where = find_rank_provenance()
    with RunWriter.create(out, manifest, overwrite=overwrite, provenance=where) as writer:
        created()
        sampler = PowerSampler(
            out, rank=0, ranks=1, selectors=selectors, period_s=period_s, calibrate_s=calibrate_s,
            flush_s=flush_s,
        )  # fmt: skip
        sampler.start()
        run = SampledRun(sampler)
        try:
            writer.set_power(sampler.begun())
            yield run
        finally:
            run.power = sampler.stop()
            writer.set_power(run.power)
            writer.update_manifest(devices=run.power.sampled)

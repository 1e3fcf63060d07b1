"""What a watch was asked for, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from pydantic import JsonValue

from observatory.errors import CaptureError
from observatory.host.ranks import RankOf
from observatory.probes.routing.judgement import Verify
from observatory.run.manifest import PHASES, DataSpec, Phase, Topology

if TYPE_CHECKING:
    from observatory.probes.routing.adapters import Adapter

_LONGEST_RUN_ID = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchOptions:
    """The options of :func:`observatory.watch`, which describes them; ``where`` is this rank.

    Raises:
        CaptureError: an option that does not fit.
    """

    where: RankOf
    phase: Phase | None
    gate_mass: bool
    sample_tokens: int
    verify: Verify
    window_steps: int
    flush_seconds: float
    exchanges: bool | None
    power: bool | Sequence[str] | None
    own_devices: Sequence[str] | None
    power_period_s: float
    power_shifts: bool | int
    align_clocks: bool
    clock_timeout_s: float
    flight_recorder: bool
    overwrite: bool
    run_id: str | None
    adapters: tuple[Adapter, ...]
    model_name: str | None
    family: str | None
    mixer: str | None
    data: DataSpec | None
    config: dict[str, JsonValue]
    topology: Topology | None

    def __post_init__(self) -> None:
        if self.phase is not None:
            check_phase(self.phase)
        if self.verify not in get_args(Verify):
            raise CaptureError(f"verify is {self.verify!r}; expected one of {', '.join(get_args(Verify))}")
        for name, least in (("sample_tokens", 0), ("window_steps", 1)):
            value = getattr(self, name)
            if value < least:
                raise CaptureError(f"{name} is {value}; expected {least} or more")
        for name in ("flush_seconds", "clock_timeout_s", "power_period_s"):
            seconds = getattr(self, name)
            if not seconds > 0:
                raise CaptureError(f"{name} is {seconds}; expected more than 0")
        if self.run_id is not None and not 0 < len(self.run_id) <= _LONGEST_RUN_ID:
            raise CaptureError(f"run_id has {len(self.run_id)} characters; expected 1 to {_LONGEST_RUN_ID}")
        if self.power_shifts < 0:
            raise CaptureError(
                f"power_shifts is {self.power_shifts}; expected True, False or a number of steps"
            )
        ranks = self.where.world
        if self.power_shifts and (ranks > 1 or self.exchanges):
            raise CaptureError(
                f"power_shifts is asked for with {ranks} ranks or timed exchanges, where a pause of one rank "
                "is waiting of all others; leave it out (energy by the counter needs no pauses), or watch "
                "one rank alone"
            )
        if self.overwrite and ranks > 1 and self.run_id is None:
            raise CaptureError(
                f"overwrite is asked for with {ranks} ranks, where a late rank cannot tell the old run from "
                "the new one; choose a directory that does not exist, or give all ranks one new run_id"
            )


def check_phase(name: str) -> None:
    """Raise CaptureError for a phase that does not exist."""
    if name not in PHASES:
        raise CaptureError(f"phase {name!r} does not exist; expected one of {', '.join(PHASES)}")

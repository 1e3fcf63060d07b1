"""What a watch is asked for: each option declared once, in the record of the part that reads it.

Imports nothing heavy: a command checks its options before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from pydantic import JsonValue

from observatory.errors import CaptureError, ObservatoryError
from observatory.host.ranks import RankOf
from observatory.run.manifest import PHASES, DataSpec, Phase, Topology

if TYPE_CHECKING:
    from observatory.probes.routing.adapters import Adapter

#: Which calls are checked: the rows of some, the rows of all, some by intervention, or none.
Verify = Literal["first", "rows", "intervention", "none"]

#: A UUID has 36 characters; longer names leave room for those of schedulers.
_LONGEST_RUN_ID = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class CountingOptions:
    """What is kept of the routing; a profile and the cells of a grid have the same options.

    Attributes:
        gate_mass: also sum the gate weights per expert.
        sample_tokens: token positions per step, phase and layer whose expert ids are kept; 0 keeps none.
        window_steps: steps folded into one row, with the per-step extremes.

    Raises:
        CaptureError: an option that does not fit.
    """

    gate_mass: bool = False
    sample_tokens: int = 0
    window_steps: int = 1

    def __post_init__(self) -> None:
        check_least("sample_tokens", self.sample_tokens, 0)
        check_least("window_steps", self.window_steps, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingOptions(CountingOptions):
    """How routing is read and counted.

    Attributes:
        verify: which calls are held against what the experts compute.
        adapters: how to read layers that are not understood by themselves.
        bias_steps: steps between two readings of the correction biases of routers; each waits for the device.
    """

    verify: Verify = "first"
    bias_steps: int = 8
    adapters: tuple[Adapter, ...] = ()

    def __post_init__(self) -> None:
        CountingOptions.__post_init__(self)
        check_least("bias_steps", self.bias_steps, 1)
        if self.verify not in get_args(Verify):
            raise CaptureError(f"verify is {self.verify!r}; expected one of {', '.join(get_args(Verify))}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeOptions:
    """How exchanges are timed, and brought onto one time base.

    Attributes:
        exchanges: time them; None: when torch.distributed is initialised with more than one rank.
        flight_recorder: keep what torch's flight recorder states of each, as a second source.
        align_clocks: relate the time bases of all hosts to each other at enter and at exit.
        clock_timeout_s: how long to wait for the other ranks then.
    """

    exchanges: bool | None = None
    flight_recorder: bool = False
    align_clocks: bool = True
    clock_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        _check_positive("clock_timeout_s", self.clock_timeout_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerOptions:
    """Which devices are sampled.

    Attributes:
        power: devices by name; True for the GPUs of this process or else its processors; None for its GPUs if
            the model is on one; False for none.
        own_devices: devices that this rank computes on, by name; None: the GPUs that hold the model.
        power_period_s: time between samples.
    """

    power: bool | Sequence[str] | None = None
    own_devices: Sequence[str] | None = None
    power_period_s: float = 0.05

    def __post_init__(self) -> None:
        _check_positive("power_period_s", self.power_period_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOptions:
    """Which steps are captured, and by what numbers; steps are never renumbered.

    Attributes:
        at: number of the step that the watch starts in.
        first: steps before it are not captured.
        end: steps from it on are not captured; None: no end.
        every: of the steps from the first on, one in so many is captured.
        most_s: the capture ends so many seconds after its first step; None: no limit.
        budget: the capture ends when it takes more than this share of the program's time; None: no limit.
        stopped: nothing is captured before a command starts it; ``first`` and ``end`` mean nothing then.
        listens: commands are taken (``observatory ctl``).
        generates: each forward pass of a ``generate()`` is a step by itself; False: the program states all.
    """

    at: int = 0
    first: int = 0
    end: int | None = None
    every: int = 1
    most_s: float | None = None
    budget: float | None = None
    stopped: bool = False
    listens: bool = False
    generates: bool = True

    def __post_init__(self) -> None:
        check_least("every", self.every, 1)
        if self.most_s is not None:
            _check_positive("most_s", self.most_s)
        if self.budget is not None:
            _check_positive("budget", self.budget)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLabels:
    """What the manifest states of a run besides what is captured; None: what the model itself states.

    Attributes:
        model_name: name of the model.
        family: architecture name.
        mixer: sequence mixer.
        data: what the model is fed.
        config: further options.
        topology: how the ranks are arranged; None: all of them hold all experts.
    """

    model_name: str | None = None
    family: str | None = None
    mixer: str | None = None
    data: DataSpec | None = None
    config: dict[str, JsonValue] = field(default_factory=dict)
    topology: Topology | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchOptions:
    """The options of :func:`observatory.watch`.

    Attributes:
        where: this rank.
        phase: phase of everything outside ``watch.phase(...)``; None: as the model's calls show it.
        flush_s: seconds after which captured rows are on disk.
        overwrite: replace an existing run.
        run_id: id of the run; None: a new one.
        made: called once by every rank, by rank 0 after it has made the run, or with why it cannot. Returns
            on all ranks what rank 0 gave. With ``run_id``, no rank then waits for files of rank 0, and
            each node may write to storage of its own.

    Raises:
        CaptureError: options that do not fit each other.
    """

    where: RankOf
    phase: Phase | None = None
    flush_s: float = 10.0
    overwrite: bool = False
    run_id: str | None = None
    made: Callable[[str | None], str | None] | None = None
    steps: StepOptions = field(default_factory=StepOptions)
    routing: RoutingOptions = field(default_factory=RoutingOptions)
    exchange: ExchangeOptions = field(default_factory=ExchangeOptions)
    power: PowerOptions = field(default_factory=PowerOptions)
    labels: RunLabels = field(default_factory=RunLabels)

    def __post_init__(self) -> None:
        if self.phase is not None:
            check_phase(self.phase)
        _check_positive("flush_s", self.flush_s)
        if self.run_id is not None and not 0 < len(self.run_id) <= _LONGEST_RUN_ID:
            raise CaptureError(f"run_id has {len(self.run_id)} characters; expected 1 to {_LONGEST_RUN_ID}")
        if self.routing.window_steps > 1 and self.steps != StepOptions(at=self.steps.at):
            raise CaptureError(
                "window_steps folds steps that follow each other; capture all steps, or fold none"
            )
        ranks = self.where.world
        if self.overwrite and ranks > 1 and self.run_id is None:
            raise CaptureError(
                f"overwrite is requested with {ranks} ranks, where a late rank cannot distinguish the old "
                "run from the new one; choose a directory that does not exist, or give all ranks one new "
                "run_id"
            )


def check_phase(name: str) -> None:
    """Raise CaptureError for a phase that does not exist."""
    if name not in PHASES:
        raise CaptureError(f"phase {name!r} does not exist; expected one of {', '.join(PHASES)}")


def check_least(name: str, value: int, least: int, *, error: type[ObservatoryError] = CaptureError) -> None:
    """Raise this error for a number that is too small."""
    if value < least:
        raise error(f"{name} is {value}; expected {least} or more")


def _check_positive(name: str, seconds: float) -> None:
    if not seconds > 0:
        raise CaptureError(f"{name} is {seconds}; expected more than 0")

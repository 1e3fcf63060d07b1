"""What a profile is to do: its options, declared once, and the command line that gives them again."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, Literal, get_args

from pydantic import ConfigDict

from observatory.errors import CaptureError, DataError, ExchangeError, alike
from observatory.probes.options import (
    CountingOptions,
    PowerOptions,
    RoutingOptions,
    Verify,
    check_least,
)
from observatory.run.exchange_algorithms import ALGORITHMS
from observatory.run.files import one_line

#: Options of the command line that are named otherwise than their field.
_OPTIONS = {"flush_s": "--flush-seconds"}

PhaseChoice = Literal["prefill", "decode", "both"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileOptions(CountingOptions):
    """What decides what a profile counts; all cells of a grid share it.

    Attributes:
        batch_size: sequences per step and rank, B.
        sequence_length: tokens per sequence, T; also the context of decode steps.
        steps: steps of each phase.
        phase: ``prefill``, ``decode`` or ``both`` one after the other.
        seed: seeds shuffled and mock tokens.
        device: torch device.
        dtype: torch dtype name of the weights; None takes the loader's choice.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")  # a grid file is read into it

    batch_size: int = 8
    sequence_length: int = 256
    steps: int = 20
    phase: PhaseChoice = "prefill"
    seed: int = 0
    device: str = "cpu"
    dtype: str | None = None

    def __post_init__(self) -> None:
        CountingOptions.__post_init__(self)
        for name in ("batch_size", "sequence_length", "steps"):
            check_least(name, getattr(self, name), 1, error=DataError)
        check_least("seed", self.seed, 0, error=DataError)
        if self.phase not in get_args(PhaseChoice):
            raise DataError(f"phase is {self.phase!r}; choose one of {', '.join(get_args(PhaseChoice))}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileJob(ProfileOptions):
    """One profile: its options, what is profiled on what, and how it runs on ranks.

    Attributes:
        model: bundled name, checkpoint directory or hub id.
        data: data condition, text file, or ``datasets:NAME``.
        flush_s: seconds after which captured rows are on disk.
        ep: ranks over which the experts are spread; 1 keeps them together.
        placement: rank of every expert: ``linear``, ``round-robin`` or the path of a placement file.
        algorithm: ``flat``, ``hierarchical`` or ``gather``.
        deduplicate: send a token once per destination rank.
        ranks_per_node: pretend that nodes are so many consecutive ranks; None takes the hosts as they are.
        backend: ``auto``, ``gloo``, ``nccl`` or ``mpi``.
        exchange_timeout_s: how long to wait for a rank before it is named as missing.
        power: ``auto`` samples the GPUs the model is on, ``on`` else processors as well, ``off`` nothing; or
            devices by name, separated by commas.
        rank_devices: the power device that each rank computes on, by name, in the order of ranks, separated
            by commas; None: the GPUs that hold the model.
    """

    model: str
    data: str = "prose"
    flush_s: float = 10.0
    ep: int = 1
    placement: str = "linear"
    algorithm: str = "flat"
    deduplicate: bool = False
    ranks_per_node: int | None = None
    backend: str = "auto"
    exchange_timeout_s: float = 60.0
    power: str = "auto"
    rank_devices: str | None = None

    def __post_init__(self) -> None:
        ProfileOptions.__post_init__(self)
        check_least("ep", self.ep, 1, error=DataError)
        if self.rank_devices is not None and self.power == "off":
            raise CaptureError("rank_devices is given, but power is off; sample power, or leave it out")
        if self.algorithm not in ALGORITHMS:
            raise ExchangeError(
                f"algorithm {self.algorithm!r} does not exist; expected one of {', '.join(ALGORITHMS)}"
            )

    def counting(self, *, verify: Verify) -> RoutingOptions:
        """How the watch counts."""
        same = {field.name: getattr(self, field.name) for field in fields(CountingOptions)}
        return RoutingOptions(**same, verify=verify)

    def sampling(self, *, rank: int, ranks: int) -> PowerOptions:
        """What the watch of a rank samples.

        Raises:
            CaptureError: ``rank_devices`` does not name one device for each rank.
        """
        words: dict[str, bool | None] = {"auto": None, "on": True, "off": False}
        return PowerOptions(
            power=words[self.power] if self.power in words else tuple(self.power.split(",")),
            own_devices=self.own_devices(rank=rank, ranks=ranks),
        )

    def own_devices(self, *, rank: int, ranks: int) -> tuple[str, ...] | None:
        """Names of the power devices that a rank computes on; None: the GPUs that hold the model.

        Raises:
            CaptureError: ``rank_devices`` does not name one device for each rank.
        """
        if self.rank_devices is None:
            return None
        named = self.rank_devices.split(",")
        if len(named) != ranks or not all(named):
            raise alike(
                CaptureError(
                    f"rank_devices is {one_line(self.rank_devices, 120)!r} for {ranks} ranks; expected one "
                    "name for each rank, in their order, separated by commas"
                )
            )
        return (named[rank],)

    @property
    def prefill_steps(self) -> int:
        """Prefill steps that are recorded."""
        return 0 if self.phase == "decode" else self.steps

    @property
    def decode_steps(self) -> int:
        """Decode steps that are recorded."""
        return 0 if self.phase == "prefill" else self.steps

    @property
    def positions(self) -> int:
        """Positions that a sequence takes."""
        return self.sequence_length + self.decode_steps

    @property
    def row_tokens(self) -> int:
        """Tokens each of the B rows must hold."""
        return max(self.prefill_steps, 1) * self.sequence_length + self.decode_steps


def profile_argv(job: ProfileJob, out: Path) -> list[str]:
    """The command line of a job, for its ranks and for the manifest."""
    argv = ["profile", job.model, "--out", str(out)]
    for field in fields(job):
        value = getattr(job, field.name)
        option = _OPTIONS.get(field.name, f"--{field.name.replace('_', '-')}")
        if field.name == "model" or value is None or value is False:
            continue
        argv += [option] if value is True else [option, str(value)]
    return argv

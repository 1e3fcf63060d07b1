"""What a run is: the manifest of a run directory, as validated records.

The manifest (``run.json``) is written by rank 0 when the run starts and again when it ends; every rank
writes its own status file, so that a rank which dies takes nothing with it. All times are labels
(Unix seconds) unless the name says ``_ns`` (monotonic nanoseconds).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, JsonValue

from observatory.run.provenance import HostSpec, RankProvenance, SchedulerJob
from observatory.run.records import Count, Moment, Record, Text

SCHEMA_VERSION = "1.7"

Phase = Literal["prefill", "decode", "train_forward", "train_backward", "mixed", "unknown"]
PHASES: tuple[Phase, ...] = ("prefill", "decode", "train_forward", "train_backward", "mixed", "unknown")

_Few = Annotated[int, Field(ge=1, le=1 << 31)]
_Bytes = Annotated[int, Field(ge=0, le=1 << 50)]
_Seconds = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
_Node = Annotated[int, Field(ge=0, lt=1 << 31)]


class Verified(Record):
    """What confirmed the counts of a layer while it ran.

    Attributes:
        by: ``rows`` (what experts were called with, or the group sizes of their kernel), ``intervention``
            (experts were changed one by one, and the tokens whose result changed were theirs), or ``none``.
        code: why there is no confirmation, or what else the witnesses showed; None when there is nothing to
            add, and in older runs.
        reason: the same in a sentence.
    """

    by: Literal["rows", "intervention", "none"]
    code: Text | None = None
    reason: Text | None = None


class MoeLayerSpec(Record):
    """One MoE layer of the model.

    Attributes:
        layer: index of the decoder block the MoE layer sits in; several MoE layers of one block get
            consecutive ``layer`` numbers only if the model numbers them so, see ``module``.
        module: qualified name of the module that was hooked.
        experts: routed experts, E. Shared and null experts are not among them.
        top_k: assignments per token as configured; None when it varies (expert choice, dynamic K).
        shared_experts: experts every token passes; they never appear in loads.
        null_experts: router outputs that stand for "no expert"; assignments to them are not counted.
        verified: what confirmed the counts; None in runs before schema 1.2 and in runs without an end.
    """

    layer: Count
    module: Text
    experts: Annotated[int, Field(ge=1, le=65536)]
    top_k: Annotated[int, Field(ge=1, le=65536)] | None = None
    shared_experts: Count | None = None
    null_experts: Count = 0
    verified: Verified | None = None


class ModelSpec(Record):
    """The model that ran.

    Attributes:
        name: what the user called it.
        family: architecture name, None when unknown.
        mixer: sequence mixer (MLA, MHA, GQA, Mamba-2, GDN, ...), None when not recognised.
        hidden_size: H; None when unknown.
        expert_bytes: bytes of one routed expert's weights; None when unknown or not the same everywhere.
        parameters: number of parameters; None when unknown.
        dtype: dtype of the weights as torch names it.
        moe_layers: the MoE layers in model order.
        config: sizes and kinds of its configuration, which plans read; None where it has none.
    """

    name: Text
    family: Text | None = None
    mixer: Text | None = None
    hidden_size: Annotated[int, Field(ge=0, le=1 << 31)] | None = None
    expert_bytes: _Bytes | None = None
    parameters: Count | None = None
    dtype: Text | None = None
    moe_layers: tuple[MoeLayerSpec, ...] = ()
    config: Annotated[dict[str, JsonValue], Field(max_length=256)] | None = None


class DataSpec(Record):
    """What was fed to the model.

    Attributes:
        condition: prose, code, foreign, structured, shuffled, mock, or what the user named.
        source: origin of the tokens.
        real: False for mock and shuffled tokens.
        batch_size: sequences per step.
        sequence_length: tokens per sequence.
        wrapped: how often the text had to be repeated to fill the run.
    """

    condition: Text
    source: Text | None = None
    real: bool | None = None
    batch_size: Count | None = None
    sequence_length: Count | None = None
    wrapped: Count = 0


class Topology(Record):
    """Ranks of the run.

    Attributes:
        ranks: P, the number of source ranks (processes).
        ep: expert-parallel degree; 1 when every rank holds all experts.
        gpus_per_node: ranks per node; None when unknown.
        node_of_rank: node of each rank, counted from 0 in order of appearance; None when unknown.
        placement: ranks that hold each expert, the first its home; None when the run's experts were not
            spread, or differently from layer to layer.
    """

    ranks: Annotated[int, Field(ge=1, le=1 << 53)] = 1
    ep: _Few = 1
    gpus_per_node: _Few | None = None
    node_of_rank: tuple[_Node, ...] | None = None
    placement: tuple[tuple[_Node, ...], ...] | None = None


class DeviceSpec(Record):
    """A device as the driver names it; every part None where the device has none, or does not report it.

    Attributes:
        kind: ``nvidia``, ``amd``, ``rapl``, ``replay``, ``none``, or what another writer calls it.
        name: of its model.
        uuid: what names the device, across reboots.
        driver: version of its driver.
        enforced_limit_mw: power limit in force when it was opened.
        default_limit_mw, min_limit_mw, max_limit_mw: default power limit and range of power limits (NVIDIA).
        max_sm_clock_mhz: highest clock of its multiprocessors.
        bus_id: PCI bus id, ``00000000:10:00.0``.
        mig: whether it is partitioned (NVIDIA).
        covers: what its energy is that of (RAPL).
        recorded_kind: kind of the device that was recorded (replay).
        rank: the rank it works for, where another writer states it; ours does in ``RankPower.own_devices``.
    """

    kind: Text
    name: Text | None = None
    uuid: Text | None = None
    driver: Text | None = None
    enforced_limit_mw: Count | None = None
    default_limit_mw: Count | None = None
    min_limit_mw: Count | None = None
    max_limit_mw: Count | None = None
    max_sm_clock_mhz: Count | None = None
    bus_id: Annotated[str, Field(max_length=255)] | None = None
    mig: bool | None = None
    covers: Text | None = None
    recorded_kind: Text | None = None
    rank: Count | None = None


#: More than Linux schedules on.
MOST_CORES = 8192
_Cores = Annotated[float, Field(gt=0.0, le=1e9)]


class CoreQuota(Record):
    """What a control group lets its processes use.

    Attributes:
        cpus: cores at once, on average; 0.5 is half of one.
        group: what names the group on its machine.
    """

    cpus: _Cores
    group: Text


class CoreSpec(Record):
    """Cores that one rank may use.

    Attributes:
        host: host name of the rank.
        machine: what names its kernel, which containers of one machine share; None where it is not known.
        cpus: cores of its affinity, as Linux writes lists of them (``0-3,8``).
        quotas: limits of its control groups, the innermost first; empty without any.
        threads: threads that it computes with; None when not known.
    """

    host: Text
    machine: Text | None = None
    cpus: Annotated[str, Field(max_length=4096, pattern=r"^(\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*)?$")]
    quotas: Annotated[tuple[CoreQuota, ...], Field(max_length=32)] = ()
    threads: Annotated[int, Field(ge=1, le=1 << 20)] | None = None


class CoreShare(Record):
    """Ranks of one machine and the cores that they can use.

    Attributes:
        hosts: names of the machine; containers may each have one of their own.
        ranks: ranks there.
        cores: where they are fewer than the ranks, how many ranks can have a core of their own at once (a
            quota may give them part of one); else all that they can use together.
        threads: threads of all these ranks; None where a rank does not say.
    """

    hosts: Annotated[tuple[Text, ...], Field(min_length=1, max_length=64)]
    ranks: Annotated[int, Field(ge=1)]
    cores: Annotated[float, Field(ge=0.0, le=1e9)]
    threads: Count | None = None

    @property
    def short(self) -> Literal["ranks", "threads"] | None:
        """What is more than the cores; None where there are enough."""
        if self.ranks > self.cores:
            return "ranks"
        return "threads" if self.threads is not None and self.threads > self.cores else None


#: 73 years: sums of two such times fit 64 bits.
_MOST_NS = 1 << 61
_Nanoseconds = Annotated[int, Field(ge=-_MOST_NS, le=_MOST_NS)]


class ClockSpec(Record):
    """How one rank's monotonic clock relates to that of the reference rank.

    A time of this rank becomes one of the reference rank by adding ``offset_ns``; with a drift, the offset
    holds at the moment of alignment.

    Attributes:
        reference_rank: the rank whose clock counts.
        offset_ns: reference clock minus this rank's clock; None when the clocks were not aligned.
        uncertainty_ns: half-width of the interval that holds the true offset; None like ``offset_ns``.
        drift_ppm: change of the offset, in microseconds per second; None when it was not measured.
        measured_ns: this rank's time at which ``offset_ns`` holds; None when no drift is to be applied.
        method: ``shared clock`` (one host), ``ping-pong``, or ``none``.
        identity: what names the clock itself; ranks with equal identities read the same clock, also where
            they never talked to each other. None where the system does not provide it.
        reason: why there is no alignment; None when there is one, or none was requested.
        reason_code: its code; None like ``reason``, and in older runs.
        unix_minus_monotonic_ns: what this rank's wall clock was ahead of its monotonic clock when the status
            was written, for other tools' times; None in runs of schema 1.0.
    """

    reference_rank: Count = 0
    offset_ns: _Nanoseconds | None = None
    uncertainty_ns: Annotated[int, Field(ge=0, le=_MOST_NS)] | None = None
    drift_ppm: Annotated[float, Field(ge=-1e6, le=1e6)] | None = None
    measured_ns: _Nanoseconds | None = None
    identity: Text | None = None
    unix_minus_monotonic_ns: Annotated[int, Field(ge=-(1 << 62), le=1 << 62)] | None = None
    method: Literal["shared clock", "ping-pong", "none"]
    reason: Text | None = None
    reason_code: Text | None = None


class FieldCalibration(Record):
    """How one quantity of a device behaved while it was calibrated.

    Attributes:
        update_period_ms: median time between changes of the reading; None when it changed too rarely.
        update_period_low_ms, update_period_high_ms: 5th and 95th percentile of it; None likewise.
        changes: changes seen.
        reason: why there is no period; None when there is one.
    """

    update_period_ms: float | None = None
    update_period_low_ms: float | None = None
    update_period_high_ms: float | None = None
    changes: Count = 0
    reason: Text | None = None


class DeviceCalibration(Record):
    """What the sampler found out about a device before the program began.

    Attributes:
        fields: per quantity (``power_mw``, ``energy_mj``, ...).
        duration_s: how long it was watched.
        idle_power_mw: mean power, if the device said that it was idle all the time; else None.
        idle_reason: why idle power is not known.
        counter_over_integral: energy of the counter over the integral of power in the same time; None when
            either is missing or the time was too short.
        counter_reason: why that is not known.
    """

    fields: dict[str, FieldCalibration] = Field(default_factory=dict)
    duration_s: float
    idle_power_mw: Count | None = None
    idle_reason: Text | None = None
    counter_over_integral: float | None = None
    counter_reason: Text | None = None


class SamplerCost(Record):
    """What sampling cost, and how punctual it was.

    Attributes:
        samples: sampling instants.
        missed: instants that were left out because the one before was late by a period or more.
        cpu_share: processor time of the sampling process, start-up left out; 0.02 is 2 % of a core.
        read_us_p50, read_us_p99: time that one device took to answer; None without samples.
        late_us_p50, late_us_p99: how late an instant was against its schedule; None without samples.
    """

    samples: Count
    missed: Count
    cpu_share: float | None
    read_us_p50: float | None = None
    read_us_p99: float | None = None
    late_us_p50: float | None = None
    late_us_p99: float | None = None


#: ``in time with the sensor``: integrated power of steps that move in time with the sensor of instant power.
EnergyFlag = Literal["in time with the sensor"]


class RankPower(Record):
    """Power sampling as far as one rank is concerned.

    Attributes:
        own_devices: UUIDs of the devices this rank computes on; empty on CPUs, or when not known.
        sampled: devices whose samples lie in this rank's folder: those of its node, in one rank per node.
        period_s: time between samples; None when this rank samples nothing.
        unavailable: per device UUID and quantity, why it is not known.
        calibration: per device UUID.
        cost: of the sampling process; None when it did not end in order.
        notes: devices that were lost, and other limits.
    """

    own_devices: tuple[Text, ...] = ()
    sampled: tuple[DeviceSpec, ...] = ()
    period_s: float | None = None
    unavailable: dict[str, dict[str, Text]] = Field(default_factory=dict)
    calibration: dict[str, DeviceCalibration] = Field(default_factory=dict)
    cost: SamplerCost | None = None
    notes: tuple[Text, ...] = ()


class RankLayer(MoeLayerSpec):
    """One MoE layer as one rank holds it.

    Attributes:
        layer: as for the model; at most 2^31 - 1, the largest number that a routing row can hold.
        router_digests: what the weights of its router are, when the watch began and, if they had changed,
            when it ended; empty where they cannot be read (sharded, packed, or none). Ranks that hold one
            layer have a digest in common, ranks that hold different layers have none.
    """

    layer: Annotated[int, Field(ge=0, lt=2**31)]
    router_digests: Annotated[
        tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")], ...], Field(max_length=2)
    ] = ()


class CaptureGap(Record):
    """Something that one rank did not capture, or not as a whole.

    Attributes:
        code: what happened; ``observatory.run.gaps`` lists the codes and has words for them.
        layer: the MoE layer it is about; None for all of them.
        module: qualified name of the module; None like ``layer``, or where there is none.
        first_step, last_step: the first and the last step it is about.
        steps: how many steps from the first to the last it is about.
        loses_rows: calls that were made are in no row.
    """

    code: Annotated[str, Field(pattern=r"^[a-z_]{1,40}$")]
    layer: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    module: Text | None = None
    first_step: Annotated[int, Field(ge=0, lt=2**62)]
    last_step: Annotated[int, Field(ge=0, lt=2**62)]
    steps: Annotated[int, Field(ge=1, lt=2**62)] = 1
    loses_rows: bool = True


class CapturedSteps(Record):
    """Steps that were captured where not all were to be.

    Attributes:
        first_step: the first of them.
        end_step: the step behind the last; None: until the rank ended.
        every: each so-manieth from the first on; 1 is every step.
    """

    first_step: Annotated[int, Field(ge=0, lt=2**62)]
    end_step: Annotated[int, Field(ge=1, lt=2**62)] | None = None
    every: Annotated[int, Field(ge=1, lt=2**31)] = 1


class StepMark(Record):
    """A moment of the run that a person or a program named.

    Attributes:
        name: the name.
        step: the step that was in progress.
        time_ns: on the rank's own monotonic clock.
        unix_s: wall-clock label.
    """

    name: Annotated[str, Field(min_length=1, max_length=200)]
    step: Annotated[int, Field(ge=0, lt=2**62)]
    time_ns: _Nanoseconds
    unix_s: Moment


class SelfMeasured(Record):
    """What watching cost the program on one rank, as measured by the watch itself.

    Attributes:
        captured_s: time of the capture, pauses left out, seconds.
        steps: steps that ended in it.
        hook_s: estimated host time of hooks in calls of the model and in exchanges; compiled calls have none.
        step_end_s: time that the program's thread waited at ends of steps and phases.
        thread_cpu_s: processor time of the thread that writes rows, until it last flushed.
        bytes_written: bytes of table files, each time that they were written.
    """

    captured_s: _Seconds
    steps: Count
    hook_s: _Seconds
    step_end_s: _Seconds
    thread_cpu_s: _Seconds
    bytes_written: _Bytes

    @property
    def spent_s(self) -> float:
        """Hooks and ends of steps, seconds of the program's own threads."""
        return self.hook_s + self.step_end_s

    @property
    def share(self) -> float | None:
        """Hooks and ends of steps over the captured time; None where nothing was captured."""
        return self.spent_s / self.captured_s if self.captured_s > 0 else None


def _once_each(layers: tuple[RankLayer, ...]) -> tuple[RankLayer, ...]:
    if len({item.layer for item in layers}) < len(layers):
        raise ValueError("states a layer number twice")
    return layers


class RankStatus(Record):
    """How one rank ended.

    Attributes:
        rank: the rank.
        state: ``running`` until it closes its shard; a rank still ``running`` in a finished run died.
        host: host name of the rank.
        error: one line when ``failed``.
        steps: steps the rank completed.
        dropped_rows: rows that could not be written (full disk), 0 normally.
        clock: how this rank's times relate to the other ranks'; None when not requested.
        power: what was sampled of the devices of its node; None when not requested.
        gaps: what it did not capture, or not as a whole; since schema 1.3.
        notes: stated limits of what it captured; since schema 1.3 (earlier ones are in the manifest).
        moe_layers: the MoE layers that this rank holds, each number once; None when it does not say (runs
            before schema 1.2), and in the copy that ``run.json`` keeps.
        cores: cores that it may use; None when it does not say (runs before schema 1.3).
        provenance: where it ran; None when it does not say (runs before schema 1.5). The copy that
            ``run.json`` keeps names the node and states the versions.
        captured: the steps that were captured, where some were left out on purpose; None: all, and in runs
            before schema 1.6. Without an entry none was.
        marks: moments that were named, kept by rank 0; since schema 1.6.
        self_measured: what watching cost; None where it was not measured (runs before schema 1.7, and those
            of other writers).
    """

    rank: Count
    state: Literal["running", "complete", "failed"]
    host: Text | None = None
    error: Text | None = None
    steps: Count = 0
    dropped_rows: Count = 0
    clock: ClockSpec | None = None
    power: RankPower | None = None
    gaps: Annotated[tuple[CaptureGap, ...], Field(max_length=65536)] = ()
    notes: Annotated[tuple[Text, ...], Field(max_length=4096)] = ()
    moe_layers: (
        Annotated[tuple[RankLayer, ...], Field(max_length=16384), AfterValidator(_once_each)] | None
    ) = None
    cores: CoreSpec | None = None
    provenance: RankProvenance | None = None
    captured: Annotated[tuple[CapturedSteps, ...], Field(max_length=65536)] | None = None
    marks: Annotated[tuple[StepMark, ...], Field(max_length=4096)] = ()
    self_measured: SelfMeasured | None = None


class Manifest(Record):
    """``run.json``.

    Attributes:
        schema_version: ``major.minor``; readers refuse a newer major.
        run_id: unique id of the run.
        state: ``running`` until rank 0 closes the run.
        created_unix_s, ended_unix_s: wall-clock labels.
        argv: command line of rank 0.
        config: the options the run was made with.
        git_sha: commit of the working directory, with ``-dirty``; None outside a checkout.
        window_steps: steps folded into one routing row; 1 keeps every step.
        software: package or library name -> version.
        notes: stated limits of the run as a whole; those of what a rank captured are in its status, and in
            runs before schema 1.3 here.
    """

    schema_version: Annotated[str, Field(pattern=r"^\d{1,6}\.\d{1,6}$")] = SCHEMA_VERSION
    run_id: Text
    state: Literal["running", "complete", "failed"] = "running"
    created_unix_s: Moment
    ended_unix_s: Moment | None = None
    argv: tuple[Text, ...] = ()
    config: dict[str, JsonValue] = Field(default_factory=dict)
    git_sha: Text | None = None
    hosts: tuple[HostSpec, ...] = ()
    scheduler: SchedulerJob | None = None
    model: ModelSpec
    data: DataSpec | None = None
    topology: Topology = Topology()
    devices: tuple[DeviceSpec, ...] = ()
    software: dict[str, Text] = Field(default_factory=dict)
    window_steps: _Few = 1
    notes: tuple[Text, ...] = ()
    ranks: tuple[RankStatus, ...] = ()

    @property
    def device_specs(self) -> dict[str, DeviceSpec]:
        """Devices by UUID: those of the first rank's host, and those that were sampled on any node."""
        sampled = [spec for status in self.ranks if status.power for spec in status.power.sampled]
        return {spec.uuid: spec for spec in (*self.devices, *sampled) if spec.uuid is not None}

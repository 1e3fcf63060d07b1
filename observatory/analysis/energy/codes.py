"""Codes of this room: why an energy is missing, what to know of one that is there, where idle power is from.

Values of a reason are named after each code; ``words.py`` makes the sentences.
"""

from __future__ import annotations

from enum import StrEnum


class EnergyCode(StrEnum):
    """Reasons, flags and problems of energies."""

    # A quantity (``quantity``: "instant power" or "energy counter") in a window.
    NO_SAMPLES = "no samples"
    NOT_REPORTED = "not reported"  # quantity
    STARTS_LATE = "samples start late"  # quantity (None: all samples), late_s
    ENDS_EARLY = "samples end early"  # quantity (None: all samples), early_s
    NO_READING = "no reading"  # quantity
    NOT_READ = "not read"  # quantity, gap_s
    NOT_UPDATED = "not updated"  # quantity, gap_s
    TOO_FEW_UPDATES = "too few updates"  # quantity, updates, needed, window_ms, period_ms
    NEVER_CHANGED = "never changed"  # quantity, readings
    FEW_UPDATES_SEEN = "few updates seen"  # quantity, updates, readings
    COUNTER_WENT_BACK = "counter went back"  # before_mj, after_mj
    COUNTER_STALE = "counter stale"  # still_s
    COUNTER_BROKEN = "counter broken"  # power_mw
    AVERAGING_WINDOW_UNKNOWN = "averaging window not known"
    NEITHER_SENSOR = "neither sensor"  # because: of the counter, of power
    NO_WINDOW = "no window"
    SENSORS_DISAGREE = "sensors disagree"  # difference, limit, allowed
    SENSORS_DISAGREE_OFTEN = "sensors disagree often"  # flagged, windows; because: the largest

    # Power of a phase.
    NEVER_ALONE = "never alone"  # shortest_s
    NO_LEAST_SQUARES = "no least squares"  # source; because: why not
    NOT_OBSERVED = "not observed"
    NO_METHOD = "no method"  # because: of each method
    FEW_UPDATES_INSIDE = "few updates inside"  # source, updates, needed
    CONSTANT_MIX = "constant mix"  # condition, highest
    RARE_PHASE = "rare phase"  # source, updates, needed
    NO_POSITIVE_POWER = "no positive power"
    NO_POSITIVE_ENERGY = "no positive energy"
    LAG_NOT_KNOWN = "lag not known"
    UPDATE_TIMES_UNCERTAIN = "update times uncertain"  # error_ms, change
    WIDE_INTERVAL = "wide interval"  # low_mw, high_mw

    # Spans, ranks and devices.
    NO_PHASE_SPANS = "no phase spans"
    PHASES_OVERLAP = "phases overlap"  # rank, phase, step, other_phase, other_step, overlap_ms, more
    UNUSABLE_SPANS = "unusable spans"  # spans
    SPANS_NOT_SEPARABLE = "spans not separable"  # phase, detail
    SHARED_BY_RANKS = "shared by ranks"  # ranks
    RANK_ON_OTHER_NODE = "rank on other node"  # ranks
    PROCESSOR_PACKAGE = "processor package"
    NODE_NOT_KNOWN = "node not known"
    NO_RANK_NAMES_IT = "no rank names it"
    RANK_NOT_KNOWN = "rank not known"  # ranks
    WORKS_FOR_RANK = "works for rank"  # rank
    CLOCKS_NOT_ALIGNED = "clocks not aligned"  # rank, sampler
    NO_PHASES_OF_RANK = "no phases of rank"
    ONE_SAMPLE = "one sample"
    COUNTER_OUT_OF_ORDER = "counter out of order"  # times
    SAMPLED_TWICE = "sampled twice"  # ranks, rank
    REPEATED_TIMES = "repeated times"  # samples
    IMPOSSIBLE_READINGS = "impossible readings"  # readings
    REPLAYED = "replayed"
    NO_ENERGY_GIVEN = "no energy given"  # because
    WHOLE_RUN_ONLY = "whole run only"  # because
    OF_DEVICE = "of a device"  # device; because
    OF_RANK = "of a rank"  # rank; because

    # Energy per token.
    NO_ROUTING_ROWS = "no routing rows"
    NO_BATCH_SIZE = "no batch size"
    NO_SEQUENCE_LENGTH = "no sequence length"
    TOO_MANY_TOKENS = "too many tokens"
    STEPS_WITHOUT_ROWS = "steps without routing rows"  # missing, steps
    NO_TOKENS = "no tokens"
    NOT_SAMPLED = "not sampled"  # device
    NO_DEVICE_SAMPLED = "no device sampled"
    ENERGY_NOT_KNOWN = "energy not known"  # missing, devices; because: of the first
    RANKS_NOT_KNOWN = "ranks not known"  # missing, ranks, rank; because: of that rank
    NO_IDLE_POWER = "no idle power"

    # What a part-time sensor misses of regular steps.
    STEPS_IN_TIME = "steps in time with the sensor"  # error, allowed_for
    PHASE_IN_TIME = "phase in time with the sensor"  # error (None: least squares), allowed_for
    ITERATIONS_IN_TIME = "iterations in time with the sensor"  # error, allowed_for

    # Sources of idle power.
    IDLE_WINDOWS = "idle windows"  # windows, measured_s
    IDLE_BY_LEAST_SQUARES = "idle by least squares"
    IDLE_BY_CALIBRATION = "idle by calibration"
    IDLE_NOT_KNOWN = "idle not known"  # because
    NO_IDLE_WINDOWS = "no idle windows"
    IDLE_WINDOWS_UNMEASURED = "idle windows unmeasured"  # because

    # What an exact hit saves.
    NO_MISS = "no miss"
    NO_EXACT_HIT = "no exact hit"
    MEASURED_ONCE = "measured once"

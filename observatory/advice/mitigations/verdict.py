"""What is said about one change: its time, what it costs, what it rests on, and whether to make it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from observatory.advice.mitigations.change import Change
from observatory.analysis.statistics import Interval
from observatory.reasons import Reason


class Mitigation(StrEnum):
    """Changes that are compared, in the order of the table."""

    TODAY = "today"
    PERFECT_BALANCE = "perfect balance"
    CEILING = "ceiling"
    PLACEMENT = "placement"
    REPLICAS = "replicas"
    WEIGHTED_DISPATCH = "weighted dispatch"
    PER_STEP_DISPATCH = "per-step dispatch"
    ACTIVATED_DISPATCH = "activated dispatch"
    SPILL = "least-loaded spill"
    ROUTE_OR_FETCH = "route or fetch"
    SHARDING = "expert sharding"
    HIERARCHICAL = "hierarchical"
    DEDUPLICATION = "deduplication"
    GATHER = "gather"
    NODE_PLACEMENT = "node placement"
    SAMPLE_PLACEMENT = "sample placement"
    COMBINED = "placement, once per rank"
    FLAT = "flat"
    RANKS = "EP ranks"
    EXPERT_CACHE = "expert cache"
    EXPERT_PREFETCH = "expert prefetch"
    CLOCK_LOCK = "clock lock"


class VerdictCode(StrEnum):
    """What a verdict comes to."""

    #: What the others are compared with, or cannot be better than.
    REFERENCE = "reference"
    #: Faster beyond doubt, and pays for itself within the horizon where its cost is known.
    CHANGE = "change"
    #: Faster beyond doubt, but not within the horizon.
    DOES_NOT_PAY = "does not pay"
    #: The interval of the gain meets zero.
    NO_GAIN = "no gain"
    #: The interval meets zero, but a large gain lies in it as well.
    UNCERTAIN = "uncertain"
    #: Faster, but the network model was measured on other numbers of ranks or nodes.
    EXTRAPOLATED = "extrapolated"
    #: Faster, but today's step took another time than predicted by more than any gain is worth.
    FAR_OFF = "far off"
    #: Slower beyond doubt.
    WORSE = "worse"
    #: Today's set-up does not work without it.
    NEEDED = "needed"
    #: It does not fit into memory.
    DOES_NOT_FIT = "does not fit"
    #: There is nothing that it could change here.
    NOT_APPLICABLE = "not applicable"
    #: What it takes to judge it is missing.
    NOT_KNOWN = "not known"


class MitigationCode(StrEnum):
    """Why there is no number, and premises with what the trace shows about them."""

    # Why there is no verdict.
    NO_TOKENS = "no_token_samples"
    NO_NETWORK = "no_network_model"
    NO_ALGORITHM = "algorithm_not_measured"
    NO_MEMORY = "no_memory_size"
    NO_HOST_RATE = "no_host_rate"
    NO_CLOCKS = "no_clock_model"
    OTHER_PHASES = "clocks_of_other_phases"
    NO_POWER = "no_power"
    POWER_OF_OTHERS = "power_of_other_ranks"
    NO_PROGRAM = "no_program"
    NO_SEQUENCES = "no_sequences"
    ONE_NODE = "one_node"
    IN_USE = "in_use"
    ALL_ACTIVE = "all_experts_active"
    UNEVEN = "uneven"
    ONE_RANK = "one_rank"
    ONE_LAYER = "one_layer"
    ALL_ROUTED = "all_routed"
    NO_MOVE_RATE = "no_move_rate"
    NO_ROOM = "no_room"
    FAR_OFF = "prediction_far_off"
    REPLICATED_TODAY = "replicated_today"
    # How far predictions lie outside what was measured.
    EXPERTS_BEYOND = "experts_beyond"
    # Premises.
    STABLE = "imbalance_is_stable"
    IMBALANCED = "ranks_are_unequal"
    ONE_EXPERT_DECIDES = "one_expert_outweighs_a_rank"
    LOADS_VARY = "loads_vary_between_steps"
    FABRIC_DECIDES = "exchanges_decide"
    BETWEEN_NODES = "bytes_between_nodes"
    FETCH_PAYS = "experts_are_worth_fetching"
    KEPT_TAKE_MORE = "kept_experts_take_more"
    COPIES_SHARE_RANKS = "experts_of_a_token_share_ranks"
    WEIGHTS_DECIDE = "activated_experts_decide"
    CO_ACTIVATION = "experts_are_chosen_together"
    SEQUENCES_DIFFER = "sequences_prefer_ranks"
    EXPERTS_DO_NOT_FIT = "experts_do_not_fit"
    USED_AGAIN = "experts_are_used_again"
    NEXT_PREDICTED = "layers_predict_the_next"
    ENERGY_FALLS = "energy_falls_with_the_clock"
    REAL_TOKENS = "tokens_are_real"


@dataclass(frozen=True, slots=True, kw_only=True)
class Premise:
    """What a change rests on, and whether this trace shows it.

    Attributes:
        reason: the premise with the values that the trace shows.
        holds: whether they do; None where the trace cannot show it.
    """

    reason: Reason
    holds: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertChoice:
    """What to do with one expert instead of sending tokens to it.

    Attributes:
        layer: number of the layer.
        expert: which.
        choice: ``fetch`` its weights in every step, or ``keep`` a copy on every rank.
    """

    layer: int
    expert: int
    choice: Literal["fetch", "keep"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Verdict:
    """One change on one phase of a run.

    Attributes:
        mitigation: which change.
        setting: what of it, such as a number of replicas or ranks; empty where there is one only.
        code: what it comes to.
        step_us: mean time of the MoE part of a held-out step; None where it is not predicted.
        p10_us, p90_us: 10th and 90th percentile over held-out steps.
        parts_us: the same time by part, those that are known: counts, dispatch, experts (of the mean rank),
            waiting (of the mean rank for the busiest), combine, alone (shared experts and local work), extra.
        gain: share of today's time that it removes, on the same steps; its interval covers the steps and the
            error of the models.
        beyond: the same against the simplest change that helps, where this one adds to it (of caches: that
            of the most used experts); None elsewhere. Then ``code`` is about this gain.
        memory_bytes: what a rank needs more; None where it is not known.
        kv_tokens: tokens of context whose cache that memory would hold; None likewise.
        change_us: what the change costs once; None where it is not known.
        break_even_steps: steps after which it has paid; None where it never does, or the cost is not known.
        energy_saving: share of the energy that it saves; None where no energy is known.
        energy_mj: energy of the MoE part of a step, by the power of its phase; None with ``energy_reason``.
        energy_reason: why there is no energy; None for what has no time.
        energy_covered: share of the time of which power is known; None for what has no time.
        slowdown: share of time that it costs, where energy is what it is for; None else.
        premise: what it rests on; None for references.
        grades: what its numbers rest on: measured, fitted, published, assumed; each once.
        extrapolated: share of the predicted exchanges and expert times that lie outside what was measured.
        farthest: how far they lie outside, of each kind of reason the farthest; empty inside.
        reason: why there is no time, or what holds the change up.
        change: what it makes of the set-up; None unless it is worth making.
        experts: which experts to fetch or keep; empty for other changes.
    """

    mitigation: Mitigation
    setting: str = ""
    code: VerdictCode
    step_us: float | None = None
    p10_us: float | None = None
    p90_us: float | None = None
    parts_us: Mapping[str, float] = field(default_factory=dict)
    gain: Interval | None = None
    beyond: Interval | None = None
    memory_bytes: int | None = None
    kv_tokens: float | None = None
    change_us: float | None = None
    break_even_steps: float | None = None
    energy_saving: Interval | None = None
    slowdown: Interval | None = None
    energy_mj: float | None = None
    energy_reason: Reason | None = None
    energy_covered: float | None = None
    premise: Premise | None = None
    grades: tuple[str, ...] = ()
    extrapolated: float | None = None
    farthest: tuple[Reason, ...] = ()
    reason: Reason | None = None
    change: Change | None = None
    experts: tuple[ExpertChoice, ...] = ()

"""Arrow schemas of the tables of a run directory.

Shapes: E experts of the layer, P ranks. A routing part holds rows of one E only: models whose layers
differ in E get separate parts. Columns a reader does not know are carried along.
"""

from __future__ import annotations

import pyarrow as pa

#: Tables of a run, as folder names.
TABLES: tuple[str, ...] = (
    "routing", "exchange", "spans", "power", "tokens", "router_bias", "auxiliary_loss",
)  # fmt: skip


def routing_schema(experts: int, *, gate_mass: bool = False) -> pa.Schema:
    """Schema of a routing part.

    Columns: ``step`` (first step of the row's window), ``window_steps`` (steps folded into the row),
    ``phase``, ``layer``, ``source_rank``, ``tokens``, ``assignments`` (sums over the window),
    ``load`` (E assignments per expert, summed over the window), ``step_load_min`` and ``step_load_max``
    (per-expert extremes over the steps of the window, null when ``window_steps`` is 1),
    ``step_max_over_mean`` (largest per-step max/mean of the window, null when ``window_steps`` is 1),
    optionally ``gate_mass`` (E gate weights, summed), and ``partial`` (true where calls of the window were
    made that are not counted, or ended in the middle; null otherwise).
    """
    load = pa.list_(pa.int64(), experts)
    fields = [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("window_steps", pa.int32(), nullable=False),
        pa.field("phase", pa.string(), nullable=False),
        pa.field("layer", pa.int32(), nullable=False),
        pa.field("source_rank", pa.int32(), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False),
        pa.field("assignments", pa.int64(), nullable=False),
        pa.field("load", load, nullable=False),
        pa.field("step_load_min", load),
        pa.field("step_load_max", load),
        pa.field("step_max_over_mean", pa.float64()),
    ]
    if gate_mass:
        fields.append(pa.field("gate_mass", pa.list_(pa.float64(), experts)))
    fields.append(pa.field("partial", pa.bool_()))
    return pa.schema(fields)


#: One row per collective on one rank; times of its own clock, which its status relates to the others'.
#: ``blocking``: the program went on when it was over. ``backend_group`` and ``backend_sequence``: torch's
#: name of the group, and the backend's own number of the collective in it. ``recorder_...``: what torch's
#: flight recorder says of it, and why it does not say more.
EXCHANGE_SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("phase", pa.string(), nullable=False),
        pa.field("layer", pa.int32()),
        pa.field("source_rank", pa.int32(), nullable=False),
        pa.field("role", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("sequence", pa.int64(), nullable=False),
        pa.field("algorithm", pa.string()),
        pa.field("backend", pa.string()),
        pa.field("start_ns", pa.int64(), nullable=False),
        pa.field("end_ns", pa.int64()),
        pa.field("send_bytes", pa.list_(pa.int64())),
        pa.field("receive_bytes", pa.list_(pa.int64())),
        pa.field("blocking", pa.bool_()),
        pa.field("backend_group", pa.string()),
        pa.field("backend_sequence", pa.int64()),
        pa.field("recorder_start_ns", pa.int64()),
        pa.field("recorder_duration_ns", pa.int64()),
        pa.field("recorder_problem", pa.string()),
    ]
)

#: Phases of the program on one rank.
SPAN_SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("phase", pa.string(), nullable=False),
        pa.field("layer", pa.int32()),
        pa.field("source_rank", pa.int32(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("start_ns", pa.int64(), nullable=False),
        pa.field("end_ns", pa.int64()),
    ]
)

#: Telemetry samples; every reading is null where the device does not give it.
POWER_SCHEMA = pa.schema(
    [
        pa.field("time_ns", pa.int64(), nullable=False),
        pa.field("device_uuid", pa.string(), nullable=False),
        pa.field("power_mw", pa.int64()),
        pa.field("energy_mj", pa.int64()),
        pa.field("sm_clock_mhz", pa.int32()),
        pa.field("memory_clock_mhz", pa.int32()),
        pa.field("temperature_c", pa.int32()),
        pa.field("event_reasons", pa.int64()),
        pa.field("enforced_limit_mw", pa.int64()),
        pa.field("average_power_mw", pa.int64()),
        pa.field("memory_temperature_c", pa.int32()),
        pa.field("power_cap_ns", pa.int64()),
        pa.field("thermal_ns", pa.int64()),
        pa.field("read_ns", pa.int64()),
        pa.field("late_ns", pa.int64()),
    ]
)

#: Sampled routing decisions: expert ids of one token of one layer, in position order, never token ids.
TOKENS_SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("phase", pa.string(), nullable=False),
        pa.field("layer", pa.int32(), nullable=False),
        pa.field("source_rank", pa.int32(), nullable=False),
        pa.field("position", pa.int64(), nullable=False),
        pa.field("expert_ids", pa.list_(pa.int32()), nullable=False),
    ]
)

#: Correction biases of routers, one value per expert (and null expert): a row for the first values that a
#: rank reads of a layer, and one for each change. ``step``: the first step after the values were read.
ROUTER_BIAS_SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("layer", pa.int32(), nullable=False),
        pa.field("source_rank", pa.int32(), nullable=False),
        pa.field("bias", pa.list_(pa.float64()), nullable=False),
    ]
)

#: Auxiliary losses as the model states them: the mean over its calls of one step and phase on one rank; null
#: where it is not finite.
AUXILIARY_LOSS_SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("phase", pa.string(), nullable=False),
        pa.field("source_rank", pa.int32(), nullable=False),
        pa.field("value", pa.float64()),
        pa.field("calls", pa.int32(), nullable=False),
    ]
)

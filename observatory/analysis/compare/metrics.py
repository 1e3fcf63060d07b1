"""What is compared: names, units and meaning of the quantities of a run."""

from __future__ import annotations

from dataclasses import dataclass

from observatory.run.manifest import PHASES


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One quantity.

    Attributes:
        name: as it is written behind the phase: ``decode.ms``.
        title: what it is, in a few words.
        unit: of its values.
        of_layers: it is known of single layers.
        by_experts: it depends on the number of experts, and says nothing of layers with another number.
        is_time: it depends on the machine and what else ran there.
    """

    name: str
    title: str
    unit: str = ""
    of_layers: bool = False
    by_experts: bool = False
    is_time: bool = False


_ALL = (
    Metric(name="ms", title="time of a step", unit="ms", is_time=True),
    Metric(name="ms_per_token", title="time per token of a sequence", unit="ms", is_time=True),
    Metric(name="tokens_per_s", title="tokens a second", unit="tokens/s", is_time=True),
    Metric(name="exchange_ms", title="in exchanges, mean rank", unit="ms", of_layers=True, is_time=True),
    Metric(name="wait_ms", title="of it waiting", unit="ms", of_layers=True, is_time=True),
    Metric(name="gini", title="Gini of expert loads", of_layers=True),
    Metric(name="rank_max_over_mean", title="busiest rank / mean", of_layers=True),
    Metric(name="activated_experts", title="activated experts", of_layers=True, by_experts=True),
    Metric(name="entropy_bits", title="entropy of loads", unit="bits", of_layers=True, by_experts=True),
    Metric(name="dead_experts", title="experts without a token", of_layers=True, by_experts=True),
    Metric(name="expert_drift", title="assignments that moved to other experts", of_layers=True),
    Metric(name="router_bias", title="range of the router's correction bias", of_layers=True),
    Metric(name="mj_per_token", title="energy", unit="mJ/token", is_time=True),
    Metric(name="power_w", title="power", unit="W", is_time=True),
    Metric(name="clock_mhz", title="SM clock", unit="MHz", is_time=True),
)
METRICS = {metric.name: metric for metric in _ALL}


@dataclass(frozen=True, slots=True, order=True)
class Key:
    """Where a value belongs.

    Attributes:
        metric: a name of `METRICS`.
        phase: of the steps.
        layer: place of the MoE layer in the model, from 0; None for all, or where layers do not matter.
        ep: EP degree that the value is about; None for those that are about none.
    """

    metric: str
    phase: str
    layer: int | None = None
    ep: int | None = None

    @property
    def name(self) -> str:
        """As in a threshold: ``decode.ms``."""
        return f"{self.phase}.{self.metric}"


#: Of a series alone: a distance to the first run, and what training moves in every step.
_OF_SERIES = ("expert_drift", "router_bias")


def metric_names() -> list[str]:
    """Every name that a threshold may have."""
    return [f"{phase}.{name}" for phase in PHASES for name in METRICS if name not in _OF_SERIES]


def sort_key(key: Key) -> tuple[int, int, int, int]:
    """Order of rows: by phase, then as the metrics are listed."""
    metrics = list(METRICS)
    return (
        PHASES.index(key.phase),
        metrics.index(key.metric),
        -1 if key.ep is None else key.ep,
        -1 if key.layer is None else key.layer,
    )

"""What a run does now, for monitoring: Prometheus' text format, and the line protocol of ClusterCockpit.

Line protocol: interfaces/lineprotocol of https://github.com/ClusterCockpit/cc-specifications: a value on each
line, tags ``hostname``, ``type``, ``type-id``, ``stype`` and ``stype-id``, the time in seconds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from observatory.analysis.live import LiveRank, LiveView
from observatory.devices.event_reasons import reason_bits, reason_name

if TYPE_CHECKING:
    from prometheus_client import Metric

_PREFIX = "observatory_"
#: Metrics with what they are, as docs/run.md lists them.
HELP: Mapping[str, str] = {
    "up": "1 where the run directory can be read",
    "run_is_running": "1 while the run is captured, 0 once it has ended",
    "last_step": "Number of the last captured step",
    "steps_per_second": "Steps over the time from the start of the first to the end of the last",
    "step_seconds": "Median time of a step on the rank that takes longest",
    "tokens_per_second": "Tokens of all ranks over the time of their steps",
    "expert_max_over_mean": "Load of the busiest expert over the mean",
    "expert_max_over_mean_floor": "The same under uniform routing of as many tokens",
    "rank_max_over_mean": "Load of the busiest rank of experts over the mean",
    "exchange_share": "Time of a rank in exchanges over the time of its steps",
    "waiting_share": "Time that a rank waits in exchanges over the time of its steps",
    "caused_waiting_share": "Share of all waiting that is for this rank",
    "seconds_since_write": "Since the newest file of a rank was written",
    "power_watts": "Power that a device reports",
    "sm_clock_hertz": "SM clock that a device reports",
    "temperature_celsius": "Temperature that a device reports",
    "clock_held": "1 for each reason that a device reports for its clock",
}
_NOT_IN_A_TAG = re.compile(r"[^A-Za-z0-9_.:/-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One value.

    Attributes:
        name: a key of `HELP`.
        value: in the unit of the name.
        labels: ``phase``, ``layer``, ``rank``, ``device``, ``reason``, as far as the value is about one.
        host: where it was measured; None where no single host did.
    """

    name: str
    value: float
    labels: Mapping[str, str] = field(default_factory=dict)
    host: str | None = None


def live_samples(view: LiveView) -> Iterator[Sample]:
    """All values of a run that are known now."""
    host = next((rank.host for rank in view.ranks if rank.host is not None), None)
    yield Sample(name="up", value=1, host=host)
    yield Sample(name="run_is_running", value=view.state == "running", host=host)
    for phase in view.phases:
        values = {
            "last_step": phase.last_step,
            "steps_per_second": phase.steps_per_s,
            "step_seconds": None if phase.ms is None else phase.ms / 1e3,
            "tokens_per_second": phase.tokens_per_s,
        }
        yield from _known(values, {"phase": phase.phase}, host)
    for layer in view.layers:
        values = {
            "expert_max_over_mean": layer.expert_max_over_mean,
            "expert_max_over_mean_floor": layer.floor,
            "rank_max_over_mean": layer.rank_max_over_mean,
        }
        yield from _known(values, {"phase": layer.phase, "layer": str(layer.layer)}, host)
    for rank in view.ranks:
        yield from _of_rank(rank)


def _of_rank(rank: LiveRank) -> Iterator[Sample]:
    labels = {"rank": str(rank.rank)}
    values = {
        "exchange_share": rank.exchange_share,
        "waiting_share": rank.waiting_share,
        "caused_waiting_share": rank.caused_share,
        "seconds_since_write": rank.silent_s,
    }
    yield from _known(values, labels, rank.host)
    for device in rank.devices:
        of_device = {**labels, "device": device.uuid}
        values = {
            "power_watts": device.power_w,
            "sm_clock_hertz": None if device.sm_clock_mhz is None else device.sm_clock_mhz * 1e6,
            "temperature_celsius": device.temperature_c,
        }
        yield from _known(values, of_device, rank.host)
        for bit in reason_bits(device.event_reasons or 0):
            yield Sample(
                name="clock_held", value=1, labels={**of_device, "reason": reason_name(bit)}, host=rank.host
            )


def _known(
    values: Mapping[str, float | None], labels: Mapping[str, str], host: str | None
) -> Iterator[Sample]:
    for name, value in values.items():
        if value is not None:
            yield Sample(name=name, value=value, labels=labels, host=host)


class RunCollector:
    """What `prometheus_client` asks at each scrape.

    Args:
        latest: the run as it was seen last; None where it could not be read, which is ``up`` 0.
        run: value of the label ``run``.
    """

    def __init__(self, latest: Callable[[], LiveView | None], run: str) -> None:
        self._latest = latest
        self._run = run

    def collect(self) -> Iterator[Metric]:
        """All metrics of the run."""
        from prometheus_client.core import GaugeMetricFamily

        view = self._latest()
        families: dict[str, GaugeMetricFamily] = {}
        for sample in [Sample(name="up", value=0)] if view is None else live_samples(view):
            if sample.name not in families:
                names = ["run", *sample.labels]
                families[sample.name] = GaugeMetricFamily(
                    f"{_PREFIX}{sample.name}", HELP[sample.name], labels=names
                )
            families[sample.name].add_metric([self._run, *sample.labels.values()], float(sample.value))
        yield from families.values()


def line_protocol(samples: Iterable[Sample], *, run: str, unix_s: int) -> str:
    """Values as ClusterCockpit takes them, a line each.

    A device is an ``accelerator`` with its id; what else a value is about stands in ``stype`` and
    ``stype-id``, joined by dashes (``stype=phase-layer,stype-id=prefill-3``). Characters that tags do not
    take become an underscore.
    """
    lines = []
    for sample in samples:
        labels = dict(sample.labels)
        device = labels.pop("device", None)
        tags = {
            "hostname": sample.host or "unknown",
            "type": "node" if device is None else "accelerator",
            "type-id": "0" if device is None else device,
            "stype": "-".join(["run", *labels]),
            "stype-id": "-".join([run, *labels.values()]),
        }
        shown = ",".join(f"{key}={_NOT_IN_A_TAG.sub('_', value)}" for key, value in tags.items())
        lines.append(f"{_PREFIX}{sample.name},{shown} value={float(sample.value):.9g} {unix_s}\n")
    return "".join(lines)

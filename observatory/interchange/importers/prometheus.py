"""DCGM exporter: metrics of GPUs in Prometheus' text format, with times.

A scrape has no times; what a server exports does, as milliseconds of Unix time behind each value. What the
exporter does not know is a number near 2^63 (blank, not found, not supported, not permitted).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client.parser import text_string_to_metric_families

from observatory.interchange.importers.imported import ImportedRun, ImportOptions, Rows
from observatory.interchange.importers.sources import Source
from observatory.interchange.importers.telemetry import Telemetry, telemetry_run
from observatory.run.bounded import first_problem
from observatory.run.manifest import RankPower

_METRICS = {
    "DCGM_FI_DEV_POWER_USAGE": ("average_power_mw", 1e3),
    "DCGM_FI_DEV_POWER_USAGE_INSTANT": ("power_mw", 1e3),
    "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION": ("energy_mj", 1.0),
    "DCGM_FI_DEV_SM_CLOCK": ("sm_clock_mhz", 1.0),
    "DCGM_FI_DEV_MEM_CLOCK": ("memory_clock_mhz", 1.0),
    "DCGM_FI_DEV_GPU_TEMP": ("temperature_c", 1.0),
    "DCGM_FI_DEV_MEMORY_TEMP": ("memory_temperature_c", 1.0),
    "DCGM_FI_DEV_ENFORCED_POWER_LIMIT": ("enforced_limit_mw", 1e3),
    "DCGM_FI_DEV_CLOCK_THROTTLE_REASONS": ("event_reasons", 1.0),
    "DCGM_FI_DEV_CLOCKS_EVENT_REASONS": ("event_reasons", 1.0),
}
#: DCGM's integers from here on say why there is no value.
_BLANK = float(0x7FFFFFFFFFFFFFF0)


def recognises(head: bytes) -> bool:
    """Whether a file begins like one of this format."""
    return b"DCGM_FI_" in head and (b"# TYPE DCGM_FI_" in head or b"{" in head)


def read(sources: Sequence[Source], options: ImportOptions) -> ImportedRun:
    """Samples of GPUs.

    Raises:
        InterchangeError: a file is none of this format, or states no times.
    """
    notes = ["DCGM_FI_DEV_POWER_USAGE is taken as an average, of a time that is not stated"]
    power: dict[int, RankPower] = {}
    rows = _rows(sources, power, notes)
    return telemetry_run(sources, options, rows, power=power, notes=notes)


def _rows(sources: Sequence[Source], power: dict[int, RankPower], notes: list[str]) -> Iterator[Rows]:
    telemetry = Telemetry(source=sources[0], kind="nvidia")
    for source in sources:
        telemetry.source = source
        for time_ns, name, column, value, labels in sorted(_values(source), key=lambda item: item[:2]):
            telemetry.add(
                name, time_ns, {column: value}, name=labels.get("modelName"), bus_id=labels.get("pci_bus_id")
            )
            yield from telemetry.take()
    yield from telemetry.take(all_of_them=True)
    telemetry.finish(power, notes)


def _values(source: Source) -> Iterator[tuple[int, str, str, float | None, dict[str, str]]]:
    try:
        for family in text_string_to_metric_families(source.text()):
            for sample in family.samples:
                metric = sample.name.removesuffix("_total")  # as the parser ends the names of counters
                if metric not in _METRICS:
                    continue
                if sample.timestamp is None:
                    raise source.refused(
                        "states no times of its values: one scrape of an exporter",
                        expected="values with times, as a Prometheus server exports them",
                    )
                column, factor = _METRICS[metric]
                value = float(sample.value)
                name = sample.labels.get("UUID") or sample.labels.get("gpu") or "gpu"
                time_ns = round(float(sample.timestamp) * 1000) * 10**6
                yield time_ns, name, column, None if value >= _BLANK else value * factor, sample.labels
    except (ValueError, OverflowError, IndexError, KeyError, TypeError) as error:
        raise source.refused(f"is no text of Prometheus ({first_problem(error)})") from error

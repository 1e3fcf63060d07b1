"""Tables of clock sweeps, of clock models, and of what telemetry alone shows."""

from __future__ import annotations

from observatory.analysis.columns import Column, Table, short_names
from observatory.analysis.frequency.model_file import ClockEstimate, ClockModel
from observatory.analysis.frequency.telemetry_records import Readings, TelemetryAdvice
from observatory.run.documents.clock_sweep import ClockSweep

_SERIES = Column(name="series", title="series", text=True, key=True)

#: Of `sweep_table`.
POINT_COLUMNS = (
    _SERIES,
    Column(name="batch_size", title="batch", key=True),
    Column(name="requested_sm_clock_mhz", title="locked", unit="MHz", otherwise="-"),
    Column(name="requested_limit_mw", title="limit", unit="W", scale=1e-3, digits=0, otherwise="-"),
    Column(name="repeat", title="repeat", wide=True),
    Column(name="sm_clock_mhz", title="sampled", unit="MHz", digits=0),
    Column(name="iteration_s", title="iteration", unit="ms", scale=1e3),
    Column(name="energy_per_iteration_mj", title="energy", unit="mJ", legend="of one iteration"),
    Column(name="label", title="label", text=True),
)

#: Of `model_table`.
SERIES_COLUMNS = (
    _SERIES,
    Column(name="clocks", title="clocks", wide=True),
    Column(name="points", title="points", wide=True),
    Column(
        name="time_scatter",
        title="time scatter",
        unit="%",
        digits=2,
        legend="standard deviation of repeats",
    ),
    Column(name="energy_scatter", title="energy scatter", unit="%", digits=2),
    Column(name="critical", title="f_crit", unit="MHz", legend="below it the iteration takes longer"),
    Column(name="optimum", title="optimum", unit="MHz", legend="measured clock of least energy"),
)

#: Of `telemetry_table`.
TELEMETRY_COLUMNS = (
    Column(name="label", title="device", text=True, key=True),
    Column(name="phase", title="phase", text=True, key=True, otherwise="all"),
    Column(name="samples", title="samples", wide=True),
    Column(name="power_median_mw", title="power", unit="W", scale=1e-3, digits=0),
    Column(
        name="power_over_limit",
        title="p95 / limit",
        unit="%",
        digits=0,
        legend="95 % of power over the limit",
    ),
    Column(
        name="power_cap_share",
        title="capped",
        unit="%",
        digits=1,
        legend="share of time in which the limit holds the clock down",
    ),
    Column(name="power_cap_busy_share", title="of busy", unit="%", digits=1, wide=True),
    Column(name="idle_share", title="idle", unit="%", digits=0),
    Column(name="sm_clock_mhz", title="clock", unit="MHz", digits=0),
    Column(name="busy_sm_clock_mhz", title="busy clock", unit="MHz", digits=0),
    Column(name="capped_sm_clock_mhz", title="capped clock", unit="MHz", digits=0, wide=True),
)


def sweep_table(sweep: ClockSweep) -> Table:
    """Every point of a sweep, by series, limit and clock."""
    rows = [
        {
            "series": series.name,
            "batch_size": series.batch_size,
            "requested_sm_clock_mhz": point.requested_sm_clock_mhz,
            "requested_limit_mw": point.requested_limit_mw,
            "repeat": point.repeat,
            "sm_clock_mhz": point.sm_clock_mhz,
            "iteration_s": point.iteration_s,
            "energy_per_iteration_mj": (
                None if point.energy_mj is None else point.energy_mj / point.iterations
            ),
            "label": point.label,
            "reason": point.reason,
        }
        for series in sweep.series
        for point in sorted(
            series.points, key=lambda p: (p.requested_limit_mw or 0, p.requested_sm_clock_mhz or 0, p.repeat)
        )
    ]
    return Table(name="points", columns=POINT_COLUMNS, rows=rows, title="clock sweep, per iteration")


def model_table(model: ClockModel) -> Table:
    """One row per series of a clock model."""
    rows = [
        {
            "series": series.title,
            "clocks": len(series.clock_mhz_K),
            "points": series.points,
            "time_scatter": series.time_scatter,
            "energy_scatter": series.energy_scatter,
            "no_power": series.no_power or None,
            "critical": _estimate(series.critical),
            "optimum": _estimate(series.optimum),
        }
        for series in model.series
    ]
    title = f"{model.device.name or 'device'}: time and energy against the clock"
    return Table(name="series", columns=SERIES_COLUMNS, rows=rows, title=title)


def telemetry_table(telemetry: TelemetryAdvice) -> Table:
    """One row per device and phase."""
    short = short_names([device.device_uuid for device in telemetry.devices])
    rows = [
        {
            **device.model_dump(mode="json", exclude={"states", "missing", "findings", "finding_codes"}),
            "label": short[device.device_uuid],
            "busy_sm_clock_mhz": _clock(device.in_state("busy")),
            "capped_sm_clock_mhz": _clock(device.in_state("power cap")),
        }
        for device in telemetry.devices
    ]
    title = f"{telemetry.run}: what telemetry alone shows"
    return Table(name="telemetry", columns=TELEMETRY_COLUMNS, rows=rows, title=title)


def _estimate(estimate: ClockEstimate) -> str | None:
    """A clock with its relation and interval, such as ``at most 780 (720-840)``."""
    if estimate.mhz is None:
        return None
    words = "" if estimate.relation == "at" else f"{estimate.relation} "
    if estimate.low_mhz is None or estimate.high_mhz in (None, estimate.low_mhz):
        return f"{words}{estimate.mhz:.0f}"
    return f"{words}{estimate.mhz:.0f} ({estimate.low_mhz:.0f}-{estimate.high_mhz:.0f})"


def _clock(readings: Readings | None) -> float | None:
    return None if readings is None else readings.sm_clock_mhz

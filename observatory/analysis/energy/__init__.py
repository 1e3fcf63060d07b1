"""Energy of a run: of windows, of phases, per token, of a cache hit; with its error, or why it is missing."""

from observatory.analysis.energy.attribution import Attribution, PhasePower, attribute, idle_power
from observatory.analysis.energy.prefix_cache import ReuseFit, fit_reuse
from observatory.analysis.energy.run_energy import EnergySummary, energy_summary
from observatory.analysis.energy.timeline import Timeline, make_timeline
from observatory.analysis.energy.traces import PowerTrace, trace_of_frame, trace_of_readings
from observatory.analysis.energy.windows import WindowEnergy, energy_of_window
from observatory.analysis.energy.words import reason_words, reasons_words
from observatory.devices.aliasing import missed_error, rhythm_of
from observatory.devices.sensors import CALIBRATION_ERROR, SensorModel, sensor_of

__all__ = [
    "CALIBRATION_ERROR",
    "Attribution",
    "EnergySummary",
    "PhasePower",
    "PowerTrace",
    "ReuseFit",
    "SensorModel",
    "Timeline",
    "WindowEnergy",
    "attribute",
    "energy_of_window",
    "energy_summary",
    "fit_reuse",
    "idle_power",
    "make_timeline",
    "missed_error",
    "reason_words",
    "reasons_words",
    "rhythm_of",
    "sensor_of",
    "trace_of_frame",
    "trace_of_readings",
]

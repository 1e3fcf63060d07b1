"""Energy of a run: of windows, of phases, per token, of a cache hit; with its error, or why it is missing."""

from observatory.energy.aliasing import find_aliasing, phase_shifts_ms, predicted_error, rhythm_of
from observatory.energy.attribution import Attribution, PhasePower, attribute, idle_power
from observatory.energy.reuse import ReuseFit, fit_reuse
from observatory.energy.sensors import CALIBRATION_ERROR, SensorModel, sensor_of
from observatory.energy.summary import EnergySummary, energy_summary
from observatory.energy.timeline import Timeline, make_timeline
from observatory.energy.traces import PowerTrace, trace_of_frame, trace_of_readings
from observatory.energy.windows import WindowEnergy, energy_of_window

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
    "find_aliasing",
    "fit_reuse",
    "idle_power",
    "make_timeline",
    "phase_shifts_ms",
    "predicted_error",
    "rhythm_of",
    "sensor_of",
    "trace_of_frame",
    "trace_of_readings",
]

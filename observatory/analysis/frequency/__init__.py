"""Time and energy against the SM clock: measured settings, and a model fitted to them."""

from observatory.analysis.frequency.fitting import fit_clocks
from observatory.analysis.frequency.records import ClockModel, load_clock_model

__all__ = ["ClockModel", "fit_clocks", "load_clock_model"]

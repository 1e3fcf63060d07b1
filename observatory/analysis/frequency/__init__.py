"""Time and energy against the SM clock: measured settings, and a model fitted to them."""

from observatory.analysis.frequency.model_file import ClockModel, load_clock_model
from observatory.analysis.frequency.model_fit import fit_clocks

__all__ = ["ClockModel", "fit_clocks", "load_clock_model"]

"""The clock model: time and energy against the SM clock, fitted to sweeps, and advice from it."""

from observatory.cost.clocks.fitting import fit_clocks
from observatory.cost.clocks.recommending import ClockAdvice, recommend_clocks
from observatory.cost.clocks.records import ClockModel, load_clock_model

__all__ = ["ClockAdvice", "ClockModel", "fit_clocks", "load_clock_model", "recommend_clocks"]

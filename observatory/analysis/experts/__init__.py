"""Time of experts and of whole layer-steps."""

from observatory.analysis.experts.cost import ExpertCost, fit_experts, of_hardware
from observatory.analysis.experts.step_energy import StepEnergy, step_energy
from observatory.analysis.experts.step_time import StepTimes, layer_step_times

__all__ = [
    "ExpertCost",
    "StepEnergy",
    "StepTimes",
    "fit_experts",
    "layer_step_times",
    "of_hardware",
    "step_energy",
]

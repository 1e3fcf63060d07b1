"""Published figures of devices, each with its unit, source and date."""

from observatory.analysis.hardware.profiles import HardwareProfile, Rate, load_profile, profile_names

__all__ = ["HardwareProfile", "Rate", "load_profile", "profile_names"]

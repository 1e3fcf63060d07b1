"""Published figures of devices, each with its unit, source and date."""

from observatory.analysis.hardware.profiles import (
    Figure,
    HardwareProfile,
    Quantity,
    Rate,
    load_profile,
    profile_names,
)

__all__ = ["Figure", "HardwareProfile", "Quantity", "Rate", "load_profile", "profile_names"]

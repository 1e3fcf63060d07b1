"""Devices that report power, energy and clocks; nothing here changes them."""

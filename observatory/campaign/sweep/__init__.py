"""Sweeps over SM clocks and power limits: plan, lock, measure, keep."""

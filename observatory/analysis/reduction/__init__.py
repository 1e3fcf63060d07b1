"""Metrics of runs from partial results that merge exactly, whatever their order."""

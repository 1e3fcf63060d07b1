"""Probes that watch a running model: routing now, exchanges, phases and power beside it."""

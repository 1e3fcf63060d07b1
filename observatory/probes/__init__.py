"""Probes that watch a running model: its routing, exchanges, phases and power."""

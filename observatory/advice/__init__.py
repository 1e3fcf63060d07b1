"""Decisions from what analysis found, each with its effect and its evidence."""

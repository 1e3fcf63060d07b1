"""Capacity: memory and time of serving a model on devices that are described, not held."""

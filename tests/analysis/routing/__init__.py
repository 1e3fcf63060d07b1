"""Imbalance metrics, against hand-computed tables, properties and simulation."""

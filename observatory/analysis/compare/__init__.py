"""Runs against each other: what changed beyond noise, and what else differs."""

"""Serving engines, whose processes a plugin of ours is loaded into; one module for each part of an engine."""

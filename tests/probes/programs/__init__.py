"""Watching programs that do not call us."""

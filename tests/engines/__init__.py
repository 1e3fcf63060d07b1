"""Serving engines, started for real; ``make test-engines`` installs them into an environment of their own."""

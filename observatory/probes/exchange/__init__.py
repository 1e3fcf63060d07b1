"""Exchanges of a running program: every all-to-all timed, with the bytes of each peer."""

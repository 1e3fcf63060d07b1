"""Measurements of exchanges: patterns of traffic, point-to-point links, replays of captured traffic."""

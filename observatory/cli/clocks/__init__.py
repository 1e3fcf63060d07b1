"""``observatory clocks``: which clock, and what it costs. Each command stands in a file of its own."""

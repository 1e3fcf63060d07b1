"""Rules that a run must keep: their file, what they are judged by, the result."""

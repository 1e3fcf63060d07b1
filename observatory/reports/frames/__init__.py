"""Tidy frames of runs, benchmarks and models, from which figures and sections are drawn."""

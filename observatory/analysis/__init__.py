"""Answers from a run directory, without torch, MPI or a device."""

"""The machine and the process: ranks, provenance, child processes, what works here."""

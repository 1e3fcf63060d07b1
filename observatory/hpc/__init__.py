"""Batch jobs, launchers and the provenance of a run's environment."""

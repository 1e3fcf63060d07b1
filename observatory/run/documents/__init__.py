"""Documents with a version and a provenance: benchmarks, clock sweeps, prefix-cache measurements."""

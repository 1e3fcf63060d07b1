"""The public Python API: open a run and analyse it, watch a model."""

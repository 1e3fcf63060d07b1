"""What each known change of an expert-parallel set-up would do to a captured run, on one trace."""

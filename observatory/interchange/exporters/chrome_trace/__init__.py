"""A run as a chrome trace."""

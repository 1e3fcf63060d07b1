"""Where the ranks of a run ran, node by node, and what of it differs where it should not."""

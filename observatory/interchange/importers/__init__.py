"""Files of other tools as runs and measurements of ours."""

"""How long the steps of a run take, and how many tokens they have."""

from __future__ import annotations

import numpy as np
import pandas as pd

from observatory.run import Run


def step_times(run: Run) -> pd.DataFrame:
    """Time of each step, of the rank that takes longest, from the spans of phases.

    Returns:
        One row per phase and step, in this order: ``phase``, ``step``, ``ms`` (> 0), ``tokens`` (of all
        ranks, of all phases where the step's is ``mixed``; NaN where rows of routing fold several steps).
        Empty where no step was timed.
    """
    spans = run.spans()
    spans = spans[(spans["name"] == "phase") & spans["end_ns"].notna()]
    lasted = (spans["end_ns"].astype("int64") - spans["start_ns"].astype("int64")) * 1e-6
    per_rank = lasted.groupby([spans["phase"], spans["step"], spans["source_rank"]]).sum()
    longest = per_rank.groupby(level=[0, 1]).max()
    steps = longest[longest > 0].rename("ms").rename_axis(["phase", "step"]).reset_index()
    routed = run.routed_tokens()
    if (routed["window_steps"] > 1).any():
        return steps.assign(tokens=np.nan)
    of_all = routed.assign(phase="mixed").astype({"phase": routed["phase"].dtype})
    tokens = pd.concat([routed, of_all]).groupby(["phase", "step"])["tokens"].sum()
    keys = pd.MultiIndex.from_frame(steps[["phase", "step"]])
    return steps.assign(tokens=tokens.reindex(keys).to_numpy(np.float64))

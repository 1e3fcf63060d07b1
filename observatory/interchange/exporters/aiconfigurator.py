"""The skew of expert loads as aiconfigurator and AISimulate name it: one exponent.

Their models hold one ``power_law_ALPHA`` for all layers and batches of a family [aiconfigurator 0.12,
``sdk/models/helpers.py``: 1.2, or 1.01 for DeepSeek's]; no file of theirs takes loads. The document says
which exponent the loads of a run have, by layer and phase, and which of theirs comes nearest.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from observatory.analysis.parallel.step_loads import StepLoads, step_loads
from observatory.analysis.routing.power_law import PowerLawFit, fit_power_law
from observatory.errors import RunError
from observatory.run import Run

#: Steps that are fitted, evenly spread.
_MOST_STEPS = 64


def alpha_document(run: Run, *, phase: str | None = None) -> dict[str, Any]:
    """The exponents of a run.

    Returns:
        ``format``, ``run_id``, ``model``, ``experts``, ``top_k``, and ``rows``, of each phase first all
        layers (``layer`` null), then each: ``phase``, ``layer`` and the attributes of `PowerLawFit`, with
        ``nearest`` by its name there.

    Raises:
        PlacementError: rows fold several steps, or no step is whole.
        RunError: how many experts a token has is not known.
    """
    loads = step_loads(run, phase=phase)
    if loads.top_k is None:
        raise RunError(f"run {run.path} does not say how many experts a token has, or layers differ in it")
    rows = [row for name in loads.phases for row in _of_phase(loads.of_phase(name), name, loads.top_k)]
    return {
        "format": "power-law-alpha",
        "run_id": run.manifest.run_id,
        "model": run.manifest.model.name,
        "experts": int(loads.load_SLE.shape[2]),
        "top_k": loads.top_k,
        "rows": rows,
    }


def _of_phase(loads: StepLoads, phase: str, top_k: int) -> list[dict[str, Any]]:
    steps = len(loads.load_SLE)
    at = np.unique(np.linspace(0, steps - 1, min(steps, _MOST_STEPS)).round().astype(int))
    load_SLE = loads.load_SLE[at]
    fits: list[tuple[int | None, PowerLawFit | None]] = [
        (None, fit_power_law(load_SLE.reshape(-1, load_SLE.shape[2]), top_k=top_k))
    ]
    fits += [
        (layer, fit_power_law(load_SLE[:, place], top_k=top_k)) for place, layer in enumerate(loads.layers)
    ]
    return [
        {
            "phase": phase,
            "layer": layer,
            "alpha": fit.alpha,
            "nearest": f"power_law_{fit.nearest}" if fit.nearest else "balanced",
            "misplaced_share": fit.misplaced_share,
            "balanced_misplaced_share": fit.balanced_misplaced_share,
            "tokens": fit.tokens,
            "steps": fit.steps,
        }
        for layer, fit in fits
        if fit is not None
    ]

"""Predicted dispatch and combine times for the rows of an EP scan, for degrees that were never run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from observatory.analysis.network.network import NetworkModel
from observatory.analysis.network.predict import Prediction, predict_us
from observatory.analysis.network.words import reason_columns
from observatory.analysis.parallel.captured import captured_traffic
from observatory.analysis.parallel.placement import PlacementChoice
from observatory.analysis.parallel.topology import ParallelTopology
from observatory.errors import BenchmarkError, ExchangeError

if TYPE_CHECKING:
    from observatory.run import Run

#: Columns of `scan_times` other than the keys ep, layer, phase.
TIME_COLUMNS: tuple[str, ...] = (
    "dispatch_us", "dispatch_low_us", "dispatch_high_us",
    "combine_us", "combine_low_us", "combine_high_us",
    "predicted_steps", "extrapolated", "extrapolated_codes", "misfits", "no_prediction",
)  # fmt: skip


def scan_times(
    run: Run,
    model: NetworkModel,
    *,
    ep_degrees: Sequence[int],
    gpus_per_node: int,
    placement: PlacementChoice = "auto",
    algorithm: str = "flat",
    bytes_per_row: int | None = None,
    steps: int = 32,
) -> pd.DataFrame:
    """Predict the exchanges of every EP degree.

    Args:
        run: an open run.
        model: a fitted network model.
        ep_degrees: degrees to predict.
        gpus_per_node: ranks per node.
        placement: a name of ``PLACEMENT_NAMES``, or a placement file.
        algorithm: the exchange to predict.
        bytes_per_row: bytes of one row; None takes them from the manifest.
        steps: at most so many steps of each phase, evenly spread.

    Returns: ep, layer, phase and `TIME_COLUMNS`: medians over the predicted steps of the time and of each
        end of its 90 % interval; ``extrapolated`` and ``extrapolated_codes`` say what lies outside the
        measurements (None: nothing),
        ``misfits`` names places in the fit's of those that bytes pass in any step (None: none);
        ``no_prediction`` why there is none (None: there is one).

    Raises:
        PlacementError: a degree or the file does not fit the model.
        RunError: the bytes of a row are unknown, or rows fold several steps.
        BenchmarkError: the model does not know the algorithm.
    """
    model.of(algorithm)
    rows = []
    for ep in dict.fromkeys(ep_degrees):
        node_of_R = ParallelTopology(ep=ep, gpus_per_node=gpus_per_node).node_of_rank_R.tolist()
        predictions: dict[tuple[int, str], list[tuple[Prediction, Prediction]]] = {}
        refused: dict[tuple[int, str], str] = {}
        for traffic in captured_traffic(
            run, ep=ep, placement=placement, bytes_per_row=bytes_per_row, steps=steps
        ):
            key = (traffic.layer, traffic.phase)
            try:
                pair = tuple(
                    predict_us(model, bytes_RR, node_of_R, algorithm=algorithm, role=role)
                    for role, bytes_RR in (("dispatch", traffic.bytes_RR), ("combine", traffic.bytes_RR.T))
                )
            except (BenchmarkError, ExchangeError) as error:
                refused[key] = str(error)
                continue
            predictions.setdefault(key, []).append((pair[0], pair[1]))
        rows += [
            {"ep": ep, "layer": key[0], "phase": key[1], **_row(predictions.get(key, []), refused.get(key))}
            for key in sorted(predictions.keys() | refused.keys())
        ]
    return pd.DataFrame(rows, columns=["ep", "layer", "phase", *TIME_COLUMNS])


def _row(pairs: Sequence[tuple[Prediction, Prediction]], refusal: str | None) -> dict[str, object]:
    if refusal is not None or not pairs:
        # A step that cannot be predicted would leave a median of the others: rather none.
        return dict.fromkeys(TIME_COLUMNS) | {"predicted_steps": 0, "no_prediction": refusal}
    row: dict[str, object] = {"predicted_steps": len(pairs), "no_prediction": None}
    for index, role in enumerate(("dispatch", "combine")):
        of_role = [pair[index] for pair in pairs]
        row[f"{role}_us"] = float(np.median([item.us for item in of_role]))
        row[f"{role}_low_us"] = float(np.median([item.low_us for item in of_role]))
        row[f"{role}_high_us"] = float(np.median([item.high_us for item in of_role]))
    # One reason of each kind is enough: sizes differ from step to step.
    reasons = {reason.code: reason for pair in pairs for item in pair for reason in item.extrapolated}
    row |= reason_columns(reasons.values())
    row["misfits"] = sorted({place for pair in pairs for item in pair for place in item.misfits}) or None
    return row

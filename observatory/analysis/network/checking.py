"""Predicted against measured, on results that were not in the fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from observatory.analysis.network.network import NetworkModel
from observatory.analysis.network.predict import predict_us
from observatory.analysis.network.words import reason_columns
from observatory.errors import BenchmarkError
from observatory.reasons import Reason
from observatory.run.documents.bench import BenchResult

#: Columns of `check_predictions`.
CHECK_COLUMNS: tuple[str, ...] = (
    "algorithm", "pattern", "phase", "layer", "step", "role", "measured_us", "predicted_us", "low_us",
    "high_us", "error", "extrapolated", "extrapolated_codes", "misfits",
)  # fmt: skip


def check_predictions(model: NetworkModel, result: BenchResult) -> pd.DataFrame:
    """One row per case: algorithm, pattern, phase, layer, step, role, measured_us, predicted_us, low_us,
    high_us, error (|predicted - measured| / measured), extrapolated (None: nothing), misfits (places in the
    fit's, None: none).

    Raises:
        BenchmarkError: another backend, or kinds of exchanges the model never measured.
    """  # noqa: D205 - the list is one sentence
    if result.backend != model.backend:
        raise BenchmarkError(
            f"a model of {model.backend} cannot be checked on a result of {result.backend}; fit one for it"
        )
    rows = [
        checked_row(
            model, case.bytes_PP, result.node_of_P, algorithm=case.algorithm, measured_us=case.mean_us,
            pattern=case.pattern, phase=case.phase, layer=case.layer, step=case.step, role=case.role,
        )
        for case in result.cases
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=list(CHECK_COLUMNS))


def checked_row(
    model: NetworkModel,
    bytes_PP: ArrayLike,
    node_of_P: Sequence[int],
    *,
    algorithm: str,
    role: str | None,
    measured_us: float,
    reservations: Sequence[Reason] = (),
    **where: object,
) -> dict[str, Any]:
    """One row of `check_predictions`; ``where`` is kept, ``reservations`` are added to ``extrapolated``."""
    predicted = predict_us(model, bytes_PP, node_of_P, algorithm=algorithm, role=role)
    return {
        "algorithm": algorithm,
        "role": role,
        **where,
        "measured_us": measured_us,
        "predicted_us": predicted.us,
        "low_us": predicted.low_us,
        "high_us": predicted.high_us,
        "error": abs(predicted.us - measured_us) / measured_us,
        **reason_columns((*predicted.extrapolated, *reservations)),
        "misfits": predicted.misfits or None,
    }


def not_fitted(result: BenchResult, fitted: Sequence[BenchResult], *, name: str) -> BenchResult:
    """The result, if the fit has not seen it.

    Raises:
        BenchmarkError: it is one of those that were fitted.
    """
    if result in fitted:
        raise BenchmarkError(
            f"{name} is among the results that the model is fitted to, so its errors would say nothing; "
            "check against another one"
        )
    return result


def error_summary(checked: pd.DataFrame) -> pd.DataFrame:
    """`errors_of` per algorithm and pattern."""
    groups = checked.groupby(["algorithm", "pattern"], sort=True)
    return pd.DataFrame(
        {"algorithm": algorithm, "pattern": pattern, **errors_of(group)}
        for (algorithm, pattern), group in groups
    )


def errors_of(checked: pd.DataFrame) -> dict[str, float]:
    """Errors of rows of `check_predictions`.

    Returns:
        exchanges, median_error, p90_error, median_ratio (predicted over measured), and as shares
        inside_interval (measurements inside the 90 % interval), extrapolated, through_misfits (of the model).
    """
    measured_us = checked["measured_us"]
    inside = (measured_us >= checked["low_us"]) & (measured_us <= checked["high_us"])
    return {
        "exchanges": len(checked),
        "median_error": float(checked["error"].median()),
        "p90_error": float(np.quantile(checked["error"], 0.9)),
        "median_ratio": float((checked["predicted_us"] / measured_us).median()),
        "inside_interval": float(inside.mean()),
        "extrapolated": float(checked["extrapolated"].notna().mean()),
        "through_misfits": float(checked["misfits"].notna().mean()),
    }

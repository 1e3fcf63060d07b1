"""Coefficients from a measurement, stage by stage, and how well they predict points that were left out.

Shapes: N cases, B bootstrap samples, F terms of a stage, D points.

Each stage was timed on its own, so each is fitted on its own: non-negative least squares in relative error,
relative to the geometric mean of measured and predicted (otherwise noise pulls predictions down), outliers
weighted down (Huber). A point is held out with all its options; intervals are a bootstrap over points.

**The knee** is the payload of one trip whose bytes take as long as the trip itself. Below it times are those
of launching and noticing, and scatter; above it they follow the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from observatory.analysis.route_fetch.costs import (
    TERMS,
    Constants,
    Quantities,
    Sizes,
    StageCosts,
    quantities,
)
from observatory.analysis.statistics import deal_folds
from observatory.errors import BenchmarkError
from observatory.run.documents.route_fetch import Option, RouteFetchCase, RouteFetchResult, Shape, Stage

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

_ROUNDS = 6
_HUBER = 1.345
_FOLDS = 5
#: Measured costs that differ by more decide which option was better.
APART = 0.10


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeldOut:
    """Cases predicted by fits that did not see their point.

    Attributes:
        cases: what was measured.
        point_N: point of each case; cases of one point are alternatives.
        measured_us_N, predicted_us_N: total times.
        above_N: whether a trip carries more than the knee.
        knee_bytes: payload of a trip at the knee; None where bytes or trips cost nothing that was measured.
    """

    cases: tuple[RouteFetchCase, ...]
    point_N: Int64
    measured_us_N: Float64
    predicted_us_N: Float64
    above_N: NDArray[np.bool_]
    knee_bytes: float | None

    def mape(self, options: Sequence[Option], *, above: bool) -> float | None:
        """Mean of |predicted - measured| / measured on one side of the knee; None where nothing is there."""
        chosen_N = self.of(options) & (self.above_N == above)
        if not chosen_N.any():
            return None
        return float(np.abs(self.predicted_us_N[chosen_N] / self.measured_us_N[chosen_N] - 1.0).mean())

    def ratios(self) -> dict[Option, Float64]:
        """Measured over predicted time of each option at its points, in their order."""
        ratios: dict[Option, Float64] = {}
        for option in dict.fromkeys(case.option for case in self.cases):
            of_N = self.of((option,))
            order = np.argsort(self.point_N[of_N])
            ratio_N = self.measured_us_N[of_N] / np.maximum(self.predicted_us_N[of_N], 1e-3)
            ratios[option] = ratio_N[order]
        return ratios

    def of(self, options: Sequence[Option]) -> NDArray[np.bool_]:
        """Which cases are of these options."""
        return np.array([case.option in options for case in self.cases])

    def winners(self, options: Sequence[Option]) -> tuple[Int64, Int64, NDArray[np.bool_], Float64]:
        """The choice at each point.

        Returns:
            Index of the predicted and of the measured best option, whether measured costs differ by more
            than `APART`, and what the predicted best costs over the measured best, less 1.
        """
        points = np.unique(self.point_N[self.of(options)])
        table = np.full((2, len(points), len(options)), np.inf)
        for index, option in enumerate(options):
            of_N = self.of((option,))
            at = np.searchsorted(points, self.point_N[of_N])
            table[0, at, index], table[1, at, index] = self.predicted_us_N[of_N], self.measured_us_N[of_N]
        best_2D = table.argmin(axis=2)
        ordered = np.sort(table[1], axis=1)
        apart_D = ordered[:, 1] > ordered[:, 0] * (1.0 + APART)
        regret_D = np.take_along_axis(table[1], best_2D[0][:, None], axis=1)[:, 0] / ordered[:, 0] - 1.0
        return best_2D[0], best_2D[1], apart_D, regret_D


def fit_shape(
    result: RouteFetchResult,
    shape: int,
    *,
    held_out: HeldOut | None = None,
    source: str = "",
    bootstrap: int = 100,
    seed: int = 0,
) -> Constants:
    """Coefficients of one shape of a measurement.

    Args:
        result: the measurement.
        shape: index of the shape.
        held_out: its points as others predict them, whose errors widen intervals; None leaves these to the
            coefficients.
        source: name of the measurement's file.
        bootstrap: B.
        seed: of the bootstrap.

    Raises:
        BenchmarkError: fewer than eight points, or results that were wrong.
    """
    cases = _cases(result, shape)
    point_N = _points(cases)
    parts_N = [case_quantities(result.shapes[shape], case, result.holders) for case in cases]
    count = int(point_N.max()) + 1
    drawn_BD = np.random.default_rng(seed).integers(0, count, (bootstrap, count))
    weight_BD = np.stack([np.bincount(drawn, minlength=count) for drawn in drawn_BD]) if bootstrap else None
    stages: dict[Stage, StageCosts] = {}
    for stage in dict.fromkeys(stage for parts in parts_N for stage in parts):
        terms_NF, us_N, at = _table(cases, parts_N, stage)
        us_F = _solve(terms_NF, us_N, np.ones(len(us_N)))
        samples = [us_F] if weight_BD is None else [
            _solve(terms_NF, us_N, weight_D[point_N[at]].astype(np.float64)) for weight_D in weight_BD
        ]  # fmt: skip
        stages[stage] = StageCosts(us_F=us_F, samples_BF=np.stack(samples))
    return Constants(
        grade="fitted",
        source=source,
        shape=result.shapes[shape],
        holders=result.holders,
        stages=stages,
        backend=result.backend,
        hosts=tuple(dict.fromkeys(host.name for host in result.hosts)),
        ratios={} if held_out is None else held_out.ratios(),
        domain={
            name: (min(values), max(values))
            for name in ("rows", "size", "layers")
            if (values := [getattr(case, name) for case in cases if case.option in ("route", "fetch")])
        },
    )


def hold_out_points(result: RouteFetchResult, shape: int, *, seed: int = 0) -> HeldOut:
    """Predict every point of a shape from the others, in five folds.

    Raises:
        BenchmarkError: fewer than eight points, or results that were wrong.
    """
    cases = _cases(result, shape)
    point_N = _points(cases)
    parts_N = [case_quantities(result.shapes[shape], case, result.holders) for case in cases]
    fold_N = deal_folds(int(point_N.max()) + 1, _FOLDS, seed)[point_N]
    predicted_us_N = np.zeros(len(cases))
    tables = {
        stage: _table(cases, parts_N, stage)
        for stage in dict.fromkeys(stage for parts in parts_N for stage in parts)
    }
    for fold in range(_FOLDS):
        for terms_NF, us_N, at in tables.values():
            held_N = fold_N[at] == fold
            us_F = _solve(terms_NF, us_N, (~held_N).astype(np.float64))
            predicted_us_N[at[held_N]] += terms_NF[held_N] @ us_F
    knee = knee_bytes(tables["transfer"][:2]) if "transfer" in tables else None
    return HeldOut(
        cases=tuple(cases),
        point_N=point_N,
        measured_us_N=np.array([case.total_us for case in cases]),
        predicted_us_N=predicted_us_N,
        above_N=np.array([knee is not None and _payload(parts) > knee for parts in parts_N]),
        knee_bytes=knee,
    )


def case_quantities(shape: Shape, case: RouteFetchCase, holders: int) -> Quantities:
    """Quantities of a measured case."""
    sizes = Sizes(rows=case.rows, size=case.size, layers=case.layers, holders=holders, suffix=case.suffix)
    return quantities(shape, case.option, sizes)


def knee_bytes(transfer: tuple[Float64, Float64]) -> float | None:
    """Payload of a trip whose bytes take as long as the trip; None where either costs nothing measurable."""
    us_F = _solve(*transfer, np.ones(len(transfer[1])))
    per_byte = max(us_F[1], us_F[2])
    return float(us_F[0] / per_byte) if us_F[0] > 0 and per_byte > 0 else None


def _payload(parts: Quantities) -> float:
    """Bytes of one trip, there and back; nothing where there is none."""
    if "transfer" not in parts:
        return 0.0
    transfer = parts["transfer"]
    return float((transfer["byte_out"] + transfer["byte_back"]) / transfer["trip"])


def _cases(result: RouteFetchResult, shape: int) -> list[RouteFetchCase]:
    cases = [case for case in result.cases if case.shape == shape]
    wrong = [case for case in cases if not case.correct]
    name = result.shapes[shape].name
    if wrong:
        raise BenchmarkError(
            f"{len(wrong)} of {len(cases)} cases of {name} gave wrong results", remedy="measure again"
        )
    for case in cases:
        stages = case_quantities(result.shapes[shape], case, result.holders)
        unknown = set(stages) - set(case.stage_us_R) - {"transfer"}
        if unknown:
            raise BenchmarkError(
                f"{case.option} of {name} was measured without its {', '.join(sorted(unknown))}",
                remedy="measure again",
            )
    if not {"route", "fetch"} <= {case.option for case in cases}:
        raise BenchmarkError(f"{name} was not measured both routed and fetched", remedy="measure again")
    if len(set(_points(cases))) < 8:
        raise BenchmarkError(
            f"{name} was measured at fewer than 8 points", remedy="measure with more --points"
        )
    return cases


def _points(cases: Sequence[RouteFetchCase]) -> Int64:
    """Number of the point of each case."""
    keys = [(case.rows, case.size, case.layers, case.suffix) for case in cases]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys], dtype=np.int64)


def _table(
    cases: Sequence[RouteFetchCase], parts_N: Sequence[Quantities], stage: Stage
) -> tuple[Float64, Float64, Int64]:
    """Terms (N, F) and median times of all cases that have a stage, and which cases these are."""
    at = np.array([index for index, parts in enumerate(parts_N) if stage in parts], dtype=np.int64)
    terms_NF = np.array(
        [[float(parts_N[index][stage].get(term, 0.0)) for term in TERMS[stage]] for index in at]
    )
    us_N = np.array([np.median(cases[index].stage_us(stage)) for index in at])
    return terms_NF, np.maximum(us_N, 1e-3), at


def _solve(terms_NF: Float64, us_N: Float64, weight_N: Float64) -> Float64:
    """Non-negative coefficients with least relative error, outliers weighted down."""
    from scipy.optimize import nnls

    kept_N = weight_N > 0
    if not kept_N.any():
        return np.zeros(terms_NF.shape[1])
    terms_NF, us_N, weight_N = terms_NF[kept_N], us_N[kept_N], weight_N[kept_N]
    unit_F = np.maximum(terms_NF.max(axis=0), 1e-300)
    scale_N, trust_N = us_N, np.ones(len(us_N))
    solved = np.zeros(terms_NF.shape[1])
    for _ in range(_ROUNDS):
        root_N = np.sqrt(weight_N * trust_N) / scale_N
        solved, _ = nnls(terms_NF / unit_F * root_N[:, None], us_N * root_N)
        predicted_N = np.maximum(terms_NF / unit_F @ solved, 1e-3)
        scale_N = np.sqrt(us_N * predicted_N)
        residual_N = np.abs(us_N - predicted_N) / scale_N
        spread = max(1.4826 * float(np.median(residual_N)), 1e-6)
        trust_N = np.minimum(1.0, _HUBER * spread / np.maximum(residual_N, 1e-12))
    return np.asarray(solved / unit_F)

"""Time of one rank's experts in one layer-step, from assignments and activated experts.

Shapes: N points of a benchmark, F terms of a form.

At few tokens the weights of every activated expert are read for hardly any work, at many the work counts:

    t = launch + a function of (activated, assignments)

The forms are in ``FORMS``. A benchmark chooses among them by the error on points that the fit did not see
(`fit_experts`); a hardware profile gives a roofline (`of_hardware`). Grouped kernels compute whole tiles of
rows, so that an expert's rows are padded to a multiple of the tile; with loads at random the last tile of an
expert is half full on average, and an activated expert has at least one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from observatory.analysis.statistics import deal_folds, hold_out, simplest, within_one_standard_error
from observatory.errors import BenchmarkError
from observatory.run.documents.expert_bench import ExpertBench, ExpertShape, TokensPoint

if TYPE_CHECKING:
    from observatory.analysis.hardware.profiles import HardwareProfile

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

#: What a cost rests on: measured where it is used, a profile of published achievable rates, or assumptions.
Grade = Literal["measured", "published", "assumed"]

#: Rows of a tile of grouped kernels on GPUs; block sizes of 64 and 128 rows are usual.
GPU_TILE = 64
_FOLDS = 10
#: Points with assignments that a fit takes: three for each coefficient of the longest form.
FEWEST_POINTS = 12
#: Forms whose errors differ by less than this are equally good for any purpose.
_SAME_ERROR = 1e-3
_SMALLEST_S = 1e-9


def padded(assignments: ArrayLike, activated: ArrayLike, tile: int) -> Float64:
    """Rows that kernels with tiles of so many rows compute, on average over splits among the experts."""
    rows, experts = np.asarray(assignments, dtype=np.float64), np.asarray(activated, dtype=np.float64)
    return np.asarray(np.maximum(experts * tile, rows + experts * (tile - 1) / 2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """One form of the time.

    Attributes:
        name: its name.
        meaning: one sentence.
        tile: rows of a tile; 1 for none.
        experts: whether an activated expert costs anything beyond its rows.
        larger: whether the larger of what experts and rows cost counts, instead of both.
        knee: rows beyond which a row costs more: caches overflow; None for none.
    """

    name: str
    meaning: str
    tile: int = 1
    experts: bool = True
    larger: bool = False
    knee: int | None = None

    @property
    def parameters(self) -> int:
        """Coefficients: of a call, an activated expert, a row, a row beyond the knee."""
        return 2 + self.experts + (self.knee is not None)

    def terms(self, assignments: Float64, activated: Float64) -> Float64:
        """What the coefficients multiply, (N, 4)."""
        rows = padded(assignments, activated, self.tile)
        beyond = np.zeros_like(rows) if self.knee is None else np.maximum(rows - self.knee, 0.0)
        return np.stack([np.ones_like(rows), activated * self.experts, rows, beyond], axis=-1)

    def seconds(self, coefficient_F: Float64, assignments: Float64, activated: Float64) -> Float64:
        """Time of each point."""
        parts = self.terms(assignments, activated) * coefficient_F
        if self.larger:
            return np.asarray(parts[..., 0] + np.maximum(parts[..., 1], parts[..., 2]))
        return np.asarray(parts.sum(axis=-1))


FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        Form(name="rows", meaning="a call and its rows", experts=False),
        Form(name="experts-and-rows", meaning="a call, its activated experts and its rows"),
        Form(name="roofline", meaning="a call, and the longer of weight reads and arithmetic", larger=True),
        *(
            Form(
                name=f"tiles-{tile}",
                meaning=f"a call, its activated experts and its rows in tiles of {tile}",
                tile=tile,
            )
            for tile in (16, 64, 128)
        ),
        *(
            Form(
                name=f"knee-{knee}",
                meaning=f"a call, its activated experts and its rows, which cost more beyond {knee}",
                knee=knee,
            )
            for knee in (1024, 2048, 4096, 8192)
        ),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertCost:
    """What one rank's experts take in a layer-step.

    Attributes:
        grade: what it rests on.
        shape: the experts that it is of.
        form: how time depends on assignments and activated experts.
        coefficient_F: seconds of a call, of an activated expert, of a row, and more of a row beyond the knee.
        idle_s: time of a call without assignments.
        source: file or profile, for people.
        most_assignments, most_activated: what was measured up to; None where nothing was.
        most_rows: assignments of an activated expert that were measured up to; None likewise.
        median_error, p90_error: of |predicted - measured| / measured on held-out points; None likewise.
        shared_F: seconds of a call of the shared experts and of one of its tokens; None where not known.
        local_F: the same of what a rank does alone in the layer besides experts: router, sorting, adding up.
        peak_only: rates that are peaks, as nothing achievable is known: the time is a lower bound.
    """

    grade: Grade
    shape: ExpertShape
    form: Form
    coefficient_F: tuple[float, float, float, float]
    idle_s: float
    source: str
    most_assignments: int | None = None
    most_activated: int | None = None
    most_rows: float | None = None
    median_error: float | None = None
    p90_error: float | None = None
    shared_F: tuple[float, float] | None = None
    local_F: tuple[float, float] | None = None
    peak_only: tuple[str, ...] = ()

    def seconds(self, assignments: ArrayLike, activated: ArrayLike) -> Float64:
        """Time of one rank's experts in one layer-step.

        Args:
            assignments: token-expert assignments on the rank; expectations need not be whole.
            activated: experts of the rank with at least one; broadcast against ``assignments``.
        """
        rows, experts = np.broadcast_arrays(
            np.asarray(assignments, dtype=np.float64), np.asarray(activated, dtype=np.float64)
        )
        busy_s = self.form.seconds(np.array(self.coefficient_F), rows, experts)
        return np.asarray(np.where(rows > 0, busy_s, self.idle_s))

    def beyond(self, assignments: ArrayLike, activated: ArrayLike) -> Float64:
        """How many times the most that was measured each point has; at most 1 inside, infinite for a profile.

        Of assignments, of activated experts, or of assignments of each of them, whichever is farthest out.
        """
        rows, experts = np.broadcast_arrays(
            np.asarray(assignments, dtype=np.float64), np.asarray(activated, dtype=np.float64)
        )
        if self.most_assignments is None or self.most_activated is None or self.most_rows is None:
            return np.full(rows.shape, np.inf)
        each = rows / np.maximum(experts, 1e-300)
        times = (rows / self.most_assignments, experts / self.most_activated, each / self.most_rows)
        return np.asarray(np.where(rows == 0, 0.0, np.max(times, axis=0)))

    def shared_seconds(self, tokens: ArrayLike) -> Float64 | None:
        """Time of the shared experts on so many tokens of one rank; None where it is not known."""
        return _of_tokens(self.shared_F, tokens)

    def local_seconds(self, tokens: ArrayLike) -> Float64 | None:
        """Time of what a rank does alone in the layer besides experts; None where it is not known."""
        return _of_tokens(self.local_F, tokens)


def _of_tokens(seconds_F: tuple[float, float] | None, tokens: ArrayLike) -> Float64 | None:
    if seconds_F is None:
        return None
    rows = np.asarray(tokens, dtype=np.float64)
    return np.asarray(np.where(rows > 0, seconds_F[0] + seconds_F[1] * rows, 0.0))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FormTrial:
    """One form with its error on held-out points.

    Attributes:
        form: the form.
        error_N: |predicted - measured| / measured of every point, each predicted by a fit without it.
    """

    form: Form
    error_N: Float64

    @property
    def parameters(self) -> int:
        """Coefficients of the form."""
        return self.form.parameters

    @property
    def error(self) -> float:
        """Mean error."""
        return float(self.error_N.mean())


def try_forms(bench: ExpertBench, *, seed: int = 0) -> list[FormTrial]:
    """Every form with its held-out error, in the order of ``FORMS``.

    Points are left out in ten folds, or one by one where they are fewer.

    Raises:
        BenchmarkError: too few points.
    """
    assignments_N, activated_N, s_N = _points(bench)
    if len(s_N) < FEWEST_POINTS:
        raise BenchmarkError(
            f"the expert benchmark has {len(s_N)} points with assignments",
            expected=f"at least {FEWEST_POINTS}",
            remedy="measure more numbers of tokens or of activated experts",
        )
    fold_N = deal_folds(len(s_N), min(_FOLDS, len(s_N)), seed)

    def predictor(form: Form) -> Callable[[Int64, Int64], Float64]:
        def predict(fitted_K: Int64, held_out_K: Int64) -> Float64:
            coefficient_F = _fit(form, assignments_N[fitted_K], activated_N[fitted_K], s_N[fitted_K])
            return form.seconds(coefficient_F, assignments_N[held_out_K], activated_N[held_out_K])

        return predict

    return [
        FormTrial(form=form, error_N=np.abs(hold_out(fold_N, predictor(form)) / s_N - 1.0))
        for form in FORMS.values()
    ]


def fit_experts(bench: ExpertBench, *, source: str = "expert benchmark", seed: int = 0) -> ExpertCost:
    """The cost that was measured, in the simplest form that is as good as the best on held-out points.

    Raises:
        BenchmarkError: too few points.
    """
    assignments_N, activated_N, s_N = _points(bench)
    trials = try_forms(bench, seed=seed)
    best = min(trials, key=lambda trial: trial.error)
    chosen = simplest(
        trial
        for trial in trials
        if within_one_standard_error(
            trial.error_N - best.error_N, np.arange(len(s_N)), negligible=_SAME_ERROR
        )
    )
    call_s, expert_s, row_s, beyond_s = _fit(chosen.form, assignments_N, activated_N, s_N).tolist()
    idle = [point.median_us * 1e-6 for point in bench.points if point.assignments == 0]
    return ExpertCost(
        grade="measured",
        shape=bench.shape,
        form=chosen.form,
        coefficient_F=(call_s, expert_s, row_s, beyond_s),
        idle_s=idle[0] if idle else 0.0,
        source=source,
        most_assignments=int(assignments_N.max()),
        most_activated=int(activated_N.max()),
        most_rows=float((assignments_N / activated_N).max()),
        median_error=float(np.median(chosen.error_N)),
        p90_error=float(np.quantile(chosen.error_N, 0.9)),
        shared_F=_fit_tokens(bench.shared_points),
        local_F=_fit_tokens(bench.local_points),
    )


def of_hardware(profile: HardwareProfile, shape: ExpertShape) -> ExpertCost:
    """The roofline of a hardware profile.

    max(weight bytes of the activated experts / bandwidth, tile-padded arithmetic / rate) after a launch, with
    the achievable rates where the profile has them and the peaks where it does not.

    Raises:
        BenchmarkError: the profile has no rate for the dtype, or no bandwidth.
    """
    bandwidth, rate = profile.memory_bandwidth(), profile.rate(shape.dtype)
    return ExpertCost(
        grade="assumed" if bandwidth.assumed or rate.assumed else "published",
        shape=shape,
        form=Form(name="roofline", meaning=FORMS["roofline"].meaning, tile=GPU_TILE, larger=True),
        coefficient_F=(
            profile.launch_s,
            shape.expert_bytes / bandwidth.value,
            shape.flops / rate.value,
            0.0,
        ),
        idle_s=0.0,
        source=profile.name,
        peak_only=tuple(item.name for item in (bandwidth, rate) if item.peak),
    )


def _points(bench: ExpertBench) -> tuple[Float64, Float64, Float64]:
    """Assignments, activated experts and median seconds of the points with assignments."""
    busy = [point for point in bench.points if point.assignments]
    columns = np.array([(p.assignments, p.activated, p.median_us * 1e-6) for p in busy], dtype=np.float64)
    assignments_N, activated_N, s_N = columns.reshape(-1, 3).T
    return assignments_N, activated_N, s_N


def _fit(form: Form, assignments_N: Float64, activated_N: Float64, s_N: Float64) -> Float64:
    """Non-negative coefficients of least relative error, (4,).

    Where the larger of two costs counts, the fit alternates: which is larger, then the coefficients.
    """
    terms_NF = form.terms(assignments_N, activated_N)
    if not form.larger:
        return _least_squares(terms_NF, s_N)
    memory_N = assignments_N / activated_N < np.median(assignments_N / activated_N)
    best_F, best_error = np.zeros(4), np.inf
    for _ in range(20):
        counts_NF = np.stack([np.ones_like(s_N), memory_N, ~memory_N, memory_N & False], axis=1)
        coefficient_F = _least_squares(terms_NF * counts_NF, s_N)
        error = float(np.sum((form.seconds(coefficient_F, assignments_N, activated_N) / s_N - 1.0) ** 2))
        if error >= best_error:
            break
        best_F, best_error = coefficient_F, error
        memory_N = terms_NF[:, 1] * coefficient_F[1] > terms_NF[:, 2] * coefficient_F[2]
    return best_F


def _least_squares(terms_NF: Float64, s_N: Float64) -> Float64:
    from scipy.optimize import nnls

    scale_F = np.maximum(terms_NF.max(axis=0), 1e-300)
    scale_F[~terms_NF.any(axis=0)] = 1.0
    design_NF = terms_NF / scale_F / np.maximum(s_N, _SMALLEST_S)[:, None]
    return np.asarray(nnls(design_NF, np.ones(len(s_N)))[0] / scale_F)


def _fit_tokens(points: Sequence[TokensPoint]) -> tuple[float, float] | None:
    """Seconds of a call and of a token; None without at least two numbers of tokens."""
    if len({point.tokens for point in points}) < 2:
        return None
    terms_N2 = np.array([(1.0, point.tokens) for point in points])
    call_s, token_s = _least_squares(
        terms_N2, np.array([point.median_us * 1e-6 for point in points])
    ).tolist()
    return call_s, token_s

"""The cost of experts: forms are recovered from made-up benchmarks; rooflines by hand."""

from __future__ import annotations

import numpy as np
import pytest

from observatory.analysis.experts.cost import FORMS, fit_experts, of_hardware, padded
from observatory.analysis.hardware import HardwareProfile
from observatory.errors import BenchmarkError
from observatory.run.documents.expert_bench import ExpertBench, ExpertPoint, ExpertShape, TokensPoint
from tests.analysis.experts.models import SHAPE, cost


def bench(form: str, coefficients: tuple[float, ...], *, noise: float = 0.0) -> ExpertBench:
    """Times of a form, with noise, on a grid."""
    generator = np.random.default_rng(0)
    shape = SHAPE.model_copy(update={"experts": 32})
    points = [ExpertPoint(assignments=0, activated=0, us_R=(3.0,))]
    for rows in (1, 2, 4, 8, 32, 128, 512):
        for activated in (1, 2, 4, 8, 16, 32):
            s = FORMS[form].seconds(
                np.array(coefficients), np.array(float(rows * activated)), np.array(float(activated))
            )
            factor = np.exp(noise * generator.standard_normal(5))
            points.append(
                ExpertPoint(
                    assignments=rows * activated, activated=activated, us_R=tuple((s * 1e6 * factor).tolist())
                )
            )
    return ExpertBench(
        created_unix_s=0.0, shape=shape, experts_here=32, device="test", warmup=0, points=tuple(points)
    )


@pytest.mark.parametrize(
    ("form", "coefficients"),
    [
        ("rows", (5e-6, 0.0, 1e-6, 0.0)),
        ("experts-and-rows", (5e-6, 20e-6, 1e-6, 0.0)),
        ("roofline", (5e-6, 20e-6, 1e-6, 0.0)),
        ("tiles-64", (5e-6, 20e-6, 1e-6, 0.0)),
        ("knee-2048", (5e-6, 20e-6, 1e-6, 2e-6)),
    ],
)
def test_a_form_is_recovered(form, coefficients):
    fitted = fit_experts(bench(form, coefficients, noise=0.005))
    assert fitted.form.name == form
    assert fitted.coefficient_F == pytest.approx(coefficients, rel=0.1, abs=1e-8)
    assert fitted.median_error < 0.01
    assert fitted.grade == "measured"


def test_a_call_without_assignments_has_its_own_time():
    fitted = fit_experts(bench("rows", (5e-6, 0.0, 1e-6, 0.0)))
    assert fitted.seconds([0, 10], [0, 1]).tolist() == pytest.approx([3e-6, 15e-6])


def test_noise_shows_in_the_held_out_error():
    assert fit_experts(bench("experts-and-rows", (5e-6, 20e-6, 1e-6, 0.0), noise=0.3)).median_error > 0.02


def test_arrays_broadcast():
    assert cost(expert_s=1.0, row_s=2.0).seconds(np.array([1.0, 2.0]), 1.0).tolist() == [3.0, 5.0]


def test_how_far_a_point_lies_beyond_what_was_measured():
    measured = cost()  # up to 100 assignments, 4 experts, 50 assignments of each
    far = measured.beyond([0, 100, 150, 60, 60, 10], [0, 4, 4, 1, 2, 8])
    assert far.tolist() == pytest.approx([0.0, 1.0, 1.5, 1.2, 0.6, 2.0])


def test_padding_is_a_tile_at_least_and_half_a_tile_on_average():
    assert padded([1, 64, 640], [1, 1, 10], 64).tolist() == [64.0, 95.5, 955.0]


def test_shared_experts_are_fitted_where_they_were_timed():
    points = tuple(TokensPoint(tokens=n, us_R=(10.0 + 2.0 * n,)) for n in (1, 10, 100))
    measured = bench("rows", (5e-6, 0.0, 1e-6, 0.0)).model_copy(update={"shared_points": points})
    assert fit_experts(measured).shared_seconds([0, 50]).tolist() == pytest.approx([0.0, 110e-6])
    assert fit_experts(bench("rows", (5e-6, 0.0, 1e-6, 0.0))).shared_seconds(1) is None


def test_few_points_are_refused():
    few = bench("rows", (5e-6, 0.0, 1e-6, 0.0))
    with pytest.raises(BenchmarkError, match="at least 12"):
        fit_experts(few.model_copy(update={"points": few.points[:5]}))


def test_a_roofline_is_the_longer_of_reads_and_arithmetic():
    profile = HardwareProfile.model_validate(
        {
            "name": "round numbers",
            "peak": {
                "bf16": {"value": 1000.0, "unit": "TFLOP/s", "source": "test", "date": "2026-01-01"},
                "memory_bandwidth": {"value": 4000.0, "unit": "GB/s", "source": "test", "date": "2026-01-01"},
            },
            "achievable": {
                "memory_bandwidth": {"value": 2000.0, "unit": "GB/s", "source": "test", "date": "2026-01-01"}
            },
        }
    )
    shape = ExpertShape(
        hidden=1000, intermediate=1000, experts=8, top_k=2, dtype="bfloat16", expert_bytes=2_000_000
    )
    roofline = of_hardware(profile, shape)
    assert roofline.grade == "assumed"
    assert roofline.peak_only == ("bf16",)
    # One expert: 2 MB at 2 TB/s are 1 us; a row is 2 MFLOP: 10,000 rows and a half-full tile are 20.1 us.
    assert roofline.seconds([1, 10_000], [1, 1]) == pytest.approx([1e-6, (10_000 + 31.5) * 2e-9])
    assert roofline.beyond(1, 1) == np.inf
    with pytest.raises(BenchmarkError, match="no fp8"):
        of_hardware(profile, shape.model_copy(update={"dtype": "float8_e4m3fn"}))
    with pytest.raises(BenchmarkError, match="float32"):
        of_hardware(profile, shape.model_copy(update={"dtype": "float32"}))

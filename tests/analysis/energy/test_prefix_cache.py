"""What a cache hit saves, from measurements made by a formula."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from observatory.analysis.energy import fit_reuse
from observatory.analysis.energy.codes import EnergyCode
from observatory.analysis.energy.prefix_cache import PUBLISHED_SAVING
from observatory.errors import EnergyError
from observatory.reasons import Reason
from observatory.run.documents.prefix_cache import ReuseMeasurement, ReuseMeasurements, load_reuse
from observatory.run.manifest import DeviceSpec


def measured(
    coefficients: tuple[float, float, float],
    fractions: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0),
    *,
    windows: int = 5,
    noise: float = 0.01,
    seed: int = 0,
) -> ReuseMeasurements:
    """Windows of 40 prefills whose energy is the formula's, with noise."""
    generator = np.random.default_rng(seed)
    cells = {0.0: "MISS", 1.0: "EXACT_HIT"}
    fixed, linear, square = coefficients
    return ReuseMeasurements(
        created_unix_s=1.0,
        model="m",
        prompt_tokens=4096,
        device=DeviceSpec(kind="gpu"),
        measurements=tuple(
            ReuseMeasurement(
                cell=cells.get(c, "PARTIAL"),  # type: ignore[arg-type]
                cached_fraction=c,
                prefills=40,
                duration_s=5.0,
                energy_mj=40
                * (fixed + linear * (1 - c) + square * (1 - c * c))
                * float(np.exp(noise * generator.standard_normal())),
            )
            for c in fractions
            for _ in range(windows)
        ),
    )


def test_the_curve_and_the_saving_are_recovered() -> None:
    fit = fit_reuse(measured((37e3, 45e3, 18e3)))
    assert fit.saved == pytest.approx(0.63, abs=0.01)
    assert fit.saved_low is not None
    assert fit.saved_high is not None
    assert fit.saved_low < 0.63 < fit.saved_high
    assert fit.saved_high - fit.saved_low < 0.04
    for c, truth in ((0.0, 100e3), (0.5, 73e3), (1.0, 37e3)):
        assert fit.prefill_mj(c) == pytest.approx(truth, rel=0.01)
    assert fit.cells["cell"].tolist() == ["MISS", "PARTIAL", "PARTIAL", "PARTIAL", "EXACT_HIT"]
    assert fit.cells["prefills"].tolist() == [200] * 5


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    held = []
    for seed in range(60):
        fit = fit_reuse(measured((37e3, 45e3, 18e3), windows=4, noise=0.02, seed=seed))
        assert fit.saved_low is not None
        assert fit.saved_high is not None
        held.append(fit.saved_low <= 0.63 <= fit.saved_high)
    assert 0.8 <= np.mean(held) <= 1.0


@settings(max_examples=30, deadline=None)
@given(
    coefficients=st.tuples(st.floats(1e3, 1e5), st.floats(0, 1e5), st.floats(0, 1e5)),
    seed=st.integers(0, 1 << 16),
)
def test_the_curve_never_rises_with_what_is_cached(
    coefficients: tuple[float, float, float], seed: int
) -> None:
    fit = fit_reuse(measured(coefficients, windows=2, noise=0.1, seed=seed))
    assert (np.diff(fit.curve["fitted_mj"]) <= 1e-6).all()
    assert (fit.curve["fitted_low_mj"] <= fit.curve["fitted_mj"] + 1e-6).all()
    assert (fit.curve["fitted_high_mj"] >= fit.curve["fitted_mj"] - 1e-6).all()


def test_two_cached_fractions_give_a_line_and_the_quadratic_part_is_not_made_up() -> None:
    fit = fit_reuse(measured((40e3, 60e3, 0.0), (0.0, 1.0), noise=0.0))
    assert fit.square_mj is None
    assert fit.prefill_mj(0.5) == pytest.approx(70e3)


def test_without_repeats_there_is_no_interval_and_without_a_cell_no_saving() -> None:
    once = fit_reuse(measured((40e3, 60e3, 0.0), windows=1))
    assert once.saved == pytest.approx(0.6, abs=0.03)
    assert once.saved_low is None
    assert once.saved_reason == Reason(EnergyCode.MEASURED_ONCE)
    assert once.curve["fitted_low_mj"].isna().all()
    no_hit = fit_reuse(measured((40e3, 60e3, 0.0), (0.0, 0.5)))
    assert no_hit.saved is None
    assert no_hit.saved_reason == Reason(EnergyCode.NO_EXACT_HIT)
    no_miss = fit_reuse(measured((40e3, 60e3, 0.0), (0.5, 1.0)))
    assert no_miss.saved_reason == Reason(EnergyCode.NO_MISS)
    assert no_miss.cells["saved"].isna().all()


def test_one_cached_fraction_is_no_curve() -> None:
    with pytest.raises(EnergyError, match="measure a miss and an exact hit"):
        fit_reuse(measured((1e3, 1e3, 1e3), (0.5,)))
    with pytest.raises(EnergyError, match="expected 0"):
        fit_reuse(measured((1e3, 1e3, 1e3))).prefill_mj(1.5)


def test_the_published_number_is_quoted_and_in_no_fit() -> None:
    assert PUBLISHED_SAVING == 0.63
    assert fit_reuse(measured((90e3, 10e3, 0.0))).saved == pytest.approx(0.1, abs=0.01)


def test_a_file_is_read_back_and_a_bad_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "reuse.json"
    path.write_text(measured((37e3, 45e3, 18e3)).model_dump_json())
    assert load_reuse(path) == measured((37e3, 45e3, 18e3))
    document = json.loads(path.read_text())
    document["measurements"][0]["cached_fraction"] = 0.3
    path.write_text(json.dumps(document))
    with pytest.raises(EnergyError, match=r"a cached fraction of 0\.3 is no MISS"):
        load_reuse(path)
    path.write_text(json.dumps(document | {"schema_version": "2.0"}))
    with pytest.raises(EnergyError, match="update moe-observatory"):
        load_reuse(path)
    with pytest.raises(EnergyError, match="cannot be read"):
        load_reuse(tmp_path / "none.json")

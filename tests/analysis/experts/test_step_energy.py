"""Energy of layer-steps: time of each part times its power, by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from observatory.analysis.experts import StepTimes, layer_step_times, step_energy
from observatory.analysis.experts.words import StepCode, sentence
from tests.analysis.experts.models import cost, network

LINEAR = np.array([[[0, 1], [2, 3]]])
LOAD = np.array([[[[6, 0, 1, 1], [2, 0, 1, 5]]]])


def times(*, exchanges: bool = True) -> StepTimes:
    """Experts of 8 s, and exchanges of 1 s each where there are any."""
    model = network(latency_us=1e6, us_per_byte=0.0) if exchanges else None
    return layer_step_times(LOAD, LINEAR, cost(row_s=1.0), network=model)


def power(*rows: tuple[str, str, str | None, float | None]) -> pd.DataFrame:
    """Rows of device, phase, span and milliwatts."""
    return pd.DataFrame(rows, columns=["device_uuid", "phase", "span", "power_mw"])


def test_spans_have_their_power_and_the_rest_that_of_the_phase() -> None:
    measured = power(
        ("a", "decode", None, 100e3), ("a", "decode", "experts", 200e3), ("b", "decode", None, 50e3)
    )
    energy = step_energy(times(), "decode", measured)
    assert energy.covered == 1.0
    assert energy.joules_S == pytest.approx([8 * 250 + 2 * 150])


def test_what_is_covered_stands_for_the_rest() -> None:
    measured = power(
        ("a", "decode", None, None), ("a", "decode", "experts", 100e3), ("a", "decode", "combine", 50e3)
    )
    energy = step_energy(times(), "decode", measured)
    assert energy.covered == pytest.approx(0.9)
    assert energy.joules_S == pytest.approx([850 / 0.9])


@pytest.mark.parametrize(
    ("measured", "covered", "code"),
    [
        (power(("a", "decode", "experts", 1.0)), 0.8, StepCode.POWER_COVERS),
        (power(("a", "decode", None, 1.0), ("b", "decode", None, None)), 0.0, StepCode.POWER_COVERS),
        (power(("a", "prefill", None, 1.0)), 0.0, StepCode.PHASE_WITHOUT_POWER),
        (power(), 0.0, StepCode.PHASE_WITHOUT_POWER),
    ],
)
def test_little_known_power_is_no_energy(measured: pd.DataFrame, covered: float, code: StepCode) -> None:
    energy = step_energy(times(), "decode", measured)
    assert energy.joules_S is None
    assert energy.covered == pytest.approx(covered)
    assert energy.reason is not None
    assert energy.reason.code is code
    assert sentence(energy.reason)


def test_without_a_total_there_is_no_energy() -> None:
    energy = step_energy(times(exchanges=False), "decode", power(("a", "decode", None, 1.0)))
    assert energy.reason is not None
    assert energy.reason.code is StepCode.NO_NETWORK

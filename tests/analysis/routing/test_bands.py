from __future__ import annotations

import math

import pytest

from observatory.analysis.routing.bands import BandCode, ConditionGini, band_words, classify


def texts(*ginis: float | None, floor: float | None = 0.01, limit: float = 0.015) -> dict[str, ConditionGini]:
    return {
        f"text {i}": ConditionGini(gini=gini, floor=floor, uniform_limit=limit)
        for i, gini in enumerate(ginis)
    }


@pytest.mark.parametrize(
    ("ginis", "band"),
    [
        ((0.105, 0.150, 0.195), "data-resilient"),
        ((0.105, 0.196), "intermediate"),
        ((0.25, 0.30, 0.38), "persistently concentrated"),
        ((0.25, 0.30, 0.24), "intermediate"),
        ((0.10, 0.30), "intermediate"),
        ((0.012, 0.014), "indistinguishable from uniform at this sample size"),
        ((0.012, 0.016), "data-resilient"),
    ],
)
def test_bands_at_their_boundaries(ginis: tuple[float, ...], band: str) -> None:
    assert classify(texts(*ginis)).name == band


def test_concentration_must_survive_the_removal_of_the_floor() -> None:
    # sqrt(0.26**2 - 0.12**2) = 0.231: what is left without sampling noise lies below the boundary.
    assert classify(texts(0.26, 0.26, floor=0.12, limit=0.15)).name == "intermediate"
    assert classify(texts(0.26, 0.26, floor=0.05, limit=0.07)).name == "persistently concentrated"


def test_even_a_high_gini_means_nothing_where_uniform_routing_reaches_it() -> None:
    band = classify(texts(0.30, 0.32, floor=0.29, limit=0.35))
    assert band.name == "indistinguishable from uniform at this sample size"
    assert band.reason.code is BandCode.AS_UNIFORM
    assert [band.reason.values[name] for name in ("least", "most", "low", "high")] == [0.30, 0.32, 0.35, 0.35]
    assert band_words(band.reason) == (
        "Gini 0.300 to 0.320 on 2 real texts; uniform routing itself reaches 0.350"
    )


def test_without_two_texts_or_without_floors_there_is_no_band() -> None:
    assert classify({}).name is None
    assert classify(texts(0.3)).name is None
    assert classify(texts(0.3, None, math.nan)).name is None
    band = classify(texts(0.3, 0.3, floor=None))
    assert band.name is None
    assert band.reason.document() == {"code": "no_floor", "conditions": "text 0, text 1"}

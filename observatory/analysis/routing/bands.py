"""Bands: does a model's imbalance come from the data, or stay whatever the data?

DODOCO (arXiv 2605.20982) calls models data-resilient (0.105 and 0.150 on wikitext) or persistently
concentrated (above 0.24 on every real text) and leaves one between. 0.24 is the only boundary it gives.
The rest is ours:

* Resilient at 0.195, halfway between its highest resilient value and its boundary, on every real text,
  with the sampling floor left in: sampling only ever raises Gini.
* Concentrated when every real text lies above 0.24 even after the floor is taken out. Independent
  spreads add in squares, so what remains is sqrt(G**2 - floor**2).
* Indistinguishable from uniform when no real text exceeds what uniform routing itself reaches at that
  sample size (`gini_uniform_limit`): then there is no imbalance to put into a band.
* Intermediate otherwise. One text is not "every text": with fewer than two there is no band.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from pydantic import JsonValue

from observatory.reasons import Reason

RESILIENT_UP_TO = 0.195
CONCENTRATED_ABOVE = 0.24
_FEWEST_TEXTS = 2

BandName = Literal[
    "data-resilient",
    "intermediate",
    "persistently concentrated",
    "indistinguishable from uniform at this sample size",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditionGini:
    """Imbalance of one model on one real text.

    Attributes:
        gini: model Gini (mean over layers); None when nothing was assigned.
        floor: sampling floor at the same sample size; None when unknown.
        uniform_limit: what uniform routing hardly exceeds at that sample size; None when unknown.
    """

    gini: float | None
    floor: float | None = None
    uniform_limit: float | None = None


class BandCode(StrEnum):
    """What decided on a band; the values of each are the names in its words."""

    FEW_TEXTS = "few_texts"
    NO_FLOOR = "no_floor"
    AS_UNIFORM = "as_uniform"
    ALL_ABOVE = "all_above"
    NONE_ABOVE = "none_above"
    BETWEEN = "between"


_SHOWN = "Gini {least:.3f} to {most:.3f} on {texts} real texts"
_WORDS = {
    BandCode.FEW_TEXTS: "real texts measured: {texts}, at least {needed} needed",
    BandCode.NO_FLOOR: "no sampling floor on {conditions}",
    BandCode.AS_UNIFORM: _SHOWN + "; uniform routing itself reaches {span}",
    BandCode.ALL_ABOVE: _SHOWN + "; {span} without the sampling floor, all above {above}",
    BandCode.NONE_ABOVE: _SHOWN + ", none above {up_to}, sampling floor included",
    BandCode.BETWEEN: _SHOWN
    + "; {span} without the sampling floor: neither all above {above} nor all with it up to {up_to}",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """A band and why.

    Attributes:
        name: the band; None when there is none.
        reason: a `BandCode` with the numbers that decided.
    """

    name: BandName | None
    reason: Reason


def band_words(reason: Reason) -> str:
    """The reason of a band in words, with the numbers that decided."""
    values = dict(reason.values)
    if "low" in values:
        low, high = f"{values['low']:.3f}", f"{values['high']:.3f}"
        values["span"] = low if low == high else f"{low} to {high}"
    return _WORDS[BandCode(reason.code)].format(**values)


def classify(texts: Mapping[str, ConditionGini]) -> Band:
    """Band of one model.

    Args:
        texts: condition name -> Gini on it. Real texts only: mock and shuffled tokens decide nothing.
    """
    measured = {
        name: text for name, text in texts.items() if text.gini is not None and not math.isnan(text.gini)
    }
    if len(measured) < _FEWEST_TEXTS:
        return _band(None, BandCode.FEW_TEXTS, texts=len(measured), needed=_FEWEST_TEXTS)
    unfloored = [name for name, text in measured.items() if text.floor is None or math.isnan(text.floor)]
    if unfloored:
        return _band(None, BandCode.NO_FLOOR, conditions=", ".join(unfloored))
    gini = {name: float(text.gini or 0.0) for name, text in measured.items()}
    remaining = [_without_floor(gini[name], measured[name].floor or 0.0) for name in measured]
    limits = [text.uniform_limit or 0.0 for text in measured.values()]
    shown = {"least": min(gini.values()), "most": max(gini.values()), "texts": len(measured)}
    span = {"low": min(remaining), "high": max(remaining)}
    if all(value <= limit for value, limit in zip(gini.values(), limits, strict=True)):
        name: BandName = "indistinguishable from uniform at this sample size"
        return _band(name, BandCode.AS_UNIFORM, **shown, low=min(limits), high=max(limits))
    if all(value > CONCENTRATED_ABOVE for value in remaining):
        above = {"above": CONCENTRATED_ABOVE}
        return _band("persistently concentrated", BandCode.ALL_ABOVE, **shown, **span, **above)
    if max(gini.values()) <= RESILIENT_UP_TO:
        return _band("data-resilient", BandCode.NONE_ABOVE, **shown, up_to=RESILIENT_UP_TO)
    bounds = {"above": CONCENTRATED_ABOVE, "up_to": RESILIENT_UP_TO}
    return _band("intermediate", BandCode.BETWEEN, **shown, **span, **bounds)


def _band(name: BandName | None, code: BandCode, **values: JsonValue) -> Band:
    return Band(name=name, reason=Reason(code, values))


def _without_floor(gini: float, floor: float) -> float:
    return math.sqrt(max(0.0, gini**2 - floor**2))

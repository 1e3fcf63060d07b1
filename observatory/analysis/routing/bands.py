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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """A band and why.

    Attributes:
        name: the band; None when there is none.
        reason: one sentence with the numbers that decided.
    """

    name: BandName | None
    reason: str


def classify(texts: Mapping[str, ConditionGini]) -> Band:
    """Band of one model.

    Args:
        texts: condition name -> Gini on it. Real texts only: mock and shuffled tokens decide nothing.
    """
    known = {
        name: text for name, text in texts.items() if text.gini is not None and not math.isnan(text.gini)
    }
    if len(known) < _FEWEST_TEXTS:
        return Band(name=None, reason=f"{len(known)} real text(s) measured, at least {_FEWEST_TEXTS} needed")
    unfloored = [name for name, text in known.items() if text.floor is None or math.isnan(text.floor)]
    if unfloored:
        return Band(name=None, reason=f"no sampling floor on {', '.join(unfloored)}")
    gini = {name: float(text.gini or 0.0) for name, text in known.items()}
    remaining = {name: _without_floor(gini[name], known[name].floor or 0.0) for name in known}
    shown = f"Gini {min(gini.values()):.3f} to {max(gini.values()):.3f} on {len(known)} real texts"
    if all(gini[name] <= (text.uniform_limit or 0.0) for name, text in known.items()):
        limits = _span(text.uniform_limit or 0.0 for text in known.values())
        return Band(
            name="indistinguishable from uniform at this sample size",
            reason=f"{shown}; uniform routing itself reaches {limits}",
        )
    if all(value > CONCENTRATED_ABOVE for value in remaining.values()):
        return Band(
            name="persistently concentrated",
            reason=f"{shown}; {_span(remaining.values())} without the sampling floor, all above "
            f"{CONCENTRATED_ABOVE}",
        )
    if max(gini.values()) <= RESILIENT_UP_TO:
        return Band(
            name="data-resilient", reason=f"{shown}, none above {RESILIENT_UP_TO}, sampling floor included"
        )
    return Band(
        name="intermediate",
        reason=f"{shown}; {_span(remaining.values())} without the sampling floor: neither all above "
        f"{CONCENTRATED_ABOVE} nor all with it up to {RESILIENT_UP_TO}",
    )


def _without_floor(gini: float, floor: float) -> float:
    return math.sqrt(max(0.0, gini**2 - floor**2))


def _span(values: Iterable[float]) -> str:
    ordered = sorted(values)
    low, high = f"{ordered[0]:.3f}", f"{ordered[-1]:.3f}"
    return low if low == high else f"{low} to {high}"

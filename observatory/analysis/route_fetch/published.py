"""Constants that a publication states, for fabrics that were not measured here.

arXiv 2606.01502 ("Move the Query, Not the Cache"), four H100 nodes with NDR-200 and device-initiated RDMA:
a probe of about 16 us; 18 to 25 GB/s for small transfers, which the rate of issuing limits, not the link; a
splice of 2.8 to 3.1 ms, flat from 55 to 4096 tokens; a gather of 2048 entries 1.3 ms from one holder; a merge
of at most 25 us. Attention at the holder and prefill are not among them: costs that need these stay unknown,
or are compared without them where both sides do the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from observatory.analysis.route_fetch.costs import TERMS, Constants, StageCosts
from observatory.errors import BenchmarkError
from observatory.run.documents.route_fetch import Stage

PREFIX = "published:"
_DRAWS = 200
#: Entry that a gather of 2048 was published for: 512 + 64 values of two bytes.
_GATHERED_BYTES = 2048 * 1152


@dataclass(frozen=True, slots=True)
class _Published:
    """Source and range of every coefficient, microseconds per unit of a term of ``costs.TERMS``."""

    source: str
    ranges: dict[Stage, dict[str, tuple[float, float]]]


PUBLISHED = {
    "h100-ndr200": _Published(
        source="arXiv 2606.01502, H100, NDR-200, device-initiated RDMA",
        ranges={
            "transfer": {
                "trip": (14.5, 17.5),
                "byte_out": (1e-3 / 25, 1e-3 / 18),
                "byte_back": (1e-3 / 25, 1e-3 / 18),
            },
            "gather": {"byte": (1300 / _GATHERED_BYTES, 1300 / _GATHERED_BYTES)},
            "merge": {"call": (0.0, 25.0)},
            "rotate": {"entry_call": (2800.0, 3100.0)},
        },
    ),
}


def published_constants(name: str, *, seed: int = 0) -> Constants:
    """Constants of a publication: the middle of each range, and draws from it for intervals.

    Raises:
        BenchmarkError: no such publication is known here.
    """
    if name not in PUBLISHED:
        raise BenchmarkError(
            f"no constants are published under {name[:60]!r}", expected=f"one of {', '.join(PUBLISHED)}"
        )
    published = PUBLISHED[name]
    generator = np.random.default_rng(seed)
    shared_B = generator.random(_DRAWS)  # there and back run over the same link
    stages = {}
    for stage, terms in published.ranges.items():
        ends_2F = np.array([terms.get(term, (0.0, 0.0)) for term in TERMS[stage]]).T
        share_BF = generator.random((_DRAWS, len(TERMS[stage])))
        if stage == "transfer":
            share_BF[:, 1:] = shared_B[:, None]
        stages[stage] = StageCosts(
            us_F=ends_2F.mean(axis=0), samples_BF=ends_2F[0] + share_BF * (ends_2F[1] - ends_2F[0])
        )
    return Constants(grade="published", source=published.source, shape=None, holders=1, stages=stages)

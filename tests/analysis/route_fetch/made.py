"""Measurements made from constants that are known."""

from __future__ import annotations

import numpy as np

from observatory.analysis.route_fetch.costs import TERMS, Sizes, quantities
from observatory.cli.parsing import parse_shape
from observatory.run.documents.route_fetch import Option, RouteFetchCase, RouteFetchResult, Stage

#: Microseconds per unit of each term: a link of 12.5 MB/s with trips of 400 us.
TRUTH: dict[Stage, tuple[float, ...]] = {
    "transfer": (400.0, 0.08, 0.08),
    "gather": (20.0, 2e-4),
    "attend": (100.0, 2e-5, 1e-4),
    "merge": (60.0, 2e-4),
    "rotate": (80.0, 2e-4, 90.0, 3e-4),
    "experts": (50.0, 2e-5, 1e-4),
}


def made_result(
    *texts: str, points: int = 64, noise: float = 0.0, repeats: int = 5, holders: int = 1, seed: int = 0
) -> RouteFetchResult:
    """What a benchmark would give if times were exactly the closed forms, times log-normal noise."""
    generator = np.random.default_rng(seed)
    shapes = tuple(parse_shape(text) for text in texts)
    cases = []
    for index, shape in enumerate(shapes):
        expert = shape.kind == "expert"
        options: tuple[Option, ...] = ("route", "fetch", "local") if expert else ("route", "fetch")
        for point in range(points):
            rows, size = np.exp(generator.uniform(np.log(8), np.log(800), 2)).astype(int).tolist()
            rows, layers = max(1, rows // shape.heads) * shape.heads, 1 if expert else (1, 3)[point % 2]
            for option in options:
                sizes = Sizes(rows=rows, size=size, layers=layers, holders=holders)
                stages = {
                    stage: np.exp(noise * generator.standard_normal(repeats))
                    * sum(
                        cost * float(terms.get(term, 0.0))
                        for term, cost in zip(TERMS[stage], TRUTH[stage], strict=True)
                    )
                    for stage, terms in quantities(shape, option, sizes).items()
                }
                cases.append(
                    RouteFetchCase(
                        rows=rows,
                        size=size,
                        layers=layers,
                        shape=index,
                        option=option,
                        total_us_R=tuple(sum(stages.values()).tolist()),
                        stage_us_R={
                            stage: tuple(us.tolist()) for stage, us in stages.items() if stage != "transfer"
                        },
                        correct=True,
                        worst_error=0.0,
                    )
                )
    return RouteFetchResult(
        created_unix_s=0.0,
        backend="gloo",
        device="cpu",
        node_of_P=tuple(range(holders + 1)),
        warmup=1,
        repeats=repeats,
        shapes=shapes,
        cases=tuple(cases),
    )

"""Measurements made from constants that are known."""

from __future__ import annotations

import numpy as np

from observatory.analysis.route_fetch.costs import TERMS, Sizes, quantities
from observatory.cli.parsing import parse_shape
from observatory.run.documents.route_fetch import Option, Point, RouteFetchCase, RouteFetchResult, Stage

#: Microseconds per unit of each term: a link of 12.5 MB/s with trips of 400 us.
TRUTH: dict[Stage, tuple[float, ...]] = {
    "transfer": (400.0, 0.08, 0.08),
    "gather": (20.0, 2e-4),
    "attend": (100.0, 2e-5, 1e-4),
    "merge": (60.0, 2e-4),
    "rotate": (80.0, 2e-4, 90.0, 3e-4),
    "experts": (50.0, 2e-5, 1e-4),
    "prefill": (900.0, 1e-5, 1e-2),
    "splice": (200.0, 5e-4),
}


def made_result(
    *texts: str,
    points: int = 64,
    noise: float = 0.0,
    repeats: int = 5,
    holders: int = 1,
    seed: int = 0,
    edits: int = 0,
    decoder: tuple[int, int] | None = None,
) -> RouteFetchResult:
    """What a benchmark would give if times were exactly the closed forms, times log-normal noise."""
    generator = np.random.default_rng(seed)
    shapes = tuple(parse_shape(text, decoder=decoder) for text in texts)
    cases = []
    for index, shape in enumerate(shapes):
        expert = shape.kind == "expert"
        options: tuple[Option, ...] = ("route", "fetch", "local") if expert or decoder else ("route", "fetch")
        for number in range(points + edits):
            rows, size = np.exp(generator.uniform(np.log(8), np.log(800), 2)).astype(int).tolist()
            point = Point(
                rows=0 if number >= points else max(1, rows // shape.heads) * shape.heads,
                size=size,
                layers=1 if expert else (1, 3)[number % 2],
                suffix=rows if number >= points else 0,
            )
            for option in options if number < points else ("splice", "trim"):
                sizes = Sizes(**point.model_dump(), holders=holders)
                stages = {
                    stage: np.exp(noise * generator.standard_normal(repeats))
                    * sum(
                        cost * float(terms.get(term, 0.0))
                        for term, cost in zip(TERMS[stage], TRUTH[stage], strict=True)
                    )
                    for stage, terms in quantities(shape, option, sizes).items()  # type: ignore[arg-type]
                }
                cases.append(
                    RouteFetchCase(
                        **point.model_dump(),
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

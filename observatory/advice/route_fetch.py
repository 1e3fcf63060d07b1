"""Constants by name, and what to do with the experts of a run: send tokens, fetch weights, or keep copies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from observatory.analysis.route_fetch.costs import Constants
from observatory.analysis.route_fetch.fitting import HeldOut, fit_shape, hold_out_points
from observatory.analysis.route_fetch.published import PREFIX, published_constants
from observatory.errors import BenchmarkError
from observatory.run.documents.route_fetch import Shape, load_route_fetch

Answer = tuple[Shape, Constants, HeldOut | None]


def known_constants(
    name: str, shapes: Sequence[Shape], *, bootstrap: int = 200, seed: int = 0
) -> tuple[list[Answer], list[str]]:
    """The constants for each shape, how well they predict, and notes on what they do not cover.

    Args:
        name: ``published:NAME``, or the file of a measurement.
        shapes: what is asked about; empty for all shapes of the measurement.
        bootstrap: samples.
        seed: of folds and samples.

    Raises:
        BenchmarkError: unknown constants, or a kind of shape that was not measured.
    """
    if name.startswith(PREFIX):
        if not shapes:
            raise BenchmarkError("published constants are for no shape in particular; give --shape")
        constants = published_constants(name.removeprefix(PREFIX), seed=seed)
        notes = [
            f"published constants ({constants.source}): nothing was measured on this fabric; attention and "
            "experts are left out on both sides, and prefill is not known"
        ]
        return [(shape, constants, None) for shape in shapes], notes
    result = load_route_fetch(Path(name))
    source = Path(name).name
    names = [shape.name for shape in result.shapes]
    answers: list[Answer] = []
    notes = list(result.notes)
    for shape in shapes or result.shapes:
        index = next((at for at, other in enumerate(result.shapes) if other.kind == shape.kind), None)
        if shape.name in names:
            index = names.index(shape.name)
        if index is None:
            raise BenchmarkError(
                f"{source} has no measurement of kind {shape.kind}", expected=f"one of {', '.join(names)}"
            )
        constants = fit_shape(result, index, source=source, bootstrap=bootstrap, seed=seed)
        if result.shapes[index] == shape:
            answers.append((shape, constants, hold_out_points(result, index, seed=seed)))
            continue
        other = result.shapes[index]
        notes.append(
            f"{shape.name} {shape.dtype} was not measured; costs are scaled from those of {other.name} "
            f"{other.dtype} by bytes and operations"
        )
        answers.append((shape, constants, None))
    return answers, notes

"""Loads of other tools as routing rows.

Shapes: S steps, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from observatory.errors import InterchangeError
from observatory.interchange.importers.imported import ImportedRun, Rows
from observatory.interchange.importers.sources import Source
from observatory.run.manifest import ModelSpec, MoeLayerSpec
from observatory.run.rows import MAX_EXPERTS, MAX_LOAD, routing_rows
from observatory.text import counted, listing

Int64 = NDArray[np.int64]

#: Counts of one file of which only those that are not zero are stated.
MOST_COUNTS = 1 << 26
#: Counts of one batch of rows.
_BATCH_COUNTS = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Loads:
    """Loads of one source rank.

    Attributes:
        load_SLE: assignments per expert.
        step_S: step numbers, each once.
        layer_L: layer numbers, each once.
        rank: the source rank.
        phase: of all steps.
    """

    load_SLE: NDArray[np.integer]
    step_S: Int64
    layer_L: Int64
    rank: int
    phase: str


def checked_loads(name: str, load_SLE: NDArray[np.generic]) -> NDArray[np.integer]:
    """Check an array of counts.

    Raises:
        InterchangeError: it is not [steps, layers, experts] of whole numbers from 0 to 2^40.
    """
    if load_SLE.ndim != 3 or 0 in load_SLE.shape or load_SLE.shape[2] > MAX_EXPERTS:
        shape = " x ".join(map(str, load_SLE.shape)) or "no"
        raise InterchangeError(
            f"{name} holds {shape} counts", expected=f"steps x layers x experts (at most {MAX_EXPERTS})"
        )
    if load_SLE.dtype.kind not in "iu":
        raise InterchangeError(f"{name} holds {load_SLE.dtype} values", expected="counts as whole numbers")
    whole: NDArray[np.integer] = load_SLE.astype(load_SLE.dtype, copy=False)
    if whole.min() < 0 or whole.max() > MAX_LOAD:
        worst = whole.min() if whole.min() < 0 else whole.max()
        raise InterchangeError(f"{name} holds a count of {worst}", expected="0 to 2**40")
    return whole


def needed_top_k(name: str, top_k: int | None) -> int:
    """Experts of a token, which a format of counts does not state.

    Raises:
        InterchangeError: the user does not state it either.
    """
    if top_k is None:
        raise InterchangeError(
            f"{name} does not state how many experts a token is assigned to", remedy="give it with --top-k"
        )
    return top_k


def loads_run(found: Sequence[Loads], *, name: str, top_k: int, notes: list[str]) -> ImportedRun:
    """A run of loads alone, with the layers that have any assignment.

    Args:
        found: the counts of each rank, of one number of experts.
        name: what its model is called by.
        top_k: experts of a token.
        notes: what a reader must know; grows as rows are taken.
    """
    layers = recorded_layers(found)
    all_of_them = {int(layer) for loads in found for layer in loads.layer_L}
    if others := sorted(all_of_them - layers):
        names = listing([str(layer) for layer in others], most=8)
        notes.append(f"without any assignment, dense or not recorded: layers {names}")
    experts = found[0].load_SLE.shape[2]
    return ImportedRun(
        version=None,
        model=ModelSpec(
            name=name,
            moe_layers=tuple(
                MoeLayerSpec(layer=layer, module=f"layer {layer}", experts=experts, top_k=top_k)
                for layer in sorted(layers)
            ),
        ),
        ranks=max(loads.rank for loads in found) + 1,
        rows=load_rows(found, top_k=top_k, notes=notes),
        notes=notes,
    )


def dense_loads(
    source: Source,
    stated: Mapping[tuple[int, int], NDArray[np.integer]],
    *,
    experts: int,
    rank: int,
    phase: str,
) -> Loads:
    """Loads of one rank from counts that are stated by step and layer.

    Args:
        source: the file, for messages.
        stated: counts of the first experts, by step and layer; those of other experts are 0.
        experts: E.
        rank: the source rank.
        phase: of all steps.

    Raises:
        InterchangeError: counts of more experts, too many counts, or counts that cannot be.
    """
    steps, layers = (sorted({key[place] for key in stated}) for place in (0, 1))
    if len(steps) * len(layers) * experts > MOST_COUNTS:
        raise source.refused(f"stands for over {MOST_COUNTS:,} counts", remedy="import a part of it")
    load_SLE = np.zeros((len(steps), len(layers), experts), dtype=np.int64)
    place_S, place_L = ({number: place for place, number in enumerate(item)} for item in (steps, layers))
    for (step, layer), counts in stated.items():
        if len(counts) > experts:
            raise source.refused(f"has {len(counts)} experts", expected=f"at most {experts}")
        load_SLE[place_S[step], place_L[layer], : len(counts)] = counts
    return Loads(
        load_SLE=checked_loads(source.name, load_SLE),
        step_S=np.array(steps, dtype=np.int64),
        layer_L=np.array(layers, dtype=np.int64),
        rank=rank,
        phase=phase,
    )


def load_rows(found: Sequence[Loads], *, top_k: int, notes: list[str]) -> Iterator[Rows]:
    """Routing rows; tokens are assignments over ``top_k``, rounded up.

    Steps of a rank without any assignment have no rows, nor have layers without any on all ranks.

    Args:
        found: the counts of each rank.
        top_k: experts of a token.
        notes: gets what a reader must know.
    """
    layers = recorded_layers(found)
    for loads in found:
        yield from _rows_of_rank(loads, layers, top_k, notes)


def recorded_layers(found: Sequence[Loads]) -> set[int]:
    """Layers with an assignment on any rank; the others are dense or were not recorded."""
    return {int(layer) for loads in found for layer in loads.layer_L[loads.load_SLE.any(axis=2).any(axis=0)]}


def _rows_of_rank(loads: Loads, layers: set[int], top_k: int, notes: list[str]) -> Iterator[Rows]:
    steps, places, experts = loads.load_SLE.shape
    recorded_L = np.isin(loads.layer_L, sorted(layers))
    rounded = 0
    batch = max(1, _BATCH_COUNTS // (places * experts))
    for first in range(0, steps, batch):
        load_NE = np.asarray(loads.load_SLE[first : first + batch], dtype=np.int64).reshape(-1, experts)
        step_N = np.repeat(loads.step_S[first : first + batch], places)
        layer_N = np.tile(loads.layer_L, len(step_N) // places)
        sum_N = load_NE.sum(axis=1)
        kept = (sum_N.reshape(-1, places).any(axis=1)[:, None] & recorded_L).reshape(-1)
        rounded += int((sum_N % top_k != 0).sum())
        if kept.any():
            yield Rows(
                table="routing",
                rank=loads.rank,
                batch=routing_rows(
                    step_N=step_N[kept],
                    phase_N=loads.phase,
                    layer_N=layer_N[kept],
                    source_rank=loads.rank,
                    tokens_N=-(-sum_N[kept] // top_k),
                    load_NE=load_NE[kept],
                ),
            )
    if rounded:
        notes.append(
            f"rank {loads.rank}: assignments of {counted(rounded, 'row')} are no multiple of {top_k}; "
            "their tokens are rounded up"
        )

"""Traffic matrices in bytes, step by step and layer by layer, from the routing rows of a run.

Shapes: S steps, R expert-parallel ranks.

One assignment is one row of the hidden size sent to the expert's rank and one sent back; bytes are exact for
dispatchers that send one copy per assignment and an upper bound for those that deduplicate.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from observatory.analysis.parallel.placement import PlacementChoice
from observatory.analysis.parallel.scan import all_ranks, place, placement_rule
from observatory.analysis.parallel.traffic import Sources, traffic_matrices
from observatory.errors import PlacementError, RunError
from observatory.run.documents.bench import MAX_ROW_BYTES, Traffic
from observatory.run.documents.expert_bench import ELEMENT_BYTES

if TYPE_CHECKING:
    from observatory.run import Run
    from observatory.run.manifest import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CapturedTraffic:
    """Traffic of one layer in one step.

    Attributes:
        step: step of the run.
        phase: phase of the step.
        layer: MoE layer.
        placement: name of the placement of experts on ranks.
        rows_RR: rows (assignments) from source rank i to expert rank j.
        row_bytes: bytes of one row.
        sources: how captured ranks became these source ranks; the last kind is an estimate.
    """

    step: int
    phase: str
    layer: int
    placement: str
    rows_RR: NDArray[np.int64]
    row_bytes: int
    sources: Sources

    def traffic(self) -> Traffic:
        """The dispatch as a record that can be replayed."""
        return Traffic(
            pattern="captured",
            send_bytes_PP=tuple(map(tuple, self.bytes_RR.tolist())),
            row_bytes=self.row_bytes,
            step=self.step,
            phase=self.phase,
            layer=self.layer,
            role="dispatch",
        )

    @property
    def bytes_RR(self) -> NDArray[np.int64]:
        """Bytes from source rank i to expert rank j, the dispatch; the combine is its transpose."""
        return self.rows_RR * self.row_bytes


def row_bytes(model: ModelSpec) -> int:
    """Bytes of one dispatched row: hidden size times bytes per element of the model's dtype.

    Raises:
        RunError: the manifest does not say one of the two, or no real one.
    """
    if not model.hidden_size:
        raise RunError(
            f"the run of {model.name} does not say its hidden size, so rows have no bytes; "
            "expected hidden_size in the manifest: give --row-bytes"
        )
    element = ELEMENT_BYTES.get((model.dtype or "").removeprefix("torch."))
    if element is None:
        raise RunError(
            f"the run of {model.name} has dtype {model.dtype!r}, whose size is not known here; "
            f"expected one of {', '.join(ELEMENT_BYTES)}: give --row-bytes"
        )
    if model.hidden_size * element > MAX_ROW_BYTES:
        raise RunError(
            f"the run of {model.name} says a hidden size of {model.hidden_size}; rows of at most "
            f"{MAX_ROW_BYTES >> 20} MiB are expected: give --row-bytes"
        )
    return model.hidden_size * element


def captured_traffic(
    run: Run,
    *,
    ep: int,
    placement: PlacementChoice = "auto",
    bytes_per_row: int | None = None,
    phase: str | None = None,
    layers: Collection[int] | None = None,
    steps: int | None = None,
) -> Iterator[CapturedTraffic]:
    """Stream the traffic matrices of a run under an EP degree and placement.

    Args:
        run: an open run.
        ep: R.
        placement: a name of ``PLACEMENT_NAMES``, or a placement file.
        bytes_per_row: bytes of one row; None takes them from the manifest.
        phase: only this phase.
        layers: only these layers.
        steps: at most this many steps of each phase and layer, spread evenly over those in a block.

    Raises:
        PlacementError: the degree or the file does not fit the model.
        RunError: the bytes of a row are unknown, or rows fold several steps.
    """
    each = bytes_per_row or row_bytes(run.manifest.model)
    rule = placement_rule(placement, run.manifest.topology)
    wanted = None if steps is None else _evenly(run, phase, layers, steps)
    for block in run.iter_loads(phase=phase, layers=layers):
        if np.any(block.window_steps_S != 1):
            raise RunError(
                f"rows of layer {block.layer} fold {int(block.window_steps_S.max())} steps, so no step's own "
                "traffic is known; capture the run with --window-steps 1"
            )
        kept_S = np.isin(block.step_S, sorted(wanted[block.phase])) if wanted is not None else slice(None)
        layout = place(rule, layer=block.layer, experts=block.experts, ep=ep)
        load_SPE = all_ranks(block, run.manifest.topology.ranks)[kept_S]
        traffic_SRR, sources = traffic_matrices(load_SPE, layout)
        for step, traffic_RR in zip(block.step_S[kept_S], traffic_SRR, strict=True):
            yield CapturedTraffic(
                step=int(step),
                phase=block.phase,
                layer=block.layer,
                placement=layout.name,
                rows_RR=whole_rows(traffic_RR),
                row_bytes=each,
                sources=sources,
            )


def departures(run: Run, *, ep: int, placement: PlacementChoice = "auto") -> list[str]:
    """In what the matrices of `captured_traffic` depart from what the run exchanged, one sentence each.

    Matrices come from routing rows: a degree that the run did not have is a what-if, but at the run's own
    degree they read as what was exchanged, which they are not under another placement or for a dispatcher
    that does not send one copy per assignment.

    Raises:
        PlacementError: the degree or the file does not fit the model.
    """
    topology, config = run.manifest.topology, run.manifest.config
    if topology.ranks != ep or ep == 1:
        return []
    rule = placement_rule(placement, run.manifest.topology)
    shown = [
        place(rule, layer=item.layer, experts=item.experts, ep=ep) for item in run.manifest.model.moe_layers
    ]
    name = shown[0].name if shown else "linear"
    held = topology.placement
    notes = []
    if held is None:
        notes.append(f"the run does not say which rank held which expert; placement {name} is assumed")
    elif any(layout.rank_of_E.tolist() != [ranks[0] for ranks in held] for layout in shown):
        notes.append(f"the run had its experts on other ranks than placement {name}, which is shown here")
    elif any(len(ranks) > 1 for ranks in held):
        notes.append("experts of the run had replicas; here all tokens of an expert go to its home")
    if config.get("deduplicate") is True:
        notes.append("the run sent a token once per destination rank; here every assignment is sent")
    if config.get("algorithm") == "gather":
        notes.append("the run gathered all tokens on all ranks; here every assignment is sent to its expert")
    return notes


def traffic_notes(
    run: Run, captured: Iterable[CapturedTraffic], *, ep: int, placement: PlacementChoice = "auto"
) -> tuple[str, ...]:
    """Notes on a run's traffic: where its source ranks come from, departures, the run's problems."""
    sources = sorted({str(item.sources) for item in captured})
    return (
        *(f"source ranks: {text}" for text in sources),
        *departures(run, ep=ep, placement=placement),
        *run.problems,
    )


def whole_rows(traffic_RR: NDArray[np.int64] | NDArray[np.float64]) -> NDArray[np.int64]:
    """Whole numbers of rows that add up to the same total; the largest remainders are rounded up."""
    down_RR = np.floor(traffic_RR).astype(np.int64)
    short = round(float(np.sum(traffic_RR))) - int(down_RR.sum())
    if short > 0:
        remainder = (traffic_RR - down_RR).ravel()
        down_RR.flat[np.argsort(-remainder, kind="stable")[:short]] += 1
    return down_RR


def _evenly(run: Run, phase: str | None, layers: Collection[int] | None, steps: int) -> dict[str, set[int]]:
    """At most ``steps`` steps of each phase, from its first to its last."""
    if steps < 1:
        raise PlacementError(f"{steps} steps were asked for; expected at least 1")
    ranks_of: dict[str, set[int]] = {}
    for block in run.iter_loads(phase=phase, layers=layers):
        ranks_of.setdefault(block.phase, set()).update(int(step) for step in block.step_S)
    chosen = {}
    for name, ranks in ranks_of.items():
        in_order = sorted(ranks)
        places = np.linspace(0, len(in_order) - 1, min(steps, len(in_order))).round().astype(int)
        chosen[name] = {in_order[place] for place in places}
    return chosen

"""Constants by name, what follows from them, and what to do with the experts of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import JsonValue

from observatory.advice.placement_layouts import current_layout
from observatory.analysis.parallel.step_loads import StepLoads
from observatory.analysis.route_fetch.costs import MATRICES, NEAR, Constants
from observatory.analysis.route_fetch.document import accuracy_rows
from observatory.analysis.route_fetch.experts import Choice, ExpertDecisions, ExpertShape, decide_experts
from observatory.analysis.route_fetch.fitting import HeldOut, fit_shape, hold_out_points
from observatory.analysis.route_fetch.published import PREFIX, published_constants
from observatory.errors import BenchmarkError
from observatory.reasons import Reason
from observatory.run.documents.route_fetch import ELEMENT_BYTES, Shape, load_route_fetch
from observatory.text import listing

if TYPE_CHECKING:
    from observatory.run import Run
    from observatory.run.manifest import ModelSpec

#: A pick that is right less often, where it matters, is not to be relied on.
_RELIABLE = 0.95

Answer = tuple[Shape, Constants, HeldOut | None]


class RouteFetchCode(StrEnum):
    """What is concluded from constants, and what a verdict on the experts of a run states."""

    FETCH_FROM = "fetch_from"
    ALWAYS_ROUTE = "always_route"
    ALWAYS_FETCH = "always_fetch"
    UNRELIABLE = "unreliable"
    MEASURE_AGAIN = "measure_again"

    SEND_ALL = "send_all"
    CHANGE = "change"
    UNCERTAIN = "uncertain"
    KEEP_COST = "keep_cost"
    BREAK_EVEN = "break_even"
    RANKS_NOT_MEASURED = "ranks_not_measured"
    SIZES_NOT_MEASURED = "sizes_not_measured"
    OTHER_HOSTS = "other_hosts"
    WITHOUT_COMPUTE = "without_compute"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertAdvice:
    """What to do with the experts of a run.

    Attributes:
        layers: numbers of the MoE layers.
        ranks: P.
        placement: name of today's placement.
        constants: what times rest on.
        decisions: what to do with each expert.
        verdict: codes and values.
    """

    layers: tuple[int, ...]
    ranks: int
    placement: str
    constants: Constants
    decisions: ExpertDecisions
    verdict: tuple[Reason, ...]


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
            "experts are left out on both sides, and nothing is published of prefill"
        ]
        return [(shape, constants, None) for shape in shapes], notes
    result = load_route_fetch(Path(name))
    source = Path(name).name
    names = [shape.name for shape in result.shapes]
    answers: list[Answer] = []
    notes = list(result.notes)
    for wanted in shapes or result.shapes:
        index = next((at for at, other in enumerate(result.shapes) if other.kind == wanted.kind), None)
        if wanted.name in names:
            index = names.index(wanted.name)
        shape = wanted
        if index is None:
            raise BenchmarkError(
                f"{source} has no measurement of kind {shape.kind}", expected=f"one of {', '.join(names)}"
            )
        held_out = hold_out_points(result, index, seed=seed)
        constants = fit_shape(result, index, held_out=held_out, source=source, bootstrap=bootstrap, seed=seed)
        other = result.shapes[index]
        if (other.name, other.dtype) == (shape.name, shape.dtype):
            shape = other  # with the layers that prefill, where these were measured
        else:
            notes.append(
                f"{shape.name} {shape.dtype} was not measured; costs are scaled from those of {other.name} "
                f"{other.dtype} by bytes and operations"
            )
        answers.append((shape, constants, held_out))
    return answers, notes


def expert_shape(model: ModelSpec) -> ExpertShape:
    """Sizes of a model's experts.

    Raises:
        BenchmarkError: the manifest does not state them.
    """
    dtype = (model.dtype or "").removeprefix("torch.")
    if not model.hidden_size or not model.expert_bytes or dtype not in ELEMENT_BYTES:
        raise BenchmarkError(
            f"the run of {model.name} states hidden size {model.hidden_size}, expert bytes "
            f"{model.expert_bytes} and dtype {model.dtype}",
            expected=f"all three, the dtype one of {', '.join(ELEMENT_BYTES)}",
            remedy="capture a model that states them",
        )
    return ExpertShape(
        hidden=model.hidden_size, expert_bytes=model.expert_bytes, element_bytes=ELEMENT_BYTES[dtype]
    )


def run_shape(model: ModelSpec) -> Shape:
    """The shape that a measurement for a model's experts has.

    Raises:
        BenchmarkError: as of `expert_shape`.
    """
    sizes = expert_shape(model)
    dtype = (model.dtype or "").removeprefix("torch.")
    return Shape.model_validate(
        {"kind": "expert", "dtype": dtype, "key": sizes.hidden, "value": sizes.hidden}
    )


def advise_experts(
    run: Run,
    loads: StepLoads,
    constants: Constants,
    *,
    ranks: int,
    held_out: HeldOut | None = None,
    copies: int = 0,
    train_share: float = 0.5,
    seed: int = 0,
) -> ExpertAdvice:
    """Which experts of a run to fetch or keep, chosen on its first steps and judged on the others.

    Args:
        run: an open run.
        loads: of one of its phases.
        constants: for the shape of its experts.
        ranks: P.
        held_out: how well the constants predict what they were not fitted to.
        copies: experts of a layer that a rank may keep besides its own.
        train_share: share of the steps that the choice is made on.
        seed: of resamples.

    Raises:
        BenchmarkError: too few steps, or a manifest that does not state the experts' sizes.
        PlacementError: the experts do not fill the ranks.
    """
    slot_LPK, name = current_layout(run, loads, ranks=ranks, given=None)
    layers, experts = loads.load_SLE.shape[1:]
    rank_of_LE = np.zeros((layers, experts), dtype=np.int64)
    for rank in reversed(range(ranks)):  # of several holders the first counts
        for layer in range(layers):
            rank_of_LE[layer, slot_LPK[layer, rank]] = rank
    decisions = decide_experts(
        loads.load_SLE,
        rank_of_LE,
        expert_shape(run.manifest.model),
        constants,
        ranks=ranks,
        copies=copies,
        train_share=train_share,
        seed=seed,
    )
    unreliable = [] if held_out is None else _unreliable(accuracy_rows(held_out, constants))
    return ExpertAdvice(
        layers=loads.layers,
        ranks=ranks,
        placement=name,
        constants=constants,
        decisions=decisions,
        verdict=(
            *_verdict(decisions, constants, ranks, copies),
            *_not_measured(decisions, constants, run.manifest.model, ranks),
            *_other_hosts(run, constants),
            *unreliable,
            *_next(unreliable),
        ),
    )


def _other_hosts(run: Run, constants: Constants) -> list[Reason]:
    """Whether the constants are of hosts that the run was not on."""
    hosts = dict.fromkeys(host.name for host in run.manifest.hosts)
    if not hosts or not constants.hosts or set(hosts) & set(constants.hosts):
        return []
    return [
        Reason(
            RouteFetchCode.OTHER_HOSTS, {"run": listing(list(hosts)), "measured": listing(constants.hosts)}
        )
    ]


def _not_measured(
    decisions: ExpertDecisions, constants: Constants, model: ModelSpec, ranks: int
) -> list[Reason]:
    """How far the ranks, the tokens and the weights lie beyond what was measured."""
    reasons = []
    if constants.grade == "fitted" and ranks != constants.holders + 1:
        of_ranks: dict[str, JsonValue] = {"ranks": ranks, "measured_ranks": constants.holders + 1}
        reasons.append(Reason(RouteFetchCode.RANKS_NOT_MEASURED, of_ranks))
    sizes, shape = expert_shape(model), run_shape(model)
    inner = sizes.expert_bytes / (MATRICES * sizes.row_bytes)
    tokens = max(1.0, float(decisions.tokens_LE.max(initial=0.0)))
    beyond = constants.beyond(shape, rows=(tokens,), size=(inner,))
    if beyond is not None and beyond > NEAR:
        reasons.append(Reason(RouteFetchCode.SIZES_NOT_MEASURED, {"beyond": beyond}))
    return reasons


def _verdict(decisions: ExpertDecisions, constants: Constants, ranks: int, copies: int) -> list[Reason]:
    saved = decisions.saved_us
    fetched, kept = (int((decisions.choice_LE == choice).sum()) for choice in (Choice.FETCH, Choice.KEEP))
    values: dict[str, JsonValue] = {
        "fetched": fetched,
        "kept": kept,
        "today_us": decisions.today_us,
        "saved_us": saved.value,
        "saved_us_low": saved.low,
        "saved_us_high": saved.high,
        "saved_experts_us": decisions.saved_experts_us,
    }
    if fetched + kept == 0:
        reasons = [Reason(RouteFetchCode.SEND_ALL, {"copies": copies})]
    else:
        is_sure = saved.low is not None and saved.low > 0
        reasons = [Reason(RouteFetchCode.CHANGE if is_sure else RouteFetchCode.UNCERTAIN, values)]
        if is_sure and kept:
            steps = max(1, math.ceil(decisions.keep_us / saved.value))
            cost: dict[str, JsonValue] = {"keep_bytes": decisions.keep_bytes, "break_even_steps": steps}
            reasons.append(Reason(RouteFetchCode.KEEP_COST, cost))
    reasons.append(
        Reason(
            RouteFetchCode.BREAK_EVEN,
            {
                "busiest_tokens": float(decisions.tokens_LE.max(initial=0.0)),
                "break_even_tokens": decisions.break_even_tokens,
                "ranks": ranks,
            },
        )
    )
    if decisions.without_compute:
        reasons.append(Reason(RouteFetchCode.WITHOUT_COMPUTE, {"source": constants.source}))
    return reasons


def conclude_maps(document: Mapping[str, Any]) -> list[Reason]:
    """For each shape what costs less at the middle size, and whether its predictions are to be relied on."""
    reasons = []
    for shape in dict.fromkeys(row["shape"] for row in document["break_even"]):
        rows = [row for row in document["break_even"] if row["shape"] == shape]
        middle = rows[len(rows) // 2]
        values: dict[str, JsonValue] = {name: middle[name] for name in ("shape", "size")}
        if middle["rows"] is None:
            reasons.append(Reason(RouteFetchCode.ALWAYS_ROUTE, values))
        elif middle["rows_high"] is not None and middle["rows_high"] < 1:
            reasons.append(Reason(RouteFetchCode.ALWAYS_FETCH, values))
        else:
            ends = {name: middle[name] for name in ("rows", "rows_low", "rows_high")}
            reasons.append(Reason(RouteFetchCode.FETCH_FROM, {**values, **ends}))
        reasons += _unreliable(row for row in document["accuracy"] if row["shape"] == shape)
    asked = {row["shape"] for row in document["break_even"]}  # of others they are scaled
    reasons += _unreliable(row for row in document["accuracy"] if row["shape"] not in asked)
    return [*reasons, *_next(reasons)]


def _next(reasons: Iterable[Reason]) -> list[Reason]:
    """What to do about costs that are not to be relied on."""
    is_doubtful = any(reason.code is RouteFetchCode.UNRELIABLE for reason in reasons)
    return [Reason(RouteFetchCode.MEASURE_AGAIN)] if is_doubtful else []


def _unreliable(accuracy: Iterable[Mapping[str, Any]]) -> list[Reason]:
    """Pairs of options of which the faster was not picked often enough, where it matters."""
    return [
        Reason(
            RouteFetchCode.UNRELIABLE,
            {name: row[name] for name in ("shape", "options", "right_apart", "apart")},
        )
        for row in accuracy
        if row["apart"] and row["right_apart"] < _RELIABLE * row["apart"]
    ]

"""The exchanges of a run, as measured while it ran, against what a network model predicts for them.

What a program measured is comparable with a prediction only where everything but the exchange itself can be
taken off: the time from the last arrival to the last end, which needs the split into waiting and transfer on
every rank (docs/waiting.md). What cannot be compared is counted with the reason, never guessed.

Shapes: P ranks of the exchange's group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from observatory.analysis.exchange import rank_clocks
from observatory.analysis.exchange.matching import Collectives, Unmatched, match_collectives
from observatory.analysis.exchange.waiting import Split, depends_on, split_collectives
from observatory.analysis.exchange.words import ExchangeCode
from observatory.analysis.network.checking import CHECK_COLUMNS, checked_row
from observatory.analysis.network.network import NetworkModel
from observatory.analysis.network.words import NetworkCode, reason_counts
from observatory.errors import BenchmarkError, ExchangeError
from observatory.reasons import Reason

if TYPE_CHECKING:
    from observatory.run import Run

#: Roles that move tokens; counts and other small exchanges are left alone.
_ROLES = ("dispatch", "combine")
_STEPS = 32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunExchange:
    """One exchange of a run whose time is known without the waiting.

    Attributes:
        step, phase, layer, role: where in the run; ``layer`` is None where it is not known.
        backend: what moved the bytes; None when not recorded.
        node_of_P: node of each rank of the group.
        part: the group is a part of the run's ranks, so that others may exchange at the same time.
        bytes_PP: bytes from rank i to rank j.
        us: from the last arrival to the last end: the longest transfer of a rank.
    """

    step: int
    phase: str
    layer: int | None
    role: str
    backend: str | None
    node_of_P: tuple[int, ...]
    part: bool
    bytes_PP: NDArray[np.int64]
    us: float


def run_exchanges(run: Run, *, steps: int = _STEPS) -> tuple[list[RunExchange], list[Reason]]:
    """Dispatches and combines of a run that can be compared with a prediction.

    Args:
        run: an open run.
        steps: at most so many steps of each phase, evenly spread.

    Returns:
        The exchanges in the order of the run, and why each of the others is left out.
    """
    exchanges = run.exchanges(arrow_lists=True)
    chosen = exchanges["role"].isin(_ROLES) & _evenly(exchanges, steps)
    exchanges = exchanges[chosen].reset_index(drop=True)
    topology = run.manifest.topology
    nodes = topology.node_of_rank
    compared: list[tuple[int, RunExchange]] = []
    left_out: list[Reason] = []
    for matched in match_collectives(
        exchanges, ranks=topology.ranks, clocks=rank_clocks(run.manifest), node_of_rank=nodes
    ):
        if isinstance(matched, Unmatched):
            left_out.append(matched.reason)
            continue
        split = split_collectives(matched)
        for c, row in enumerate(matched.first_row_C):
            us = _transfer_us(matched, split, c)
            if isinstance(us, Reason):
                left_out.append(us)
            elif nodes is None:
                left_out.append(Reason(NetworkCode.NODES_UNKNOWN))
            else:
                found = _run_exchange(exchanges.iloc[int(row)], matched, c, nodes, us)
                compared.append((int(matched.place_C[c]), found))
    ordered = sorted(
        compared, key=lambda pair: (pair[1].step, -1 if pair[1].layer is None else pair[1].layer, pair[0])
    )
    return [found for _, found in ordered], left_out


def check_run_exchanges(
    model: NetworkModel, run: Run, *, steps: int = _STEPS
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Predict the exchanges of a run: one row each, columns as of ``check_predictions``; pattern ``own``.

    Returns:
        The rows, and why other exchanges have none (`words.reason_counts`).
    """
    compared, left_out = run_exchanges(run, steps=steps)
    rows = []
    for item in compared:
        if item.backend != model.backend:
            backend = item.backend or "a backend not stated"
            left_out.append(
                Reason(NetworkCode.OTHER_BACKEND, {"backend": backend, "model_backend": model.backend})
            )
            continue
        try:
            row = checked_row(
                model, item.bytes_PP, item.node_of_P, algorithm="flat", measured_us=item.us,
                pattern="own", phase=item.phase, layer=item.layer, step=item.step, role=item.role,
                reservations=[Reason(NetworkCode.ONE_GROUP_OF_SEVERAL)] if item.part else [],
            )  # fmt: skip
        except (BenchmarkError, ExchangeError) as error:
            left_out.append(Reason(NetworkCode.NOT_PREDICTED, {"error": str(error)}))
            continue
        rows.append(row)
    return pd.DataFrame(rows, columns=list(CHECK_COLUMNS)), reason_counts(left_out)


def _evenly(exchanges: pd.DataFrame, steps: int) -> pd.Series[bool]:
    """Rows of at most ``steps`` steps of each phase, from its first to its last."""
    kept = pd.Series(False, index=exchanges.index)
    for phase, step in exchanges.groupby("phase", sort=False)["step"]:
        distinct = np.unique(step)
        places = np.linspace(0, len(distinct) - 1, min(steps, len(distinct))).round().astype(int)
        kept |= (exchanges["phase"] == phase) & exchanges["step"].isin(distinct[places])
    return kept


def _transfer_us(matched: Collectives, split: Split, c: int) -> float | Reason:
    """The longest transfer of a rank of the c-th collective, or why there is none to compare."""
    algorithm = matched.algorithm_C[c]
    if depends_on(algorithm, part=bool(matched.part_C[c])) != "peers" or algorithm == "hierarchical":
        return Reason(NetworkCode.NOT_STRAIGHT, {"algorithm": algorithm})
    problem_P = split.problem_CP[c]
    if (problem_P >= 0).any():
        i = int((problem_P >= 0).argmax())
        if matched.row_CP[c, i] < 0:
            return Reason(ExchangeCode.PEER_WITHOUT_ROW, {"rank": int(matched.rank_CP[c, i])})
        return split.problems[int(problem_P[i])]
    transfer_P = split.columns["transfer_s"][c][split.columns["peers"][c] > 0]
    if not len(transfer_P):
        return Reason(NetworkCode.NOTHING_SENT)
    us = float(transfer_P.max()) * 1e6
    return us if us > 0 else Reason(NetworkCode.TOO_SHORT)


def _run_exchange(
    row: pd.Series, matched: Collectives, c: int, nodes: Sequence[int], us: float
) -> RunExchange:
    send_PP, receive_PP = matched.send_CPP[c], matched.receive_CPP[c]
    return RunExchange(
        step=int(row["step"]),
        phase=str(row["phase"]),
        layer=None if pd.isna(row["layer"]) else int(row["layer"]),
        role=str(row["role"]),
        backend=matched.backend_C[c],
        node_of_P=tuple(nodes[rank] for rank in matched.rank_CP[c]),
        part=bool(matched.part_C[c]),
        bytes_PP=np.where(send_PP >= 0, send_PP, receive_PP.T),
        us=us,
    )

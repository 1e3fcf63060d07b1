"""A run's own exchanges beside the model: what is compared, and what is not and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from observatory.analysis.exchange.words import ExchangeCode
from observatory.analysis.network import NetworkModel, fit_network
from observatory.analysis.network.run_exchanges import check_run_exchanges, run_exchanges
from observatory.analysis.network.words import NetworkCode
from observatory.run import Run, open_run
from observatory.run.manifest import ClockSpec
from tests.analysis.exchange.runs import exchange_run
from tests.analysis.exchange.tables import collective
from tests.analysis.network.synthetic import made_result

NODES = (0, 0, 1, 1)
SEND = [[5, 100, 0, 300], [100, 5, 0, 0], [0, 0, 5, 700], [300, 0, 0, 5]]


def truth_us(bytes_PP: NDArray[np.int64], node_of_P: tuple[int, ...]) -> float:
    """10 us and 1 us per 10 bytes of the busiest rank, inside the node and to the other."""
    same_PP = np.array(node_of_P)[:, None] == np.array(node_of_P)[None, :]
    moved = bytes_PP - np.diag(np.diagonal(bytes_PP))
    inside, across = np.where(same_PP, moved, 0), np.where(same_PP, 0, moved)
    per_rank = sum(np.maximum(part.sum(axis=0), part.sum(axis=1)) for part in (inside, across))
    return 10.0 + float(np.max(per_rank)) / 10


@pytest.fixture(scope="module")
def model() -> NetworkModel:
    return fit_network([made_result(truth_us, NODES, sizes_bytes=(64, 256, 1024, 4096))], bootstrap=10)


def run_of(path: Path, *frames: pd.DataFrame, **options: Any) -> Run:
    """An open run whose ranks left these exchange rows."""
    return open_run(exchange_run(path, *frames, **options))


def exchange(sequence: int = 0, *, backend: str = "made-up", **common: Any) -> pd.DataFrame:
    """Ranks arrive at 0, 40, 100 and 60 us; rank 3 is the last to end, at 180."""
    return collective(
        [0, 40, 100, 60], [170, 150, 140, 180], SEND, backend=backend, sequence=sequence, **common
    )


def test_measured_is_the_longest_transfer_not_the_waiting(tmp_path: Path) -> None:
    (found,), left_out = run_exchanges(run_of(tmp_path / "run", exchange(layer=3)))
    assert left_out == []
    # 0 waits for 3 (60) and then needs 110; 1 waits for nobody later: 110; 3 waits for 2 (100) and needs 80.
    assert found.us == pytest.approx(110.0)
    assert (found.step, found.phase, found.layer, found.role) == (0, "prefill", 3, "dispatch")
    assert found.node_of_P == NODES
    assert found.bytes_PP.tolist() == SEND


def test_the_prediction_is_of_the_matrix_that_the_run_exchanged(tmp_path: Path, model: NetworkModel) -> None:
    rows, left_out = check_run_exchanges(model, run_of(tmp_path / "run", exchange()))
    assert left_out.empty
    (row,) = rows.to_dict("records")
    # Rank 3 gets 300 + 700 bytes: 10 + 100 us.
    assert row["predicted_us"] == pytest.approx(110.0, rel=0.02)
    assert row["error"] == pytest.approx(abs(row["predicted_us"] - 110.0) / 110.0)
    assert row["low_us"] <= row["predicted_us"] <= row["high_us"]
    assert (row["pattern"], row["algorithm"], row["extrapolated"]) == ("own", "flat", None)


@pytest.mark.parametrize(
    ("common", "code", "reason"),
    [
        ({"algorithm": "gather"}, NetworkCode.NOT_STRAIGHT, "recorded as gather"),
        ({"algorithm": "hierarchical"}, NetworkCode.NOT_STRAIGHT, "recorded as hierarchical"),
        ({"backend": "nccl"}, NetworkCode.OTHER_BACKEND, "exchanged over nccl, not made-up"),
        ({"backend": None}, NetworkCode.OTHER_BACKEND, "exchanged over a backend not stated"),
    ],
)
def test_what_cannot_be_compared_is_counted_with_the_reason(
    common: dict[str, Any], code: str, reason: str, tmp_path: Path, model: NetworkModel
) -> None:
    rows, left_out = check_run_exchanges(model, run_of(tmp_path / "run", exchange(), exchange(1, **common)))
    assert len(rows) == 1
    assert (left_out["code"].tolist(), left_out["exchanges"].tolist()) == ([code], [1])
    assert left_out["reason"][0].startswith(reason)


def test_small_exchanges_are_not_looked_at(tmp_path: Path, model: NetworkModel) -> None:
    rows, left_out = check_run_exchanges(
        model, run_of(tmp_path / "run", exchange(), exchange(1, role="other"))
    )
    assert len(rows) == 1
    assert left_out.empty


def test_exchanges_whose_waiting_is_not_known_are_not_compared(tmp_path: Path, model: NetworkModel) -> None:
    lost = exchange().drop(index=2)
    rows, left_out = check_run_exchanges(model, run_of(tmp_path / "lost", lost))
    assert rows.empty
    assert left_out["code"].tolist() == [ExchangeCode.PEER_WITHOUT_ROW]
    assert left_out["reason"].tolist() == ["rank 2, on which it depends, left no row"]
    unaligned = ClockSpec(offset_ns=None, uncertainty_ns=None, method="none")
    rows, left_out = check_run_exchanges(model, run_of(tmp_path / "clocks", exchange(), clock=unaligned))
    assert rows.empty
    assert left_out["code"].tolist() == [ExchangeCode.CLOCKS_NOT_ALIGNED]


def test_a_run_that_does_not_say_its_nodes_is_not_compared(tmp_path: Path, model: NetworkModel) -> None:
    rows, left_out = check_run_exchanges(model, run_of(tmp_path / "run", exchange(), node_of_rank=None))
    assert rows.empty
    assert left_out["code"].tolist() == [NetworkCode.NODES_UNKNOWN]


def test_nothing_to_send_and_no_time_are_no_points(tmp_path: Path) -> None:
    kept = collective([0, 40], [50, 50], [[7, 0], [0, 7]])
    instant = collective([0, 40], [40, 40], [[7, 1], [1, 7]], sequence=1)
    found, left_out = run_exchanges(run_of(tmp_path / "run", kept, instant, ranks=2, node_of_rank=(0, 0)))
    assert found == []
    assert [reason.code for reason in left_out] == [NetworkCode.NOTHING_SENT, NetworkCode.TOO_SHORT]


def test_groups_that_exchange_next_to_each_other_are_marked_as_outside(
    tmp_path: Path, model: NetworkModel
) -> None:
    pairs = [
        collective([0, 10], [50, 60], [[5, 100], [100, 5]], backend="made-up", group=group).assign(
            source_rank=ranks
        )
        for group, ranks in (("0,2", [0, 2]), ("1,3", [1, 3]))
    ]
    rows, left_out = check_run_exchanges(model, run_of(tmp_path / "run", *pairs))
    assert left_out.empty
    assert len(rows) == 2
    assert all(text.endswith("; one group of several") for text in rows["extrapolated"])
    assert all(text.startswith("2 ranks (measured 4)") for text in rows["extrapolated"])


def test_of_long_runs_so_many_steps_of_each_phase_are_taken_evenly(tmp_path: Path) -> None:
    frames = [exchange(step, step=step, phase="prefill" if step < 10 else "decode") for step in range(14)]
    found, _ = run_exchanges(run_of(tmp_path / "run", *frames), steps=4)
    assert [item.step for item in found] == [0, 3, 6, 9, 10, 11, 12, 13]

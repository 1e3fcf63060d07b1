"""The flight recorder and the probe: two sources for one exchange, and where they disagree.

``recorder_start_ns`` is when torch enqueued the exchange, on the host; ``recorder_duration_ns`` how long its
backend was at it. The probe's own start lies before the call, so the recorder's follows it by the way through
torch, and lies before the end. On NCCL the probe's duration also holds what the exchange waited in its
stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from observatory.analysis.exchange.matching import own_times
from observatory.run import Run
from observatory.run.documents.writing import frame_records
from observatory.run.flight_recorder import RecorderDump, RecorderIndex, read_recorder_dump
from observatory.run.manifest import ClockSpec

RECORDER_COLUMNS = ("recorder_start_ns", "recorder_duration_ns", "recorder_problem")

#: Durations that differ by more than both are counted as disagreeing; ours.
_DIFFERS_SHARE, _DIFFERS_NS = 0.1, 20_000
_KEYS = ["backend", "algorithm", "source_rank"]
_ASKED_WITH = ("backend", "backend_group", "backend_sequence", "send_bytes", "receive_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecorderFindings:
    """The second source of a run compared with the first.

    Attributes:
        agreement: result of :func:`recorder_agreement`.
        gaps: result of :func:`recorder_gaps`.
    """

    agreement: pd.DataFrame
    gaps: dict[str, int]

    def document(self) -> dict[str, Any]:
        """As ``--json`` shows it."""
        return {
            "agreement": frame_records(self.agreement),
            "gaps": [{"reason": reason, "rows": rows} for reason, rows in self.gaps.items()],
        }


def recorder_of_run(
    run: Run, exchanges: pd.DataFrame, *, dumps: Mapping[int, Path]
) -> RecorderFindings | None:
    """What a flight recorder said of a run's exchanges; None where none was asked.

    Args:
        run: the run.
        exchanges: its exchanges.
        dumps: files by rank that are read in place of what the run holds of these ranks.

    Raises:
        RunFormatError: a file is no dump.
    """
    if dumps:
        clocks = {status.rank: status.clock for status in run.manifest.ranks}
        read = {rank: read_recorder_dump(path) for rank, path in dumps.items()}
        exchanges = with_recorder_dumps(exchanges, read, clocks=clocks)
    if not any(name in exchanges and exchanges[name].notna().any() for name in RECORDER_COLUMNS):
        return None
    return RecorderFindings(agreement=recorder_agreement(exchanges), gaps=recorder_gaps(exchanges))


def with_recorder_dumps(
    exchanges: pd.DataFrame,
    dumps: Mapping[int, RecorderDump],
    *,
    clocks: Mapping[int, ClockSpec | None],
) -> pd.DataFrame:
    """Exchanges with what dumps say of them in the ``recorder_...`` columns.

    Rows of ranks without a dump keep what they have.

    Args:
        exchanges: columns of ``tables.EXCHANGE_SCHEMA``.
        dumps: by rank.
        clocks: of every rank, as its status file says; a rank whose wall clock is not related to its
            monotonic clock there gets no ``recorder_start_ns``.
    """
    frame = exchanges.reset_index(drop=True)
    values_of = {name: _plain(frame, name).copy() for name in RECORDER_COLUMNS}
    columns = [_plain(frame, name) for name in _ASKED_WITH]
    rank_N = frame["source_rank"].to_numpy(np.int64)
    for rank, dump in dumps.items():
        clock = clocks.get(rank)
        ahead_ns = None if clock is None else clock.unix_minus_monotonic_ns
        index = RecorderIndex(dump.entries, unix_minus_monotonic_ns=ahead_ns)
        for row in np.flatnonzero(rank_N == rank):
            backend, group, number, sent, received = (values[row] for values in columns)
            match = index.match(
                backend=backend,
                group=group,
                number=None if number is None else int(number),
                send_bytes=sent,
                receive_bytes=received,
            )
            values = (match.start_ns, match.duration_ns, match.problem)
            for name, value in zip(RECORDER_COLUMNS, values, strict=True):
                values_of[name][row] = value
    return frame.assign(
        recorder_start_ns=pd.array(list(values_of["recorder_start_ns"]), "Int64"),
        recorder_duration_ns=pd.array(list(values_of["recorder_duration_ns"]), "Int64"),
        recorder_problem=values_of["recorder_problem"],
    )


def recorder_agreement(exchanges: pd.DataFrame) -> pd.DataFrame:
    """How far the two sources agree, per backend, algorithm and rank.

    Returns:
        backend, algorithm, source_rank, ``exchanges``, ``found`` (with an entry that fits), ``start_p50_s``
        and ``start_worst_s`` (the recorder's start minus the probe's, median and the one farthest from it),
        ``outside`` (the recorder's start lies before the probe's or after its end, which cannot both be
        right; host clocks only), ``timed`` (with a duration from both), ``duration_p50_s`` and
        ``recorder_duration_p50_s`` of these, ``difference_p50_s`` and ``difference_worst_s`` (recorder minus
        probe), and ``differ`` (by more than a tenth of the probe's and 20 us).
    """
    start_N, end_N, started_N, ended_N = own_times(exchanges)
    recorder_start_N, recorder_duration_N = (_numbers(exchanges, name) for name in RECORDER_COLUMNS[:2])
    duration_N = np.where(ended_N, end_N - start_N, np.nan)
    lag_N = np.where(started_N, recorder_start_N - start_N, np.nan)
    difference_N = recorder_duration_N - duration_N
    on_host = (exchanges["backend"] != "nccl").to_numpy(bool)
    with np.errstate(invalid="ignore"):
        outside_N = on_host & ((lag_N < 0) | (lag_N > duration_N))
        differ_N = np.abs(difference_N) > np.maximum(_DIFFERS_SHARE * duration_N, _DIFFERS_NS)
    timed_N = np.isfinite(difference_N)
    rows = pd.DataFrame(
        {
            **{name: exchanges[name].to_numpy(object) for name in _KEYS},
            "found": np.isfinite(recorder_start_N) | np.isfinite(recorder_duration_N),
            "lag_s": lag_N * 1e-9,
            "outside": outside_N,
            "timed": timed_N,
            "duration_s": np.where(timed_N, duration_N, np.nan) * 1e-9,
            "recorder_s": np.where(timed_N, recorder_duration_N, np.nan) * 1e-9,
            "difference_s": difference_N * 1e-9,
            "differ": differ_N,
        }
    )
    grouped = rows.groupby(_KEYS, dropna=False, sort=True)
    frame = grouped.agg(
        exchanges=("found", "size"),
        found=("found", "sum"),
        start_p50_s=("lag_s", "median"),
        start_worst_s=("lag_s", _worst),
        outside=("outside", "sum"),
        timed=("timed", "sum"),
        duration_p50_s=("duration_s", "median"),
        recorder_duration_p50_s=("recorder_s", "median"),
        difference_p50_s=("difference_s", "median"),
        difference_worst_s=("difference_s", _worst),
        differ=("differ", "sum"),
    )
    return frame.reset_index()


def recorder_gaps(exchanges: pd.DataFrame) -> dict[str, int]:
    """Why times of the recorder are missing: reason -> rows, the most frequent first."""
    if "recorder_problem" not in exchanges:
        return {}
    counts = exchanges["recorder_problem"].value_counts()
    return {str(reason): int(rows) for reason, rows in counts.items()}


def _worst(values: pd.Series[float]) -> float:
    """The value farthest from the median; NaN where there is none."""
    present = values.dropna()
    if present.empty:
        return float("nan")
    return float(present.iloc[int((present - present.median()).abs().to_numpy(float).argmax())])


def _numbers(exchanges: pd.DataFrame, name: str) -> npt.NDArray[np.float64]:
    if name not in exchanges:
        return np.full(len(exchanges), np.nan)
    numbers = pd.to_numeric(exchanges[name]).astype("Float64")
    return np.asarray(numbers.to_numpy(np.float64, na_value=np.nan), np.float64)


def _plain(frame: pd.DataFrame, name: str) -> npt.NDArray[np.object_]:
    """Values of a column, None where they are missing."""
    if name not in frame:
        return np.full(len(frame), None, object)
    values = frame[name]
    return values.astype(object).where(values.notna(), None).to_numpy(object)

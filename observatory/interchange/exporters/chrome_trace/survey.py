"""The first pass over a run that becomes a trace: where time begins, and what its devices report."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from observatory.analysis.exchange.alignment import rank_clocks, to_reference_ns
from observatory.interchange.exporters.chrome_trace.devices import COUNTERS
from observatory.interchange.exporters.chrome_trace.rows import Chosen, rows_of
from observatory.run import Run
from observatory.run.manifest import ClockSpec

Int64 = npt.NDArray[np.int64]


@dataclass(slots=True)
class Survey:
    """What the first pass found.

    Attributes:
        clocks: of every rank.
        first_ns: earliest time of each rank, on the clock that its times are put on.
        last_ns: latest one.
        reported: per (rank that sampled, UUID), the columns with at least one reading.
        unfinished: spans and exchanges without an end.
    """

    clocks: dict[int, ClockSpec | None]
    first_ns: dict[int, int] = field(default_factory=dict)
    last_ns: dict[int, int] = field(default_factory=dict)
    reported: dict[tuple[int, str], set[str]] = field(default_factory=dict)
    unfinished: int = 0

    def placed(self, rank: int, own_ns: Int64) -> Int64:
        """Times on the reference's clock; the rank's own where its clock is not aligned."""
        return to_reference_ns(own_ns, self.clocks.get(rank))[0]

    def seen(self, rank: int, time_ns: Int64) -> None:
        """Take times of one rank into account."""
        if len(time_ns):
            self.first_ns[rank] = min(self.first_ns.get(rank, int(time_ns.min())), int(time_ns.min()))
            self.last_ns[rank] = max(self.last_ns.get(rank, int(time_ns.max())), int(time_ns.max()))


def survey_run(run: Run, chosen: Chosen) -> Survey:
    """The first pass: where time begins on every rank, and what devices report."""
    survey = Survey(clocks=rank_clocks(run.manifest))
    for table in ("spans", "exchange"):
        for rows in rows_of(run, table):
            chosen_rows = chosen.of(rows)
            if chosen_rows.num_rows:
                rank = chosen_rows.column("source_rank")[0].as_py()
                start, end = column_ns(chosen_rows, "start_ns"), chosen_rows.column("end_ns").drop_null()
                survey.unfinished += chosen_rows.num_rows - len(end)
                survey.seen(rank, survey.placed(rank, start))
                survey.seen(rank, survey.placed(rank, end.to_numpy().astype(np.int64)))
    whole = not chosen.narrows
    for rows in rows_of(run, "power"):
        rank = rows.column("source_rank")[0].as_py()
        for uuid in rows.column("device_uuid").unique().to_pylist():
            survey.reported.setdefault((rank, uuid), set())
        if whole:
            survey.seen(rank, survey.placed(rank, column_ns(rows, "time_ns")))
        for name in COUNTERS:
            if rows.column(name).null_count < rows.num_rows:
                uuids = rows.column("device_uuid").filter(rows.column(name).is_valid()).unique().to_pylist()
                for uuid in uuids:
                    survey.reported[rank, uuid].add(name)
    return survey


def column_ns(rows: pa.Table, column: str) -> Int64:
    """A column of times, none missing."""
    values: Int64 = rows.column(column).to_numpy().astype(np.int64)
    return values

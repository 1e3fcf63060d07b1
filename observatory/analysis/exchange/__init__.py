"""What the exchanges of a run show: waiting apart from transfer, traffic, time per dispatch phase."""

from observatory.analysis.exchange.alignment import clock_problem, rank_clocks, to_reference_ns
from observatory.analysis.exchange.causes import CAUSES, COMPUTE_SPANS, explain_last
from observatory.analysis.exchange.flight_recorder import (
    RecorderFindings,
    recorder_agreement,
    recorder_gaps,
    recorder_of_run,
    with_recorder_dumps,
)
from observatory.analysis.exchange.layer_time import EXCHANGE_SPANS, SPAN_ORDER, critical_path, phase_times
from observatory.analysis.exchange.summary import layer_waits, problems_of, rank_waits, run_waits
from observatory.analysis.exchange.traffic import exchange_traffic
from observatory.analysis.exchange.waiting import wait_and_transfer

__all__ = [
    "CAUSES",
    "COMPUTE_SPANS",
    "EXCHANGE_SPANS",
    "SPAN_ORDER",
    "RecorderFindings",
    "clock_problem",
    "critical_path",
    "exchange_traffic",
    "explain_last",
    "layer_waits",
    "phase_times",
    "problems_of",
    "rank_clocks",
    "rank_waits",
    "recorder_agreement",
    "recorder_gaps",
    "recorder_of_run",
    "run_waits",
    "to_reference_ns",
    "wait_and_transfer",
    "with_recorder_dumps",
]

"""Processor time and peak memory of importing large traces, as a markdown table.

    python -m benchmarks.trace_memory DIRECTORY [--gigabytes 0.5 1 2]

Protocol: a trace of one rank in the shape of PyTorch's profiler is generated under DIRECTORY: of 1,000 events
one is a kernel of an all-to-all among 8 ranks, with its launch; the others are operators, kernels and
launches with the usual arguments. ``observatory import kineto`` reads it in a process of its own; the trace
and the run are removed after it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from benchmarks.command_cost import command_cost

_EVENTS_OF_ONE_EXCHANGE = 1000
_OTHERS = (
    ("cpu_op", "aten::mm", {"External id": 7, "Input Dims": [[4096, 7168], [7168, 2048], []]}),
    ("kernel", "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", {"grid": [32, 64, 1], "block": [384, 1, 1]}),
    ("cuda_runtime", "cudaLaunchKernel", {"cbid": 211, "External id": 7}),
)
_EXCHANGE = {
    "Collective name": "all_to_allv",
    "In msg nelems": 7168 * 800,
    "Out msg nelems": 7168 * 800,
    "In split size": str([7168 * 100] * 8),
    "Out split size": str([7168 * 100] * 8),
    "dtype": "BFloat16",
    "Process Group Ranks": str(list(range(8))),
    "Group size": 8,
}


def write_trace(path: Path, size: int) -> int:
    """Write a trace of at least ``size`` bytes and return the number of its all-to-alls."""
    head = {
        "schemaVersion": 1,
        "distributedInfo": {"backend": "nccl", "rank": 0, "world_size": 8},
        "baseTimeNanoseconds": 1_700_000_000 * 10**9,
    }
    exchanges = number = 0
    with path.open("w", encoding="ascii") as file:
        file.write(json.dumps(head)[:-1] + ', "traceEvents": [')
        while file.tell() < size:
            events = []
            for _ in range(_EVENTS_OF_ONE_EXCHANGE):
                category, name, arguments = _OTHERS[number % len(_OTHERS)]
                events.append(_event(category, name, number, {**arguments, "correlation": number}))
                number += 1
            launch = {"cbid": 211, "correlation": number}
            events.append(_event("cuda_runtime", "cudaLaunchKernelExC", number, launch))
            stated = {**_EXCHANGE, "correlation": number}
            events.append(_event("kernel", "ncclDevKernel_SendRecv", number, stated))
            number += 1
            file.write(", ".join(map(json.dumps, events)) + ", ")
            exchanges += 1
        file.write(json.dumps({"ph": "M", "name": "process_name", "pid": 1}) + "]}")
    return exchanges


def _event(category: str, name: str, number: int, arguments: Mapping[str, object]) -> dict[str, object]:
    at = {"ts": 10.0 * number, "dur": 8.25, "pid": 1, "tid": 7 + number % 3}
    return {"ph": "X", "cat": category, "name": name, **at, "args": arguments}


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.5, 1.0, 2.0])
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    print("| trace (GB) | all-to-alls | processor time (s) | peak memory (MB) |\n|---:|---:|---:|---:|")
    for gigabytes in options.gigabytes:
        trace, run, output = (options.directory / name for name in ("trace.json", "run", "output.txt"))
        try:
            exchanges = write_trace(trace, int(gigabytes * 1e9))
            cost = command_cost(["import", "kineto", str(trace), "--out", str(run)], output)
            megabytes = cost.peak_bytes / 1e6
            print(f"| {gigabytes:g} | {exchanges:,} | {cost.processor_s:.0f} | {megabytes:.0f} |", flush=True)
        finally:
            trace.unlink(missing_ok=True)
            output.unlink(missing_ok=True)
            shutil.rmtree(run, ignore_errors=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""What sampling power costs: processor time of its process, punctuality, slowdown of a program that runs.

    python -m benchmarks.sampler_cost [--seconds 30] [--groups 150]

**Cost.** The sampling process of a node samples 1 and 8 devices of the driver that plays GPUs, every field,
every 50 ms. Its processor time is read from /proc before and after, so that nothing is left out but its
start; its own figures are printed as well. The driver's part is measured by asking it the same through the C
library alone, all devices after a rest of 50 ms each time, as the sampler does. It takes a file lock and
steps its simulation in every call; a real driver goes into the kernel and to the device, which costs more.

**Perturbation.** Forward passes of a small MoE model on one thread, blocks of a quarter of a second in the
order off, on, on, off; off means that the sampling process is stopped by a signal. Given: geometric mean over
groups of the ratio on over off, its 90 % bootstrap interval, by the wall clock and by the thread's own time.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.interleaved import interleaved
from observatory.probes.power.sampler import PowerSampler
from observatory.run import RunWriter
from observatory.run.manifest import Manifest, ModelSpec
from tests.devices.driver import FakeDriver

UUIDS = tuple(f"GPU-fa4e0000-0000-4000-8000-00000000000{number}" for number in range(8))
BLOCK_S = 0.25


def busy_driver(devices: int) -> FakeDriver:
    """The driver of this process's environment, its devices at work."""
    driver = FakeDriver(Path(os.environ["FAKE_NVML_STATE"]))
    driver.devices(devices)
    for index in range(devices):
        driver.set(index, busy=1)
    return driver


def sampler_of(folder: Path, devices: int) -> PowerSampler:
    """A sampler into a run of its own."""
    manifest = Manifest(
        run_id="cost", created_unix_s=time.time(), model=ModelSpec(name="none", moe_layers=())
    )
    RunWriter.create(folder / "run", manifest).close(steps=0)
    return PowerSampler(folder / "run", rank=0, ranks=1, selectors=UUIDS[:devices])


def processor_s(pid: int) -> float:
    """Processor time of a process so far, user and system."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def cost(folder: Path, devices: int, seconds: float) -> dict[str, Any]:
    """Cost of sampling so many devices."""
    busy_driver(devices)
    sampler = sampler_of(folder, devices)
    sampler.start()
    assert sampler._process is not None
    pid = sampler._process.pid
    before_s, began = processor_s(pid), time.monotonic()
    time.sleep(seconds)
    share = (processor_s(pid) - before_s) / (time.monotonic() - began)
    cost = sampler.stop().cost
    assert cost is not None
    return {"devices": devices, "share": share, **cost.model_dump(), "driver_us": driver_us(devices)}


def driver_us(devices: int) -> float:
    """Processor time of the driver's own part of one reading of one device."""
    import pynvml

    from observatory.devices.nvml import FieldBatch

    pynvml.nvmlInit()
    handles = [pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in UUIDS[:devices]]
    batches = [
        FieldBatch(pynvml, handle, [186, 185, 83, 82, 190, 74, 269, 270])._arguments for handle in handles
    ]
    fields, clock = pynvml.nvmlLib.nvmlDeviceGetFieldValues, pynvml.nvmlLib.nvmlDeviceGetClockInfo
    answer = ctypes.byref(ctypes.c_uint())
    taken = []
    for _ in range(60):
        time.sleep(0.05)
        began = time.thread_time()
        for handle, arguments in zip(handles, batches, strict=True):
            fields(*arguments)
            for _ in range(4):
                clock(handle, 1, answer)
        taken.append((time.thread_time() - began) / devices)
    return statistics.median(taken) * 1e6


def perturbation(folder: Path, groups: int) -> dict[str, Any]:
    """Ratios of time with sampling over time without."""
    import torch

    from benchmarks.hook_cost import random_model

    torch.set_num_threads(1)
    model = random_model(layers=4, hidden=64, top_k=4)
    ids = torch.randint(0, 512, (8, 1))
    busy_driver(1)
    sampler = sampler_of(folder, 1)
    sampler.start()
    assert sampler._process is not None
    pid = sampler._process.pid

    def block(passes: int) -> tuple[float, float]:
        wall, thread = time.monotonic(), time.thread_time()
        with torch.no_grad():
            for _ in range(passes):
                model(ids)
        return time.monotonic() - wall, time.thread_time() - thread

    block(20)
    passes = max(1, round(50 * BLOCK_S / block(50)[1]))
    found = interleaved(
        lambda: block(passes),
        lambda on: os.kill(pid, signal.SIGCONT if on else signal.SIGSTOP),
        groups=groups,
    )
    os.kill(pid, signal.SIGCONT)
    sampler.stop()
    return dict(zip(("wall", "thread"), found, strict=True))


def _part(*argv: str) -> dict[str, Any]:
    """A part in a process of its own, on a driver of its own."""
    with tempfile.TemporaryDirectory() as name:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.sampler_cost", "--part", name, *argv],
            env=FakeDriver(Path(name) / "driver").environment(), stdout=subprocess.PIPE, check=True,
        )  # fmt: skip
    return dict(json.loads(done.stdout))


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="of sampling, for its cost")
    parser.add_argument("--groups", type=int, default=150, help="of four blocks, for the perturbation")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        folder, what, *more = options.part
        found = (
            perturbation(Path(folder), int(more[0]))
            if what == "perturbation"
            else cost(Path(folder), int(more[0]), float(more[1]))
        )
        print(json.dumps(found))
        return 0
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    print(
        "| devices | % of a core | as it says itself | the driver's part | instants | left out "
        "| a device answers, us p50 / p99 | late, ms p50 / p99 |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for devices in (1, 8):
        row = _part("cost", str(devices), str(options.seconds))
        driver = row["driver_us"] * devices / 0.05 / 1e6
        print(
            f"| {devices} | {row['share']:.2%} | {row['cpu_share']:.2%} | {driver:.2%} | {row['samples']} "
            f"| {row['missed']} | {row['read_us_p50']:.0f} / {row['read_us_p99']:.0f} "
            f"| {row['late_us_p50'] / 1e3:.1f} / {row['late_us_p99'] / 1e3:.1f} |",
            flush=True,
        )
    print("\n| time of a program with sampling over without | ratio | 90 % |\n|---|---:|---:|")
    for name, (ratio, low, high) in _part("perturbation", str(options.groups)).items():
        print(f"| {name} | {ratio:.4f} | {low:.4f} to {high:.4f} |")
    print(f"\n{options.groups} groups; load average {os.getloadavg()[0]:.1f} at the end")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

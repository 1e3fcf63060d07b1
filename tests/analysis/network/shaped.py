"""Hosts on one machine: network namespaces joined by links of a known rate.

Every name carries this process's number, and what was made is removed by name.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from observatory.collectives.bench.rank import RankJob
from observatory.hpc.launch import rank_environment
from observatory.run.documents.bench import BenchPlan, BenchResult, load_bench
from observatory.run.documents.route_fetch import RouteFetchPlan

#: Large frames, so that headers are under 1 % of what passes.
MTU_BYTES = 9000
_FRAME_HEADER_BYTES = 14
#: A bucket that holds less loses rate whenever a busy machine's timer is later than this.
BURST_S = 1e-3
#: Windows that are open from the start and no probing for bandwidth (BBR): else TCP's learning is measured.
_TCP = (
    "net.ipv4.tcp_congestion_control=reno",
    "net.ipv4.tcp_slow_start_after_idle=0",
    "net.ipv4.tcp_rmem=4096 4194304 33554432",
    "net.ipv4.tcp_wmem=4096 4194304 4194304",
)
_SUBNET = "10.213.77"
_PORT = 29555


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What joins one node to the others: 10^6 bits per second that it sends and receives."""

    up_mbit: float
    down_mbit: float


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)


def address_of(node: int) -> str:
    """Address of a node's link."""
    return f"{_SUBNET}.{node + 1}"


def why_not() -> str | None:
    """Why namespaces with shaped links cannot be made here; None when they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "ip and tc (iproute2) are not installed"
    try:
        with shaped_nodes(1, rate_mbit=100):
            return None
    except (subprocess.SubprocessError, OSError) as error:
        words = getattr(error, "stderr", b"") or str(error).encode()
        return f"a namespace with a tbf link cannot be made: {words.decode(errors='replace').strip()[:100]}"


@contextlib.contextmanager
def shaped_nodes(
    nodes: int,
    *,
    rate_mbit: float,
    mtu_bytes: int = MTU_BYTES,
    burst_s: float = BURST_S,
    others: Mapping[int, Link] | None = None,
    together: int = 1,
    uplink: Link | None = None,
) -> Iterator[list[str]]:
    """Namespaces whose only way to each other is a bridge, each link limited to a rate in both directions.

    Args:
        nodes: how many.
        rate_mbit: rate of every link, 10^6 bits per second, headers included.
        mtu_bytes: largest packet; smaller ones have more headers.
        burst_s: what passes at once after a pause, as time at the rate; at least one frame. Exchanges must be
            much longer than this, and than a frame, to see the rate.
        others: nodes whose link is another one.
        together: so many nodes one after another share a switch of their own.
        uplink: what joins each such switch to the others; needed where ``together`` is not 1.
    """
    tag = f"obs{os.getpid()}"
    bridge, names = f"{tag}-bridge", [f"{tag}-n{node}" for node in range(nodes)]

    def shape(device: str, mbit: float) -> list[str]:
        burst_bytes = max(mtu_bytes + _FRAME_HEADER_BYTES, round(mbit * 1e6 / 8 * burst_s))
        # The queue is longer than anything that is sent: nothing is dropped, so TCP never slows down.
        limits = ("rate", f"{mbit}mbit", "burst", f"{burst_bytes}b", "limit", "256mb")
        return ["tc", "qdisc", "add", "dev", device, "root", "tbf", *limits]

    made: list[str] = []
    try:
        for name in (bridge, *names):
            _ip("netns", "add", name)
            made.append(name)
            _ip("-n", name, "link", "set", "lo", "up")
        switches = [f"br{index}" for index in range(1 if uplink is None else 1 + nodes // together)]
        for switch in switches:
            _ip("-n", bridge, "link", "add", switch, "mtu", str(mtu_bytes), "type", "bridge")
            _ip("-n", bridge, "link", "set", switch, "up")
        for switch in switches[1:] if uplink is not None else ():
            ends = (f"{switch}-up", f"{switch}-down")
            _ip("-n", bridge, "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
            for end, joined, mbit in zip(
                ends, (switch, "br0"), (uplink.up_mbit, uplink.down_mbit), strict=True
            ):
                _ip("-n", bridge, "link", "set", end, "mtu", str(mtu_bytes), "master", joined, "up")
                _ip("netns", "exec", bridge, *shape(end, mbit))
        for node, name in enumerate(names):
            port = f"p{node}"
            _ip("link", "add", port, "netns", bridge, "type", "veth", "peer", "name", "eth0", "netns", name)
            for inside, device in ((bridge, port), (name, "eth0")):
                _ip("-n", inside, "link", "set", device, "mtu", str(mtu_bytes), "up")
            switch = "br0" if uplink is None else switches[1 + node // together]
            _ip("-n", bridge, "link", "set", port, "master", switch)
            for setting in _TCP:
                _ip("netns", "exec", name, "sysctl", "-q", "-w", setting)
            _ip("-n", name, "addr", "add", f"{address_of(node)}/24", "dev", "eth0")
            own = (others or {}).get(node, Link(up_mbit=rate_mbit, down_mbit=rate_mbit))
            _ip("netns", "exec", name, *shape("eth0", own.up_mbit))
            _ip("netns", "exec", bridge, *shape(port, own.down_mbit))
        yield names
    finally:
        for name in made:
            _ip("netns", "del", name)


def _real_time() -> list[str]:
    command = ["chrt", "--fifo", "1"]
    if shutil.which("chrt") is None:
        return []
    tried = subprocess.run([*command, "true"], check=False, capture_output=True, timeout=20)
    return command if tried.returncode == 0 else []


def run_on_nodes(
    plan: BenchPlan,
    names: Sequence[str],
    *,
    ranks_on_node: int,
    folder: Path,
    timeout_s: float = 60.0,
    ranks_per_node: int | None = None,
) -> BenchResult:
    """Run a plan of exchanges; see `run_ranks`."""
    return load_bench(
        run_ranks(
            plan,
            names,
            ranks_on_node=ranks_on_node,
            folder=folder,
            timeout_s=timeout_s,
            ranks_per_node=ranks_per_node,
        )
    )


def run_ranks(
    plan: BenchPlan | RouteFetchPlan,
    names: Sequence[str],
    *,
    ranks_on_node: int,
    folder: Path,
    timeout_s: float = 60.0,
    ranks_per_node: int | None = None,
) -> Path:
    """Run a plan with so many ranks in each namespace; the file of the result.

    ``ranks_per_node`` states other nodes than the namespaces.

    Ranks run at real-time priority where this is allowed: each stands for a host of its own, where no other
    program takes the core from it.
    """
    first = _real_time()
    world = len(names) * ranks_on_node
    out = folder / "result.json"
    out.unlink(missing_ok=True)
    job = folder / "job.json"
    job.write_text(
        RankJob(
            plan=plan,
            backend="gloo",
            ranks_per_node=ranks_per_node or ranks_on_node,
            timeout_s=timeout_s,
            out=str(out),
        ).model_dump_json()
    )
    processes: list[subprocess.Popen[bytes]] = []
    deadline = time.monotonic() + timeout_s
    try:
        for rank in range(world):
            own = rank_environment(rank, world, port=_PORT, run_id="shaped") | {
                "MASTER_ADDR": address_of(0),
                "GLOO_SOCKET_IFNAME": "eth0",
                "TORCHELASTIC_USE_AGENT_STORE": "False",
                "OMP_NUM_THREADS": "1",
            }
            command = [*first, "ip", "netns", "exec", names[rank // ranks_on_node], sys.executable]
            processes.append(
                subprocess.Popen(
                    [*command, "-m", "observatory.collectives.bench.rank", str(job)],
                    env={**os.environ, **own},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                )
            )
        for process in processes:
            _, outcome = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
            assert process.returncode == 0, outcome.decode(errors="replace")[-2000:]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.communicate()
    return out

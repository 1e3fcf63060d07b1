"""What the kernel shows of a node is read; what it does not show stays unknown."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from observatory.host.node import find_node
from observatory.run.provenance import MOST_DEVICES, Accelerator, FabricLink, RankProvenance


class Kernel:
    """A /proc and a /sys under a temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.sys_root, self.groups = folder / "proc", folder / "sys", folder / "cgroup"
        self.write(self.proc / "self/status", "Name:\tpython\nMems_allowed_list:\t0-1\n")
        self.mount("0::/", f"30 23 0:26 / {self.groups} rw - cgroup2 cgroup2 rw")

    def write(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def files(self, folder: str, **texts: object) -> None:
        """Files of a folder of /sys, by name."""
        for name, text in texts.items():
            self.write(self.sys_root / folder / name, f"{text}\n")

    def mount(self, groups: str, mounts: str) -> None:
        self.write(self.proc / "self/cgroup", groups + "\n")
        self.write(self.proc / "self/mountinfo", mounts + "\n")

    def found(self, **environment: str) -> RankProvenance:
        fields: dict[str, Any] = find_node(environment, proc=self.proc, sys_root=self.sys_root)
        return RankProvenance.model_validate({"machine": {"name": "m"}, **fields})


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3, 9}, raising=False)
    return Kernel(tmp_path)


def test_numa_nodes_are_those_of_the_cores(kernel: Kernel) -> None:
    for node, cores in enumerate(("0-1", "2-7", "8-9", "", "9999999")):
        kernel.files(f"devices/system/node/node{node}", cpulist=cores)
    kernel.files("devices/system/node/power", cpulist="2")
    found = kernel.found(SLURMD_NODENAME="gpu01")
    assert (found.node, found.numa_nodes, found.memory_nodes) == ("gpu01", "1-2", "0-1")


def test_accelerators_and_where_they_are_attached(kernel: Kernel) -> None:
    pci = "bus/pci/devices"
    kernel.files(f"{pci}/0000:1b:00.0", vendor="0x10de", **{"class": "0x030200"}, numa_node=1)
    kernel.files(f"{pci}/0000:9d:00.0", vendor="0x1002", **{"class": "0x120000"}, numa_node=-1)
    kernel.files(f"{pci}/0000:02:00.0", vendor="0x1a03", **{"class": "0x030000"}, numa_node=0)  # the BMC's
    kernel.files(f"{pci}/0000:1b:00.1", vendor="0x10de", **{"class": "0x040300"}, numa_node=1)  # its sound
    kernel.files(f"{pci}/<script>", vendor="0x10de", **{"class": "0x030200"}, numa_node=1)
    assert kernel.found().accelerators == (
        Accelerator(bus_id="0000:1b:00.0", vendor="nvidia", numa_node=1),
        Accelerator(bus_id="0000:9d:00.0", vendor="amd", numa_node=None),
    )
    for number in range(200):
        kernel.files(
            f"{pci}/0000:{number:02x}:00.2", vendor="0x10de", **{"class": "0x030200"}, numa_node=number
        )
    assert len(kernel.found().accelerators) == MOST_DEVICES


def test_links_of_the_network_with_their_rates(kernel: Kernel) -> None:
    port = "class/infiniband/mlx5_0/ports/1"
    kernel.files(port, rate="400 Gb/sec (4X NDR)", state="4: ACTIVE", link_layer="InfiniBand")
    kernel.files("class/infiniband/mlx5_0/device", numa_node=1)
    kernel.files("class/infiniband/mlx5_1/ports/1", rate="?", state="1: DOWN", link_layer="Ethernet")
    kernel.files("class/net/hsn0", type=1, speed=200000, operstate="up")
    kernel.files("class/net/hsn0/device", numa_node=0)
    kernel.files("class/net/eth0", type=1, speed=-1, operstate="unknown")
    kernel.files("class/net/eth0/device", numa_node=-1)
    kernel.files("class/net/docker0", type=1, speed=10000, operstate="up")  # no device
    kernel.files("class/net/ib0", type=32, speed=400000, operstate="up")  # IP over mlx5_0
    kernel.files("class/net/ib0/device", numa_node=1)
    assert kernel.found().fabric == (
        FabricLink(kind="infiniband", name="mlx5_0/1", rate_gbit_s=400.0, up=True, numa_node=1),
        FabricLink(kind="roce", name="mlx5_1/1", rate_gbit_s=None, up=False),
        FabricLink(kind="ethernet", name="eth0"),
        FabricLink(kind="hsn", name="hsn0", rate_gbit_s=200.0, up=True, numa_node=0),
    )


def test_the_smallest_memory_limit_of_version_2_counts(kernel: Kernel) -> None:
    kernel.mount("0::/job_7/step_0/task_1", f"30 23 0:26 / {kernel.groups} rw - cgroup2 cgroup2 rw")
    for folder, limit in (("job_7/step_0/task_1", "max"), ("job_7/step_0", "9000"), ("job_7", "8000")):
        kernel.write(kernel.groups / folder / "memory.max", limit)
    assert kernel.found().memory_limit_bytes == 8000
    kernel.write(kernel.groups / "job_7/memory.max", "nonsense")
    assert kernel.found().memory_limit_bytes == 9000


def test_version_1_writes_a_huge_number_where_there_is_no_limit(kernel: Kernel) -> None:
    kernel.mount("4:memory:/slurm", f"33 31 0:29 / {kernel.groups} rw - cgroup cgroup rw,memory")
    limit = kernel.groups / "slurm/memory.limit_in_bytes"
    kernel.write(limit, "9223372036854771712")
    assert kernel.found().memory_limit_bytes is None
    kernel.write(limit, "4096")
    assert kernel.found().memory_limit_bytes == 4096


@pytest.mark.parametrize("version", [1, 2])
def test_other_jobs_are_counted_where_control_groups_show_them(version: int, kernel: Kernel) -> None:
    assert kernel.found().other_jobs is None
    above = "slurm/uid_1000" if version == 1 else "system.slice/slurmstepd.scope"
    others = ("slurm/uid_1000/job_8", "slurm/uid_2000/job_9") if version == 1 else (f"{above}/job_8",)
    for folder in (f"{above}/job_7/step_0", *others, f"{above}/system"):
        (kernel.groups / folder).mkdir(parents=True)
    kind = ("4:memory:", "cgroup cgroup rw,memory") if version == 1 else ("0::", "cgroup2 cgroup2 rw")
    kernel.mount(f"{kind[0]}/{above}/job_7/step_0", f"30 23 0:26 / {kernel.groups} rw - {kind[1]}")
    assert kernel.found().other_jobs == len(others)


def test_other_users_are_counted_unless_their_processes_are_hidden(kernel: Kernel) -> None:
    assert kernel.found().other_users is None  # no namespace is stated
    (kernel.proc / "self/ns").mkdir()
    (kernel.proc / "self/ns/pid").symlink_to("pid:[4026531836]")
    kernel.write(kernel.proc / "self/mounts", "proc /proc proc rw,nosuid 0 0\n")
    owner = os.stat(kernel.proc).st_uid
    users = {"1": 0, "7": owner, "8": 5000, "9": 5000, "10": 5001, "11": 65534, "12": 101}
    if os.geteuid() != 0:
        users = dict.fromkeys(users, owner)
    for pid, user in users.items():
        (kernel.proc / pid).mkdir()
        os.chown(kernel.proc / pid, user, -1)
    assert kernel.found().other_users == (2 if os.geteuid() == 0 else 0)
    kernel.write(kernel.proc / "self/mounts", "proc /proc proc rw,hidepid=invisible 0 0\n")
    assert kernel.found().other_users is None
    kernel.write(kernel.proc / "self/mounts", "proc /proc proc rw 0 0\n")
    (kernel.proc / "self/ns/pid").unlink()
    (kernel.proc / "self/ns/pid").symlink_to("pid:[4026532999]")  # a container
    assert kernel.found().other_users is None


def test_a_kernel_that_shows_nothing_leaves_everything_unknown(tmp_path: Path) -> None:
    found = find_node({"SLURMD_NODENAME": ""}, proc=tmp_path / "no", sys_root=tmp_path / "no")
    assert found == dict.fromkeys(found, None) | {"accelerators": (), "fabric": ()}


def test_the_files_of_this_machine_fit_the_record() -> None:
    found = RankProvenance.model_validate({"machine": {"name": socket.gethostname()}, **find_node({})})
    assert RankProvenance.model_validate_json(found.model_dump_json()) == found

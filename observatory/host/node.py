"""This process's node: NUMA nodes, memory limit, accelerators, network, and who else is there.

Everything is read from files that the kernel shows without privileges, a bounded number of each kind. A
container is shown the devices of the whole node, and of the other processes only its own.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from observatory.run.control_groups import memory_limit_bytes, own_groups
from observatory.run.files import one_line
from observatory.run.provenance import MOST_DEVICES, Accelerator, FabricLink
from observatory.run.usable_cores import as_ranges, from_ranges, own_cores

_MOST_ENTRIES, _MOST_PROCESSES = 4096, 65536
_RANGES = re.compile(r"(\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*)?", re.ASCII)
_BUS_ID = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]", re.ASCII)
_VENDORS = {"0x10de": "nvidia", "0x1002": "amd", "0x8086": "intel", "0x1da3": "habana"}
#: PCI classes of display controllers and of processing accelerators.
_CLASSES = ("0x03", "0x12")
_RATE = re.compile(r"(\d{1,6}(?:\.\d{1,3})?) Gb/sec", re.ASCII)
_LAYERS: dict[str | None, Literal["infiniband", "roce"]] = {"InfiniBand": "infiniband", "Ethernet": "roce"}
_ETHERNET = "1"  # ARPHRD_ETHER; IP over InfiniBand is a kind of its own
_MOST_MBIT_S = 10**9
#: In the first namespace of processes, as linux/proc_ns.h numbers it, those of all users are shown.
_FIRST_PROCESS_NAMESPACE = "pid:[4026531836]"
_HIDDEN = re.compile(r"hidepid=(?:2|4|invisible|ptraceable)\b")
#: Users from here on are people; lower ones are system accounts (UID_MIN of login.defs).
_FIRST_USER, _NOBODY = 1000, 65534
_JOB, _JOBS_OF_USER = re.compile(r"job_\d+", re.ASCII), re.compile(r"uid_\d+", re.ASCII)


def find_node(
    environment: Mapping[str, str], *, proc: Path = Path("/proc"), sys_root: Path = Path("/sys")
) -> dict[str, Any]:
    """Fields of `RankProvenance` about the node.

    Args:
        environment: of this process.
        proc: where the kernel shows processes.
        sys_root: where it shows devices.
    """
    return {
        "node": one_line(environment.get("SLURMD_NODENAME", ""), 255) or None,
        "numa_nodes": _numa_nodes(own_cores(proc), sys_root),
        "memory_nodes": _memory_nodes(proc),
        "memory_limit_bytes": memory_limit_bytes(proc),
        "other_jobs": _other_jobs(proc),
        "other_users": _other_users(proc),
        "accelerators": tuple(itertools.islice(_accelerators(sys_root), MOST_DEVICES)),
        "fabric": tuple(itertools.islice(_fabric(sys_root), MOST_DEVICES)),
    }


def _numa_nodes(cores: set[int], sys_root: Path) -> str | None:
    """NUMA nodes that cores belong to; None where the system states none."""
    nodes = set()
    for folder in _entries(sys_root / "devices/system/node"):
        number = folder.name.removeprefix("node")
        listed = _text(folder / "cpulist")
        if number.isdecimal() and listed and _RANGES.fullmatch(listed) and cores & from_ranges(listed):
            nodes.add(int(number))
    return as_ranges(nodes) or None


def _memory_nodes(proc: Path) -> str | None:
    for line in (_text(proc / "self/status", most=16384) or "").splitlines():
        name, _, value = line.partition(":")
        if name == "Mems_allowed_list" and _RANGES.fullmatch(value.strip()):
            return value.strip() or None
    return None


def _other_jobs(proc: Path) -> int | None:
    """Slurm's jobs on the node besides this one, as its control groups show them.

    Version 2 has them side by side, version 1 below a folder for each user.
    """
    for controller in ("memory", "cpuset", "freezer", "devices"):
        for folder in own_groups(proc, controller):
            if not _JOB.fullmatch(folder.name):
                continue
            above = folder.parent
            owners = _entries(above.parent) if _JOBS_OF_USER.fullmatch(above.name) else iter((above,))
            jobs = {
                job.name
                for owner in owners
                if owner == above or _JOBS_OF_USER.fullmatch(owner.name)
                for job in _entries(owner)
                if _JOB.fullmatch(job.name)
            }
            return len(jobs - {folder.name})
    return None


def _other_users(proc: Path) -> int | None:
    """Users with processes here besides this process's; None where those of others are hidden."""
    with contextlib.suppress(OSError):
        if os.readlink(proc / "self/ns/pid") != _FIRST_PROCESS_NAMESPACE:
            return None
        mounts = (proc / "self/mounts").read_text("utf-8", "replace").splitlines()
        if any(line.split()[2:3] == ["proc"] and _HIDDEN.search(line) for line in mounts):
            return None
        users = set()
        with os.scandir(proc) as entries:
            for entry in itertools.islice(entries, _MOST_PROCESSES):
                if entry.name.isdecimal():
                    with contextlib.suppress(OSError):
                        users.add(entry.stat(follow_symlinks=False).st_uid)
        return sum(user >= _FIRST_USER and user not in (_NOBODY, os.getuid()) for user in users)
    return None


def _accelerators(sys_root: Path) -> Iterator[Accelerator]:
    for folder in _entries(sys_root / "bus/pci/devices"):
        vendor = _VENDORS.get(_text(folder / "vendor") or "")
        if vendor and _BUS_ID.fullmatch(folder.name) and (_text(folder / "class") or "").startswith(_CLASSES):
            yield Accelerator(bus_id=folder.name, vendor=vendor, numa_node=_numa_node(folder))


def _fabric(sys_root: Path) -> Iterator[FabricLink]:
    for device in _entries(sys_root / "class/infiniband"):
        for port in _entries(device / "ports"):
            rate = _RATE.match(_text(port / "rate") or "")
            state = _text(port / "state")  # "4: ACTIVE"
            yield FabricLink(
                kind=_LAYERS.get(_text(port / "link_layer"), "rdma"),
                name=one_line(f"{device.name}/{port.name}", 100),
                rate_gbit_s=float(rate[1]) if rate else None,
                up=None if state is None else state.endswith("ACTIVE"),
                numa_node=_numa_node(device / "device"),
            )
    for device in _entries(sys_root / "class/net"):
        # What no hardware stands behind (bridges, tunnels, veth) has no device.
        if _text(device / "type") != _ETHERNET or not (device / "device").exists():
            continue
        speed = _text(device / "speed") or ""  # -1 where the driver does not state it
        is_known = speed.isdecimal() and 0 < int(speed[:12]) <= _MOST_MBIT_S
        state = _text(device / "operstate")
        yield FabricLink(
            kind="hsn" if device.name.startswith("hsn") else "ethernet",
            name=one_line(device.name, 100),
            rate_gbit_s=int(speed[:12]) / 1000 if is_known else None,
            up={"up": True, "down": False}.get(state or ""),
            numa_node=_numa_node(device / "device"),
        )


def _numa_node(folder: Path) -> int | None:
    text = _text(folder / "numa_node") or ""
    return int(text) if text.isdecimal() and len(text) < 5 else None  # -1 where it is not stated


def _entries(folder: Path) -> Iterator[Path]:
    """Entries of a folder by name, a bounded number; none where it cannot be listed."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        names = sorted(entry.name for entry in itertools.islice(entries, _MOST_ENTRIES))
        return (folder / name for name in names)
    return iter(())


def _text(path: Path, *, most: int = 4096) -> str | None:
    """The text of a small file of the kernel; None where it cannot be read."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(most).decode("ascii", "replace").strip()
    return None

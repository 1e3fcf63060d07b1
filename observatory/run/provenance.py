"""Where ranks ran: machine, batch job, cores, memory and devices near them, network, versions, settings.

Everything is what the rank itself could read, without privileges. What it could not read is None or missing;
nothing is guessed. No record names another user or another job.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from observatory.run.records import Count, Moment, Record, Text

_Name = Annotated[str, Field(max_length=255)]
#: As Linux writes lists of numbers: ``0-3,8``.
_Ranges = Annotated[str, Field(max_length=1024, pattern=r"^(\d{1,5}(-\d{1,5})?(,\d{1,5}(-\d{1,5})?)*)?$")]
_NumaNode = Annotated[int, Field(ge=0, lt=1 << 16)]

#: Entries of one rank's record.
MOST_VARIABLES, MOST_DEVICES, MOST_VERSIONS = 128, 64, 64
LONGEST_VALUE = 256


class HostSpec(Record):
    """A machine that took part."""

    name: Text
    platform: Text | None = None
    cpu: Text | None = None
    cpus: Count | None = None
    memory_bytes: Count | None = None


class SchedulerJob(Record):
    """The batch job the run was part of, as its scheduler states it to the processes of the job.

    Attributes:
        kind: ``slurm``, ``pbs`` or ``lsf``.
        job_id: its number.
        nodes: its nodes, as the scheduler writes lists of them.
        version: of the scheduler.
        cluster: name of the cluster.
        array_job_id, array_task_id: of an element of an array; None elsewhere.
        partition: partition or queue.
        qos: quality of service.
        reservation: that it runs in.
        node_count: how many nodes it has.
        cpus_per_node: processors that it has on its nodes, as the scheduler writes it (``64(x4)``).
        memory_per_node_bytes, memory_per_cpu_bytes: memory that it asked for; at most one is stated.
        gpus: devices of the job on the node of rank 0, as the scheduler numbers them (``0,1,2,3``).
        gpus_on_node: how many they are.
        start_unix_s, end_unix_s: when it began, and when its time is up.
        restarts: how often it was requeued.
    """

    kind: Text
    job_id: Text | None = None
    nodes: Text | None = None
    version: _Name | None = None
    cluster: _Name | None = None
    array_job_id: _Name | None = None
    array_task_id: _Name | None = None
    partition: _Name | None = None
    qos: _Name | None = None
    reservation: _Name | None = None
    node_count: Count | None = None
    cpus_per_node: Text | None = None
    memory_per_node_bytes: Count | None = None
    memory_per_cpu_bytes: Count | None = None
    gpus: _Name | None = None
    gpus_on_node: Count | None = None
    start_unix_s: Moment | None = None
    end_unix_s: Moment | None = None
    restarts: Count | None = None


class Accelerator(Record):
    """A GPU or accelerator on the PCI bus of a node.

    Attributes:
        bus_id: its address, ``0000:1b:00.0``.
        vendor: ``nvidia``, ``amd``, ``intel`` or ``habana``.
        numa_node: the NUMA node it is attached to; None where the system does not state it.
    """

    bus_id: Annotated[str, Field(max_length=32)]
    vendor: _Name
    numa_node: _NumaNode | None = None


class FabricLink(Record):
    """A network device of a node.

    Attributes:
        kind: ``infiniband``, ``roce`` (RDMA over Ethernet), ``rdma`` (of another kind), ``hsn`` (named
            ``hsn0`` and so on, as Slingshot's are) or ``ethernet``.
        name: ``mlx5_0/1``, device and port, or ``eth0``.
        rate_gbit_s: of the link; None where the driver states none.
        up: whether the link is up; None where that is not stated.
        numa_node: the NUMA node it is attached to; None where the system does not state it.
    """

    kind: Literal["infiniband", "roce", "rdma", "hsn", "ethernet"]
    name: _Name
    rate_gbit_s: Annotated[float, Field(ge=0, le=1e6)] | None = None
    up: bool | None = None
    numa_node: _NumaNode | None = None


class RankProvenance(Record):
    """Where one rank ran.

    Attributes:
        machine: of the rank.
        node: the scheduler's name of its node; None outside a job, or where it states none.
        numa_nodes: NUMA nodes that its cores belong to (``0-1``); None where the system states none.
        memory_nodes: NUMA nodes from which it may take memory; None likewise.
        memory_limit_bytes: the smallest limit of its control groups; None without one.
        other_jobs: other jobs of the scheduler on the node; None where control groups do not show them.
        other_users: users besides its own that have processes there, system accounts left out; None where
            the processes of others are hidden.
        accelerators: GPUs and accelerators that the node shows to it, whether it uses them or not.
        fabric: network devices of the node.
        versions: package, library, driver or ``kernel`` -> version.
        environment: settings of libraries and launchers, by an allow-list, never secrets.
    """

    machine: HostSpec
    node: _Name | None = None
    numa_nodes: _Ranges | None = None
    memory_nodes: _Ranges | None = None
    memory_limit_bytes: Count | None = None
    other_jobs: Count | None = None
    other_users: Count | None = None
    accelerators: Annotated[tuple[Accelerator, ...], Field(max_length=MOST_DEVICES)] = ()
    fabric: Annotated[tuple[FabricLink, ...], Field(max_length=MOST_DEVICES)] = ()
    versions: Annotated[dict[_Name, _Name], Field(max_length=MOST_VERSIONS)] = Field(default_factory=dict)
    environment: Annotated[
        dict[_Name, Annotated[str, Field(max_length=LONGEST_VALUE)]], Field(max_length=MOST_VARIABLES)
    ] = Field(default_factory=dict)

    def in_short(self) -> RankProvenance:
        """Names and versions alone: small enough for the list of all ranks, enough to see what differs."""
        return RankProvenance(
            machine=HostSpec(name=self.machine.name), node=self.node, versions=self.versions
        )

"""The transport over torch.distributed: gloo between processes, NCCL between GPUs.

Shapes: P ranks, G ranks of a group, H values per row.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import struct
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from observatory.collectives.layout import Group, Layout, nodes_in_order, split_into_nodes
from observatory.collectives.transport.base import BaseTransport
from observatory.collectives.transport.rendezvous import Rendezvous
from observatory.errors import ExchangeError
from observatory.host.ranks import RankOf

_GRACE_S = 5.0
_INTERFACE = "GLOO_SOCKET_IFNAME"


class TorchTransport(BaseTransport):
    """Ranks of a torch.distributed process group; initialises the group if the program has not."""

    def __init__(
        self,
        backend: str,
        where: RankOf,
        *,
        ranks_per_node: int | None,
        timeout_s: float,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self._rendezvous: Rendezvous | None = None
        self._chose_interface = False
        self._owns_group = not distributed.is_initialized()
        if self._owns_group:
            self._rendezvous = Rendezvous(where, environment, timeout_s=timeout_s)
            if backend == "gloo" and len(self._rendezvous.hosts) > 1:
                self._choose_interface(self._rendezvous.meeting_host)
            if backend == "nccl":
                torch.cuda.set_device(where.local_rank or 0)
            self._initialise(backend, where, self._rendezvous, timeout_s)
        self.backend = distributed.get_backend()
        device = torch.device("cuda" if self.backend == "nccl" else "cpu")
        alone = Layout(rank=where.rank, node_of_P=(0,) * where.world)
        super().__init__(alone, device=device, timeout_s=timeout_s)
        self._groups: dict[Group, Any] = {"world": None}
        if ranks_per_node is None:
            labels = self.all_gather_json([os.uname().nodename, where.node])
            nodes = nodes_in_order([tuple(label) for label in labels])
        else:
            nodes = split_into_nodes(where.world, ranks_per_node)
        self.layout = Layout(rank=where.rank, node_of_P=nodes)

    def _choose_interface(self, meeting_host: str) -> None:
        """Keep gloo from listening on loopback; it looks at the environment whenever a group is made."""
        if _INTERFACE not in os.environ and not has_reachable_name():
            interface = interface_toward(meeting_host)
            if interface is not None:
                os.environ[_INTERFACE] = interface
                self._chose_interface = True

    @staticmethod
    def _initialise(backend: str, where: RankOf, rendezvous: Rendezvous, timeout_s: float) -> None:
        try:
            distributed.init_process_group(
                backend,
                store=rendezvous.store,
                rank=where.rank,
                world_size=where.world,
                timeout=timedelta(seconds=timeout_s),
            )
        except RuntimeError as error:
            raise rendezvous.explain_joining(error) from error

    def barrier(self, timeout_s: float | None = None) -> None:
        """Wait for all ranks."""
        limit = timedelta(seconds=self.timeout_s if timeout_s is None else timeout_s)

        def wait() -> None:
            work = distributed.barrier(async_op=True)
            if work is not None:
                work.wait(limit)

        self._guarded("a barrier", wait)

    def close(self, error: str | None = None) -> None:
        """Leave the process group, if it is ours."""
        if self._owns_group and distributed.is_initialized():
            if self._rendezvous is not None:
                self._rendezvous.leave(error)
            distributed.destroy_process_group()
        if self._chose_interface:
            os.environ.pop(_INTERFACE, None)
            self._chose_interface = False
        self._owns_group = False

    def _all_to_all(
        self, rows: torch.Tensor, send_G: list[int], receive_G: list[int], group: Group
    ) -> torch.Tensor:
        sent = self._here(rows)
        received = sent.new_empty((sum(receive_G), *sent.shape[1:]))
        handle = self._handle(group)
        self._guarded(
            f"an all-to-all of group {group}",
            lambda: distributed.all_to_all_single(received, sent, receive_G, send_G, group=handle),
            group,
        )
        return received.to(rows.device)

    def _all_gather(self, rows: torch.Tensor, rows_P: list[int]) -> torch.Tensor:
        longest = max(rows_P)
        padded = self._here(rows)
        if rows.shape[0] < longest:
            padded = torch.cat([padded, padded.new_zeros((longest - rows.shape[0], *rows.shape[1:]))])
        gathered = padded.new_empty((self.size * longest, *rows.shape[1:]))
        self._guarded("an all-gather", lambda: _all_gather_single(gathered, padded))
        if min(rows_P) < longest:
            parts = [gathered[p * longest : p * longest + n] for p, n in enumerate(rows_P)]
            gathered = torch.cat(parts)
        return gathered.to(rows.device)

    def _reduce_scatter(self, rows: torch.Tensor, rows_P: list[int]) -> torch.Tensor:
        longest, own_rows = max(rows_P), rows_P[self.rank]
        padded = self._here(rows)
        if min(rows_P) < longest:
            parts = padded.new_zeros((self.size, longest, *rows.shape[1:]))
            for part, given in zip(parts, torch.split(padded, rows_P), strict=True):
                part[: given.shape[0]] = given
            padded = parts.flatten(0, 1)
        summed = padded.new_empty((longest, *rows.shape[1:]))
        self._guarded("a reduce-scatter", lambda: _reduce_scatter_single(summed, padded))
        return summed[:own_rows].to(rows.device)

    def _handle(self, group: Group) -> Any:
        """The process group; made on all ranks at the first use, which is collective anyway."""
        if group not in self._groups:
            for ranks in self.layout.all_groups(group):
                made = distributed.new_group(list(ranks), timeout=timedelta(seconds=self.timeout_s))
                if self.rank in ranks:
                    self._groups[group] = made
        return self._groups[group]

    def _here(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows where this backend takes them from; autograd ends at the transport."""
        return rows.detach().to(self.device)

    def _guarded(self, what: str, call: Callable[[], object], group: Group = "world") -> None:
        try:
            call()
        except RuntimeError as error:
            if self._rendezvous is None:
                raise ExchangeError(
                    f"rank {self.rank} of {self.size} timed out in {what}: {error}; the process group "
                    "was made by the caller, so who is missing is not known"
                ) from error
            grace_s = min(_GRACE_S, self.timeout_s)
            members = self.layout.members(group)
            raise self._rendezvous.explain(what, error, members=members, grace_s=grace_s) from error


def _all_gather_single(gathered: torch.Tensor, rows: torch.Tensor) -> None:
    """``all_gather_single``, under the name that torch has for it (the older one is deprecated from 2.13)."""
    call = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    call(gathered, rows)


def _reduce_scatter_single(summed: torch.Tensor, rows: torch.Tensor) -> None:
    """``reduce_scatter_single``, likewise."""
    call = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor
    call(summed, rows)


_SIOCGIFADDR = 0x8915  # of netdevice(7), Linux
_DISCARD_PORT = 9  # nothing is sent


def has_reachable_name() -> bool:
    """Whether the name of this host stands for an address that other hosts could reach.

    gloo listens on the address of the host's name. Where that is missing or a loopback address (as Debian's
    ``127.0.1.1``), gloo falls back to loopback, and ranks of other hosts try to reach themselves.
    """
    with contextlib.suppress(OSError):
        addresses = socket.getaddrinfo(socket.gethostname(), None)
        return any(not ipaddress.ip_address(str(address[0])).is_loopback for *_, address in addresses)
    return False


def interface_toward(host: str) -> str | None:
    """Name of the interface whose IPv4 address this host has on its way to ``host``, itself included.

    Returns:
        None for a loopback address, an unknown host, or where the system does not report it.
    """
    if sys.platform != "linux":
        return None
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, _DISCARD_PORT))
        address = str(probe.getsockname()[0])
        if not ipaddress.ip_address(address).is_loopback:
            return next(
                (name for _, name in socket.if_nameindex() if _address_of(probe, name) == address), None
            )
    return None


def _address_of(probe: socket.socket, interface: str) -> str | None:
    import fcntl

    with contextlib.suppress(OSError):  # an interface without an IPv4 address
        answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        return socket.inet_ntoa(answer[20:24])
    return None

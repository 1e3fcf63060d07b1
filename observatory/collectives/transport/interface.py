"""The network interface that joins this host to another.

gloo listens on the address of the host's own name. Where that name has none, or only a loopback one (as
Debian's ``127.0.1.1``), it falls back to loopback, and ranks of other hosts try to reach themselves.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
import sys

_SIOCGIFADDR = 0x8915  # of netdevice(7), Linux
_DISCARD_PORT = 9  # nothing is sent


def has_reachable_name() -> bool:
    """Whether the name of this host stands for an address that other hosts could reach."""
    with contextlib.suppress(OSError):
        found = socket.getaddrinfo(socket.gethostname(), None)
        return any(not ipaddress.ip_address(str(address[0])).is_loopback for *_, address in found)
    return False


def interface_toward(host: str) -> str | None:
    """Name of the interface whose IPv4 address this host has on its way to ``host``, itself included.

    Returns:
        None for a loopback address, an unknown host, or where the system does not tell.
    """
    if sys.platform != "linux":
        return None
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, _DISCARD_PORT))
        own = str(probe.getsockname()[0])
        if not ipaddress.ip_address(own).is_loopback:
            return next((name for _, name in socket.if_nameindex() if _address_of(probe, name) == own), None)
    return None


def _address_of(probe: socket.socket, interface: str) -> str | None:
    import fcntl

    with contextlib.suppress(OSError):  # an interface without an IPv4 address
        told = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        return socket.inet_ntoa(told[20:24])
    return None

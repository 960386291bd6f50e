"""Which of a node's networks and GPUs a process uses."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Sequence


def use_interface_of(address: str) -> None:
    """Make gloo and NCCL talk over the interface that owns `address`; before a process group is made.

    Left alone, gloo listens where the host's name resolves to, which on many nodes is 127.0.0.1: then ranks on other
    nodes are refused. What the user has set stays.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                # SIOCGIFADDR (netdevice(7)): struct ifreq holds the name, then a sockaddr_in whose address is at 20.
                found = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # an interface without an IPv4 address
            if socket.inet_ntoa(found[20:24]) == address:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
                os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
                return


def use_interface_to(address: str) -> None:
    """The same with the interface by which this machine reaches `address`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # sends nothing
        use_interface_of(probe.getsockname()[0])


def use_gpus(gpus: Sequence[str]) -> None:
    """Let this process and those it starts see these alone; none leaves it as it is. Before CUDA is first used."""
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)

"""Which of a node's networks and GPUs a process uses."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Sequence


def use_interface_of(address: str) -> None:
    """Make gloo and NCCL talk over the interface that owns `address`; before torch.distributed is imported or used.

    Left alone, gloo listens where the host's name resolves to, which on many nodes is 127.0.0.1: then ranks on other
    nodes are refused.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                # SIOCGIFADDR (netdevice(7)): struct ifreq holds the name, then a sockaddr_in whose address is at 20.
                found = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # an interface without an IPv4 address
            if socket.inet_ntoa(found[20:24]) == address:
                os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = name
                return


def use_gpus(gpus: Sequence[str]) -> None:
    """Let this process and those it starts see these alone; none leaves it as it is. Before CUDA is first used."""
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)

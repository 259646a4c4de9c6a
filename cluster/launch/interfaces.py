"""Network interfaces of this machine, and the one by which gloo and NCCL connect the workers.

Unless it is told, gloo takes the address of the machine's own name, which /etc/hosts often gives as
127.0.0.1, and NCCL the first interface it finds. The nodes of a cluster reach each other at the
addresses that Ray knows them by, so the interface that holds this address is the one to take.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping

import psutil

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
"""Variables that gloo (torch/csrc/distributed/c10d/ProcessGroupGloo.cpp) and NCCL read."""
INTERNET = (socket.AF_INET, socket.AF_INET6)


def list_addresses() -> dict[str, list[str]]:
    """Return the addresses of each interface of this machine; IPv4 first, without zones."""
    held: dict[str, list[str]] = {}
    for label, found in psutil.net_if_addrs().items():
        name = label.partition(":")[0]  # a second address may be called eth0:1
        held.setdefault(name, []).extend(
            one.address.partition("%")[0]
            for family in INTERNET
            for one in found
            if one.family == family
        )
    return held


def find_interface(address: str, addresses: Mapping[str, list[str]]) -> str:
    """Return the name of the interface that holds an address; "" if none does.

    A node behind a translation of addresses may have an address that none of its own is.
    """
    return next((name for name, held in addresses.items() if address in held), "")


def is_interface(variable: str, value: str, names: Mapping[str, object]) -> bool:
    """Return whether the value of `GLOO` or `NCCL` names existing interfaces."""
    parts = value.split(",")
    if variable == GLOO:
        return all(part in names for part in parts)
    # NCCL takes prefixes of names; `=` before whole names, `^` before those to exclude.
    return value.startswith("^") or any(
        name == part[1:] if part.startswith("=") else name.startswith(part)
        for part in parts
        for name in names
    )


def choose_interface(
    address: str,
    addresses: Mapping[str, list[str]],
    environment: MutableMapping[str, str] = os.environ,
) -> str:
    """Have gloo and NCCL use the interface that holds an address; the user's own setting wins.

    Args:
        address: that by which Ray knows this node.
        addresses: result of `list_addresses`.
        environment: of this process.

    Returns:
        The address at which other workers reach the gloo of this process.

    Raises:
        ValueError: the user's setting names no interface of this machine.
    """
    if interface := find_interface(address, addresses):
        environment.setdefault(GLOO, interface)
        environment.setdefault(NCCL, f"={interface}")
    for variable in (GLOO, NCCL):
        value = environment.get(variable, "")
        if value and not is_interface(variable, value, addresses):
            known = ", ".join(addresses)
            raise ValueError(f"{variable}={value}, and there is no such interface ({known})")
    held = addresses.get(environment.get(GLOO, "").split(",")[0], [])
    return address if address in held or not held else held[0]

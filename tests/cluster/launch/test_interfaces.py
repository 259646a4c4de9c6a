"""The interface by which gloo and NCCL connect the workers of a node."""

from __future__ import annotations

import re
import socket

import pytest

from cluster.launch.interfaces import (
    GLOO,
    NCCL,
    choose_interface,
    find_interface,
    list_addresses,
)

ADDRESSES = {
    "lo": ["127.0.0.1", "::1"],
    "docker0": ["172.17.0.1"],
    "ens5": ["10.1.0.7", "fd00::7"],
    "ib0": ["10.2.0.7"],
    "ib1": [],
}


def test_every_address_of_this_machine_has_its_interface():
    addresses = list_addresses()
    assert set(addresses) <= {name for _, name in socket.if_nameindex()}
    assert find_interface("127.0.0.1", addresses) == "lo"
    assert find_interface("192.0.2.200", addresses) == ""


@pytest.mark.parametrize(
    ("address", "own", "expected", "at"),
    [
        ("10.1.0.7", {}, {GLOO: "ens5", NCCL: "=ens5"}, "10.1.0.7"),
        ("fd00::7", {}, {GLOO: "ens5", NCCL: "=ens5"}, "fd00::7"),
        ("127.0.0.1", {}, {GLOO: "lo", NCCL: "=lo"}, "127.0.0.1"),
        # What the user has set wins, and others are told where that is.
        ("10.1.0.7", {GLOO: "ib0"}, {GLOO: "ib0", NCCL: "=ens5"}, "10.2.0.7"),
        ("10.1.0.7", {GLOO: "ib0,ens5"}, {GLOO: "ib0,ens5", NCCL: "=ens5"}, "10.2.0.7"),
        ("10.1.0.7", {GLOO: "ib1"}, {GLOO: "ib1", NCCL: "=ens5"}, "10.1.0.7"),
        ("10.1.0.7", {NCCL: "ib"}, {GLOO: "ens5", NCCL: "ib"}, "10.1.0.7"),
        # A node behind a translation of addresses: nothing is known.
        ("203.0.113.9", {}, {}, "203.0.113.9"),
    ],
)
def test_the_interface_of_rays_address_is_chosen(address, own, expected, at):
    environment = dict(own)
    assert choose_interface(address, ADDRESSES, environment) == at
    assert environment == expected


@pytest.mark.parametrize("own", [{GLOO: "eth0"}, {GLOO: "en"}, {NCCL: "=en"}, {NCCL: "mlx"}])
def test_an_interface_that_a_node_does_not_have_is_named(own):
    (variable, value), *_ = own.items()
    text = f"{variable}={value}, and there is no such interface (lo, docker0, ens5, ib0, ib1)"
    with pytest.raises(ValueError, match=re.escape(text)):
        choose_interface("10.1.0.7", ADDRESSES, dict(own))

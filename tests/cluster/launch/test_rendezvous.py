"""Process group of the workers: what keeps them from meeting."""

from __future__ import annotations

import socket

import pytest
import ray

from cluster.launch import rendezvous


def locate(*nodes: str) -> list[rendezvous.Endpoint]:
    return [rendezvous.Endpoint(name, name, "127.0.0.1") for name in nodes]


def execute(rank, work, *arguments):
    """All workers are this process."""
    return work(*arguments)


def test_of_nodes_that_do_not_reach_each_other_the_cause_is_told(monkeypatch):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setattr(ray, "get", lambda answers: answers)
        monkeypatch.setattr(rendezvous, "open_door", lambda *_: nobody.getsockname())
        monkeypatch.setattr(rendezvous, "close_door", lambda: None)
        with pytest.raises(ConnectionError) as caught:
            rendezvous.check_paths(execute, locate("a", "a", "b"))
    failed = rendezvous.describe_start(caught.value)
    assert failed.worker == "the workers did not meet"
    assert failed.text.startswith(
        "node a cannot reach node a at 127.0.0.1 (Connection refused), and 3 more such paths; open"
    )
    assert "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME on each node" in failed.text
    assert (failed.exit_code, failed.final) == (3, False)


def test_nodes_that_reach_each_other_are_not_told(monkeypatch):
    monkeypatch.setattr(ray, "get", lambda answers: answers)
    doors = []
    for _ in range(2):
        doors.append(rendezvous.open_door("127.0.0.1", 2))
        assert rendezvous.try_doors(doors[-1:]) == [""]
        rendezvous.close_door()
    assert rendezvous.try_doors(doors) == ["Connection refused"] * 2
    with rendezvous.listen("203.0.113.9", 1) as everywhere:  # an address of nobody here
        assert rendezvous.try_doors([("127.0.0.1", everywhere.getsockname()[1])]) == [""]
    for nodes in (("a", "a"), ("a",)):
        rendezvous.check_paths(None, locate(*nodes))  # workers of one node have nothing to try

"""Who is which column where: pure functions, no processes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.topology import Node, plan, seats
from pipeline.errors import SetupError


def node(name: str, cpus: float = 8, gpus: float = 0) -> Node:
    return Node(id=f"id-{name}", name=name, cpus=cpus, gpus=gpus)


def test_one_machine_gives_each_column_half_of_its_cores():
    found = plan([node("m", cpus=9)], replicas=1, size=2, gpu=False)
    assert (found.nodes, found.cpus, found.gpus) == (("id-m", "id-m"), 4, 0)


def test_two_machines_with_three_gpus_each_get_a_pair_each():
    # Ray's own PACK puts three workers on one of them and splits a pair (facts/ray.md).
    found = plan([node("m", gpus=3), node("n", gpus=3)], replicas=2, size=2, gpu=True)
    assert sorted(found.nodes) == ["id-m", "id-m", "id-n", "id-n"]
    assert (found.cpus, found.gpus) == (4, 1)


def test_a_single_gpu_can_hold_both_columns():
    assert plan([node("m", gpus=1)], replicas=1, size=1, gpu=True).nodes == ("id-m",)


@pytest.mark.parametrize(
    ("nodes", "size", "gpu", "words"),
    [
        ([node("m", gpus=1)], 2, True, ["2 GPUs", "m: 1", "--columns-per-worker 2", "--device cpu"]),
        ([node("m", gpus=1), node("n", gpus=1)], 2, True, ["m: 1, n: 1", "on one node"]),
        ([node("m", cpus=1)], 2, False, ["2 CPUs", "m: 1"]),
        ([], 2, True, ["none"]),
    ],
)
def test_too_little_room_is_refused_with_what_is_there_and_what_is_missing(nodes, size, gpu, words):
    with pytest.raises(SetupError) as caught:
        plan(nodes, replicas=1, size=size, gpu=gpu)
    message = str(caught.value)
    assert [word for word in words if word not in message] == []
    assert "\n" not in message


sizes = st.sampled_from([1, 2])


@given(st.lists(st.integers(0, 9), max_size=6), st.integers(1, 8), sizes)
def test_a_plan_keeps_replicas_together_and_within_each_node(gpus, replicas, size):
    nodes = [node(str(place), cpus=16, gpus=count) for place, count in enumerate(gpus)]
    fits = sum(count // size for count in gpus) >= replicas
    if not fits:
        with pytest.raises(SetupError):
            plan(nodes, replicas=replicas, size=size, gpu=True)
        return
    found = plan(nodes, replicas=replicas, size=size, gpu=True)
    assert len(found.nodes) == replicas * size
    for one in nodes:
        assert found.nodes.count(one.id) <= one.gpus
        assert found.nodes.count(one.id) * found.cpus <= one.cpus
    for start in range(0, len(found.nodes), size):
        assert len(set(found.nodes[start : start + size])) == 1


@given(st.lists(st.sampled_from("mno"), min_size=1, max_size=12), sizes)
def test_seats_take_every_rank_once_and_never_split_a_replica(nodes, size):
    if any(nodes.count(name) % size for name in nodes):
        with pytest.raises(SetupError):
            seats(nodes, size)
        return
    found = seats(nodes, size)
    assert sorted(rank for ranks in found for rank in ranks) == list(range(len(nodes)))
    assert all(len({nodes[rank] for rank in ranks}) == 1 for ranks in found)
    assert found[0][0] == 0  # the leader of the job is rank 0 of torch.distributed


def test_a_split_pair_is_refused_with_the_table_of_ranks():
    with pytest.raises(SetupError, match=r"m: ranks \[0, 1, 2\]; n: ranks \[3\]"):
        seats(["m", "m", "m", "n"], 2)

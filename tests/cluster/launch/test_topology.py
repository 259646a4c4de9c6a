"""Placement of replicas and columns: pure functions, no processes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import Config
from cluster.launch.placement import (
    Node,
    NoRoom,
    WorkerLocation,
    check_this_machine,
    choose_size,
    describe_layout,
    find_gpu_index,
    group_ranks,
    list_workers,
    name_nodes,
    place_run,
    place_workers,
    read_gpu,
)
from pipeline.tools.errors import SetupError


def node(name: str, cpus: float = 8, gpus: float = 0) -> Node:
    return Node(id=f"id-{name}", name=name, cpus=cpus, gpus=gpus)


def test_one_machine_gives_each_column_half_of_its_cores():
    found = place_workers([node("m", cpus=9)], sizes=[1], size=2, gpu=False)
    assert (found.nodes, found.cpus, found.gpus) == (("id-m", "id-m"), 4, 0)


def test_two_machines_with_three_gpus_each_get_a_pair_each():
    # Ray's own PACK puts three workers on one of them and splits a pair (facts/ray.md).
    found = place_workers([node("m", gpus=3), node("n", gpus=3)], sizes=[2], size=2, gpu=True)
    assert sorted(found.nodes) == ["id-m", "id-m", "id-n", "id-n"]
    assert (found.cpus, found.gpus) == (4, 1)


def test_a_single_gpu_can_hold_both_columns():
    assert place_workers([node("m", gpus=1)], sizes=[1], size=1, gpu=True).nodes == ("id-m",)


ONE, PAIR = "one GPU here: both columns on it", ""
EACH = "no node has two GPUs: both columns on each"


@pytest.mark.parametrize(
    ("settings", "gpus", "gpu", "size", "told"),
    [
        ({}, [0], False, 2, PAIR),  # on CPUs a worker for each column, as ever
        ({}, [1], False, 2, PAIR),
        ({}, [1], True, 1, ONE),
        ({}, [2], True, 2, PAIR),
        ({}, [1, 3, 0], True, 2, PAIR),
        ({"replicas": 2}, [1, 1], True, 1, EACH),
        ({"replicas": "1:4"}, [1, 0], True, 1, ONE),
        ({"columns": 1}, [1], True, 1, ""),  # it has one column, and nobody asked for two
        ({"columns": 1}, [0], False, 1, ""),
        ({"columns_per_worker": 2}, [2], True, 1, ""),
        ({"columns_per_worker": 1}, [2], True, 2, ""),
    ],
)
def test_both_columns_share_a_gpu_where_no_node_has_two(settings, gpus, gpu, size, told):
    config = Config.from_settings(settings)
    nodes = [node(str(number), gpus=count) for number, count in enumerate(gpus)]
    placement = place_run(config, nodes, gpu)
    assert placement.size == size
    assert describe_layout(config, placement) == told


def test_a_pair_waits_for_its_second_gpu_while_another_job_holds_it():
    with pytest.raises(NoRoom, match=r"b: 1 GPUs \(3 more in use\)"):
        place_run(Config(), [BUSY], True)


def test_a_worker_for_each_column_is_refused_on_one_gpu_with_the_way_out():
    with pytest.raises(NoRoom, match="columns-per-worker 2"):
        place_run(Config(columns_per_worker=1), [node("m", gpus=1)], True)
    assert choose_size(Config(columns_per_worker=1), [node("m", gpus=1)], True) == 2


def test_a_worker_with_a_gpu_needs_a_cpu_too():
    """Ray would wait without end for a bundle of both."""
    nodes = [node("m", cpus=3, gpus=8), node("n", cpus=8, gpus=2)]
    assert place_workers(nodes, sizes=[1, 2, 3], size=2, gpu=True).nodes.count("id-m") == 2
    with pytest.raises(NoRoom, match="m: 8 GPUs and 3 CPUs"):
        place_workers(nodes, sizes=[3], size=2, gpu=True)


def test_of_a_range_the_most_that_fit_are_taken():
    nodes = [node("m", gpus=4), node("n", gpus=3)]
    ranges = ([1], [1, 2], [1, 2, 4], [1, 2, 3, 4], [2, 8])
    found = [place_workers(nodes, sizes=sizes, size=2, gpu=True).replicas for sizes in ranges]
    assert found == [1, 2, 2, 3, 2]
    with pytest.raises(NoRoom):
        place_workers(nodes, sizes=[4, 8], size=2, gpu=True)


BUSY = Node(id="b", name="b", cpus=8, gpus=1, busy_cpus=4, busy_gpus=3)


@pytest.mark.parametrize(
    ("nodes", "size", "gpu", "words"),
    [
        ([node("m", gpus=1)], 2, True,
         ["8 GPUs", "m: 1", "not even one", "--columns-per-worker 2", "--device cpu"]),
        ([node("m", gpus=5), node("n", gpus=1)], 2, True,
         ["m: 5 GPUs, n: 1 GPUs", "2 of them on one node", "2 replicas would fit",
          "--replicas 2 or"]),
        ([BUSY], 2, True, ["b: 1 GPUs (3 more in use)", "not even one"]),
        ([node("m", gpus=3)], 1, True, ["4 replicas of 1 worker need 4 GPUs;", "--replicas 3"]),
        ([node("m", cpus=3)], 2, False, ["8 CPUs", "m: 3", "--replicas 1 or more nodes"]),
        ([], 2, True, ["no nodes"]),
    ],
)  # fmt: skip
def test_too_little_room_is_refused_with_what_is_there_and_what_is_missing(nodes, size, gpu, words):
    with pytest.raises(SetupError) as caught:
        place_workers(nodes, sizes=[4], size=size, gpu=gpu)
    message = str(caught.value)
    assert [word for word in words if word not in message] == []
    assert "\n" not in message


columns = st.sampled_from([1, 2])


@given(st.lists(st.integers(0, 9), max_size=6), st.integers(1, 8), columns)
def test_a_plan_keeps_replicas_together_and_within_each_node(gpus, replicas, size):
    nodes = [node(str(place), cpus=16, gpus=count) for place, count in enumerate(gpus)]
    most = sum(count // size for count in gpus)
    if most < replicas:
        with pytest.raises(SetupError) as caught:
            place_workers(nodes, sizes=[replicas], size=size, gpu=True)
        if most:  # what it says would fit does
            assert f"{most} replica" in str(caught.value)
            assert place_workers(nodes, sizes=[most], size=size, gpu=True).replicas == most
        return
    found = place_workers(nodes, sizes=[replicas], size=size, gpu=True)
    assert len(found.nodes) == replicas * size
    for one in nodes:
        assert found.nodes.count(one.id) <= one.gpus
        assert found.nodes.count(one.id) * found.cpus <= one.cpus
    for start in range(0, len(found.nodes), size):
        assert len(set(found.nodes[start : start + size])) == 1


@given(st.lists(st.sampled_from("mno"), min_size=1, max_size=12), columns, st.randoms())
def test_seats_take_every_rank_once_and_never_split_a_replica(nodes, size, random):
    """GPUs come in any order; pairs have neighbours among those that the job has on a node."""
    free = {name: random.sample(range(16), 16) for name in "mno"}
    gpus = [free[name].pop() for name in nodes]
    started = [WorkerLocation(*at, gpu, gpu) for *at, gpu in zip(nodes, nodes, gpus, strict=True)]
    if any(nodes.count(name) % size for name in nodes):
        with pytest.raises(SetupError):
            group_ranks(started, size)
        return
    found = group_ranks(started, size)
    assert sorted(rank for ranks in found for rank in ranks) == list(range(len(nodes)))
    assert 0 in found[0]
    for ranks in found:
        assert len({nodes[rank] for rank in ranks}) == 1
        mine = [started[rank].gpu for rank in ranks]
        others = [one.gpu for one in started if one.node == nodes[ranks[0]]]
        assert [gpu for gpu in others if min(mine) < gpu < max(mine)] == []
        assert mine == sorted(mine)
    rows = list_workers(started, found, 2)
    assert [(row.rank, row.replica) for row in rows] == [
        (rank, rank // size) for rank in range(len(nodes))
    ]
    assert {row.column for row in rows} == ({"a", "b"} if size == 2 else {"a and b"})
    assert [(row.node, row.gpu) for row in rows] == [
        (started[rank].name, started[rank].gpu) for ranks in found for rank in ranks
    ]


IDS = ["GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "MIG-1/7/0", "MIG-b7f8"]


@pytest.mark.parametrize(
    ("ids", "visible", "gpu", "index"),
    [
        ([], "", None, 0),
        ([3], "1,3", 3, 3),
        (["10"], "10,9", 10, 10),  # Ray sorts them as text
        (IDS[:1], ",".join(reversed(IDS)), IDS[0], 2),
        (IDS[1:2], ",".join(IDS), IDS[1], 1),
        (IDS[2:], "", IDS[2], 0),
    ],
)
def test_a_gpu_is_named_by_number_or_id_and_has_a_place_on_its_node(ids, visible, gpu, index):
    found = read_gpu(ids)
    assert (found, find_gpu_index(found, visible)) == (gpu, index)


def test_pairs_of_gpus_that_have_ids_are_neighbours_in_the_order_of_their_places():
    visible = "GPU-a,GPU-b,MIG-c,MIG-d"
    taken = ["MIG-d", "GPU-a", "MIG-c", "GPU-b"]
    started = [WorkerLocation("n", "n", gpu, find_gpu_index(gpu, visible)) for gpu in taken]
    found = group_ranks(started, 2)
    pairs = [[started[rank].gpu for rank in ranks] for ranks in found]
    assert sorted(map(tuple, pairs)) == [("GPU-a", "GPU-b"), ("MIG-c", "MIG-d")]
    assert [worker.gpu for worker in list_workers(started, found, 2)] == [
        started[rank].gpu for ranks in found for rank in ranks
    ]


def test_a_split_pair_is_refused_with_the_table_of_ranks():
    with pytest.raises(SetupError, match=r"m: ranks \[0, 1, 2\]; n: ranks \[3\]"):
        group_ranks([WorkerLocation(name, name) for name in "mmmn"], 2)


@pytest.mark.parametrize(
    ("settings", "gpus", "offered", "words"),
    [
        ({}, 0, 2, ""),
        ({"replicas": 8}, 0, 16, "16 workers take turns on 2 cores, each with"),
        ({"replicas": 8}, 0, 16, "use --columns-per-worker 2 or fewer --replicas"),
        ({"replicas": 4, "columns_per_worker": 2}, 0, 4, "use fewer --replicas"),
        ({"replicas": "1:4"}, 0, 2, ""),  # as many as there is room for
        ({"replicas": "2:4"}, 0, 4, "4 workers take turns"),
        ({"replicas": "1:4"}, 8, 8, ""),
        ({}, 1, 1, ""),
        ({"replicas": "1:4"}, 1, 4, ""),
        ({"device": "cpu"}, 8, 2, ""),
    ],
)
def test_what_this_machine_has_room_for_is_known_before_ray_starts(
    monkeypatch, settings, gpus, offered, words
):
    monkeypatch.setattr("cluster.launch.placement.cpu_count", lambda: 2)
    found = check_this_machine(Config.from_settings(settings), gpus)
    assert found[0] == offered
    assert words in found[1]
    assert bool(words) == bool(found[1])


def test_an_impossible_number_of_replicas_is_refused_before_ray_starts(monkeypatch):
    for settings, gpus, words in (
        ({"device": "gpu"}, 0, "1 replica of 1 worker needs 1 GPU;"),
        ({"columns_per_worker": 1}, 1, "needs 2 GPUs, 2 of them on one node"),
        ({"replicas": 4}, 2, "1 replica would fit; use --replicas 1"),
    ):
        with pytest.raises(NoRoom, match=words):
            check_this_machine(Config.from_settings(settings), gpus)
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 4 * 10**6}.get)
    with pytest.raises(NoRoom, match=r"128 workers need 89.6 GB .* has 16.4 GB; use --replicas 11"):
        check_this_machine(Config.from_settings({"replicas": 64}), 0)


def test_hosts_of_one_name_are_told_apart_by_their_addresses():
    def node(identity: str, name: str, address: str) -> dict[str, str]:
        return {"NodeID": identity, "NodeManagerHostname": name, "NodeManagerAddress": address}

    # Host a was started again: Ray still lists what it was before.
    nodes = [node("1", "vm", "10.0.0.1"), node("2", "vm", "10.0.0.2"),
             node("3", "a", "10.0.0.3"), node("4", "a", "10.0.0.3")]  # fmt: skip
    assert name_nodes(nodes) == {"1": "vm (10.0.0.1)", "2": "vm (10.0.0.2)", "3": "a", "4": "a"}

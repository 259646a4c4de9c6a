"""Two replicas of two columns are the one-process network on the whole batch: four processes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cluster.mesh import ProcessMesh, create_mesh
from cluster.training import gradients
from cluster.training.gradients import GradientAverage
from model.alexnet import AlexNet
from model.exchange import Exchange
from tests.helpers.processes import run_ranks

SEATS = ((0, 1), (2, 3))
REPLICAS = len(SEATS)
BATCH = 2
"""Images of a replica."""
STEPS = 2
CLASSES = 10


def build_network(mesh: ProcessMesh) -> AlexNet:
    exchange = Exchange(mesh.pair) if mesh.pair else None
    return AlexNet(mesh.columns, CLASSES, width=1 / 16, exchange=exchange, seed=7).double()


def make_global_batch(step: int) -> tuple[Tensor, Tensor]:
    """The global batch of a step, replica after replica."""
    generator = torch.Generator().manual_seed(50 + step)
    images = torch.randn(REPLICAS * BATCH, 3, 224, 224, generator=generator, dtype=torch.float64)
    return images * 60, torch.randint(0, CLASSES, (REPLICAS * BATCH,), generator=generator)


def first(step: int, replica: int) -> int:
    """Position of the first sample of a replica in a step."""
    return (step * REPLICAS + replica) * BATCH


def take_replica_batch(step: int, replica: int) -> tuple[Tensor, Tensor]:
    images, labels = (rows.chunk(REPLICAS)[replica] for rows in make_global_batch(step))
    return images, labels


def run_steps(
    net: AlexNet, backward: Callable[[int], object], steps: int = STEPS
) -> dict[str, dict[str, Tensor]]:
    """Gradients of the first step, and the parameters after the last."""
    optimizer = torch.optim.SGD(net.parameters(), 0.003, momentum=0.9, weight_decay=5e-4)
    found = {}
    for step in range(steps):
        optimizer.zero_grad()
        backward(step)
        if step == 0:
            found["gradients"] = split_gradients(net)
        optimizer.step()
    return {**found, "parameters": {k: v.clone() for k, v in net.column_state().items()}}


def split_gradients(net: AlexNet) -> dict[str, Tensor]:
    there = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {key: value.clone() for key, value in net.split(there).items()}


def train_on_mesh(
    mesh: ProcessMesh, drop: bool = True, message_bytes: int = 2**20
) -> dict[str, Any]:
    """This process's part of a training on two pairs."""
    net = build_network(mesh).train(drop)
    means = []
    with GradientAverage(net, mesh, message_bytes) as average:

        def backward(step: int) -> None:
            images, labels = take_replica_batch(step, mesh.replica)
            net.set_position(first(step, mesh.replica))
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            if step % 2:  # either order must do
                average.finish()
            means.append(mesh.mean(loss.detach().clone()))
            average.finish()

        return {**run_steps(net, backward), "losses": torch.stack(means)}


def train_in_one_process(drop: bool) -> dict[str, Any]:
    """The same in one process: replica by replica where their dropout differs, or all at once."""
    net = build_network(ProcessMesh()).train(drop)
    means = []

    def replica_by_replica(step: int) -> None:
        losses = []
        for replica in range(REPLICAS):
            images, labels = take_replica_batch(step, replica)
            net.set_position(first(step, replica))
            losses.append(F.cross_entropy(net(images), labels) / REPLICAS)
            losses[-1].backward()
        means.append(torch.stack(losses).sum().detach())

    def all_at_once(step: int) -> None:
        images, labels = make_global_batch(step)
        loss = F.cross_entropy(net(images), labels)
        loss.backward()
        means.append(loss.detach())

    found = run_steps(net, replica_by_replica if drop else all_at_once)
    return {**found, "losses": torch.stack(means)}


def record_order(mesh: ProcessMesh) -> list[str]:
    """Order in which gradients are computed and sent, in one backward pass."""
    net = build_network(mesh)
    events: list[str] = []
    names = {p: name for name, p in net.named_parameters()}
    for parameter in names:
        parameter.register_post_accumulate_grad_hook(lambda p: events.append(f"{names[p]} there"))

    class Watched(gradients._Message):
        def start(self, reduce: Any) -> None:
            events.extend(f"{names[p]} off" for p in self.parameters)
            super().start(reduce)

    with GradientAverage(net, mesh, message_bytes=1) as average:
        for message in average._messages:
            message.__class__ = Watched
        net.set_position(first(0, mesh.replica))
        net(take_replica_batch(0, mesh.replica)[0]).sum().backward()
        events.append("end")
        average.finish()
    return events


def train_frozen(mesh: ProcessMesh) -> dict[str, Any]:
    """Some parameters take no gradient from the start on, others from some step on."""
    net = build_network(mesh)
    net.get_parameter("conv1.weight").requires_grad_(False)
    found = {}
    with GradientAverage(net, mesh) as average:
        for step, late in enumerate((None, "fc6.weight")):
            if late:
                net.get_parameter(late).requires_grad_(False)
            net.zero_grad()
            images, labels = take_replica_batch(0, mesh.replica)
            net.set_position(first(0, mesh.replica))
            F.cross_entropy(net(images), labels).backward()
            average.finish()
            found[str(step)] = split_gradients(net)
    return found


LONE_SEATS = ((2,), (0,), (3,), (1,))
"""Four replicas, in another order than that of the ranks."""
LENGTHS = (0, 1, 3, 1000)


def make_terms(length: int) -> Tensor:
    """Terms [4, length] of a sum, by replica, whose order shows in its bits."""
    generator = torch.Generator().manual_seed(length)
    return torch.randn(4, length, generator=generator) * 10.0 ** torch.arange(4)[:, None]


def sum_over_replicas() -> dict[str, Any]:
    """Sums over four replicas, and the table of what each has."""
    mesh = create_mesh(LONE_SEATS, torch.device("cpu"), 1)
    own = torch.tensor([float(mesh.replica), -1.0])
    sums = {str(n): mesh.sum_in_pairs(make_terms(n)[mesh.replica].clone()) for n in LENGTHS}
    return {**sums, "table": mesh.gather_replicas(own)}


def run_backward_twice(mesh: ProcessMesh) -> str:
    """Answer to a second backward pass before the gradients of the first are means."""
    net = build_network(mesh).eval()
    said = "nothing"
    with GradientAverage(net, mesh) as average:
        net(take_replica_batch(0, 0)[0]).sum().backward()
        loss = net(take_replica_batch(0, 0)[0]).sum()
        with suppress(RuntimeError):
            loss.backward()
            said = "accepted"
        average.finish()
        net(take_replica_batch(0, 0)[0]).sum().backward()  # and it goes on
        average.finish()
    return said


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    init = f"file://{folder}/init"
    patience = timedelta(minutes=5)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=4, timeout=patience)
    mesh = create_mesh(SEATS, torch.device("cpu"), 1)
    found = {
        "dropout": train_on_mesh(mesh),
        "again": train_on_mesh(mesh),
        "no dropout": train_on_mesh(mesh, drop=False),
        "small messages": train_on_mesh(mesh, message_bytes=1),
        "one message": train_on_mesh(mesh, message_bytes=2**40),
        "frozen": train_frozen(mesh),
        "order": record_order(mesh),
        "twice": run_backward_twice(mesh),
        "sums": sum_over_replicas(),
    }
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def mesh() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(run_rank, (folder,), 4)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(4)]


@pytest.fixture(scope="module")
def one() -> Iterator[dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {"dropout": train_in_one_process(True), "no dropout": train_in_one_process(False)}
    torch.set_num_threads(threads)


def measure_distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("case", ["dropout", "no dropout"])
def test_two_pairs_equal_one_process_on_the_whole_batch(mesh: Any, one: Any, case: str) -> None:
    expected = one[case]
    for ranks in SEATS:
        for what in ("gradients", "parameters"):
            a, b = (mesh[rank][case][what] for rank in ranks)
            assert {**a, **b}.keys() == expected[what].keys()
            for key, value in {**a, **b}.items():
                assert measure_distance(value, expected[what][key]) <= 1e-11, (what, key)
        for rank in ranks:
            assert measure_distance(mesh[rank][case]["losses"], expected["losses"]) <= 1e-12


def test_the_comparison_is_not_empty(one: Any) -> None:
    """The replicas see different images and masks, and weights move more than the tolerance."""
    start = build_network(ProcessMesh()).column_state()
    for key, value in one["dropout"]["parameters"].items():
        assert measure_distance(value, start[key]) > 1e-6, key
        assert measure_distance(value, one["no dropout"]["parameters"][key]) > 1e-6, key
    assert not torch.equal(*(take_replica_batch(0, replica)[0] for replica in range(REPLICAS)))


def same_bits(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)


def test_the_same_run_gives_the_same_bits(mesh: Any) -> None:
    for found in mesh:
        assert same_bits(found["dropout"], found["again"])


@pytest.mark.parametrize("case", ["dropout", "small messages", "one message"])
def test_replicas_stay_equal_bit_for_bit(mesh: Any, case: str) -> None:
    for column in range(2):
        first, second = (mesh[ranks[column]][case] for ranks in SEATS)
        assert same_bits(first, second)
        # a sum of two is the same in either order, so that how messages are cut cannot matter
        assert same_bits(first, mesh[column]["dropout"])


def test_gradients_set_off_while_the_layers_below_compute(mesh: Any) -> None:
    for found in mesh:
        events = found["order"]
        off = [event for event in events if event.endswith("off")]
        assert off == [event for event in mesh[0]["order"] if event.endswith("off")]
        assert len(off) == 16  # eight layers, weight and bias
        for above, below in (("fc8", "fc7"), ("fc6", "conv5"), ("conv2", "conv1")):
            for kind in ("weight", "bias"):
                assert events.index(f"{above}.{kind} off") < events.index(f"{below}.{kind} there")
        assert events.index("conv1.weight off") < events.index("end")


def test_what_takes_no_gradient_is_left_out(mesh: Any, one: Any) -> None:
    for ranks in SEATS:
        for rank, column in zip(ranks, "ab", strict=True):
            for step, without in (("0", {"conv1.weight"}), ("1", {"conv1.weight", "fc6.weight"})):
                found = mesh[rank]["frozen"][step]
                expected = one["dropout"]["gradients"]
                mine = {key for key in expected if key.startswith(column)}
                assert found.keys() == mine - {f"{column}.{name}" for name in without}
                for key, value in found.items():
                    assert measure_distance(value, expected[key]) <= 1e-11, key


def test_a_second_backward_pass_is_refused(mesh: Any) -> None:
    assert {found["twice"] for found in mesh} == {"nothing"}


@pytest.mark.parametrize("length", LENGTHS)
def test_a_sum_in_pairs_has_the_bits_of_the_tree_on_every_replica(mesh: Any, length: int) -> None:
    a, b, c, d = make_terms(length)
    assert length < 1000 or not torch.equal((a + b) + (c + d), ((a + b) + c) + d)
    for found in mesh:
        assert torch.equal(found["sums"][str(length)], (a + b) + (c + d))
        assert found["sums"]["table"].tolist() == [[replica, -1] for replica in range(4)]


def test_one_replica_has_nothing_to_average() -> None:
    net = build_network(ProcessMesh()).eval()
    with GradientAverage(net, ProcessMesh()) as average:
        for _ in range(2):  # here gradients may add up
            net(take_replica_batch(0, 0)[0][:1]).sum().backward()
        before = split_gradients(net)
        average.finish()
    assert same_bits(split_gradients(net), before)
    assert all(not p._post_accumulate_grad_hooks for p in net.parameters())  # type: ignore[attr-defined]


def test_a_worker_names_the_other_one_if_there_is_but_one() -> None:
    pair: Any = object()  # stands for a group
    assert ProcessMesh(columns=(0,), pair=pair).peer_name == "replica 0, column b"
    assert ProcessMesh(columns=(1,), pair=pair).peer_name == "replica 0, column a"
    assert ProcessMesh(replica=1, replicas=2, peers=pair).peer_name == "replica 0, columns a and b"
    assert ProcessMesh(columns=(0,), replicas=2, pair=pair).peer_name == "another worker"
